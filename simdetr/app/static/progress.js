// Progress of runs: percent of the real steps, losses, scores, machine, log. All of it comes from the server, so that a
// reload shows the same.

import { address, get, post } from "./api.js";
import { lineChart } from "./charts.js";
import { button, complain, empty, h, put, status } from "./elements.js";
import { inUse } from "./models.js";
import { bytes, clock, count, DASH, decimal, duration, percent, plural, score, seconds, sentence, when } from "./numbers.js";
import { AT_WORK, isForGood, KINDS, RunFeed, stateOf } from "./runs.js";

const LOG_ROWS = 200;
const STRATEGIES = [
  ["", "as fits best"],
  ["mixed", "unsure and unlike"],
  ["interleave", "clusters by turns"],
  ["entropy", "unsure first"],
  ["k_center", "unlike first"],
  ["cluster", "cluster by cluster"],
  ["box_size", "large boxes first"],
  ["cluster_size", "large clusters first"],
  ["random", "by chance"],
];

export class ProgressScreen {
  #feed = null;
  #messages = [];

  constructor(app) {
    this.app = app;
    this.list = h("ul.runs.side-list", { testid: "runs", "aria-label": "Runs" });
    this.detail = h("div.run-detail", { testid: "run-detail" });
    this.strategy = h(
      "select",
      { testid: "strategy", "aria-label": "How images are ordered" },
      STRATEGIES.map(([value, text]) => h("option", { value }, text)),
    );
    this.starts = h(
      "section.card.starts",
      { "aria-label": "Start a run" },
      h("h2", {}, "Start"),
      button("detect-all", "Detect on all images", () => this.#begin("detect", {}), {
        icon: "detect",
        title: "Boxes for every image that nobody has inspected",
      }),
      this.strategy,
      button("order", "Order the queue", () =>
        this.#begin("order", this.strategy.value ? { strategy: this.strategy.value } : {}),
      ),
    );
    this.element = h(
      "div.page.split",
      { testid: "screen-progress" },
      h("aside", {}, h("h1", {}, "Runs"), this.list, this.starts),
      this.detail,
    );
    this.onRuns = () => this.#runs();
    app.runs.addEventListener("runs", this.onRuns);
  }

  async start(argument) {
    await this.app.runs.look();
    this.#runs();
    const run = Number(argument) || this.app.runs.active?.id || this.app.runs.runs.find(isForGood)?.id;
    if (run) this.#follow(run);
    else {
      put(
        this.detail,
        empty(
          "No run yet",
          "Trainings, detections and orderings show up here, with their curves and their log.",
          h("a.button.primary", { href: `#/p/${this.app.project.id}/train`, testid: "go-train" }, "Start a training"),
        ),
      );
    }
  }

  update(argument) {
    if (Number(argument) && Number(argument) !== this.#feed?.id) this.#follow(Number(argument));
  }

  leave() {
    this.#feed?.stop();
    this.app.runs.removeEventListener("runs", this.onRuns);
  }

  #runs() {
    put(
      this.list,
      this.app.runs.runs.filter((run) => isForGood(run) || run.id === this.#feed?.id).map((run) =>
        h(
          "li",
          {},
          h(
            "a",
            {
              href: `#/p/${this.app.project.id}/progress/${run.id}`,
              testid: "run",
              "aria-current": run.id === this.#feed?.id ? "true" : null,
            },
            h("b", {}, `${KINDS[run.kind]} ${run.id}`),
            status(stateOf(run)),
            h(
              "span.muted",
              {},
              run.state === "running"
                ? percent(run.progress)
                : run.position
                  ? `${run.position}. in the queue`
                  : clock(run.created),
            ),
          ),
        ),
      ),
    );
  }

  async #begin(kind, parameters) {
    complain(this.starts, null);
    try {
      const run = await post(`/projects/${this.app.project.id}/runs`, { kind, parameters });
      await this.app.runs.look();
      this.#follow(run.id);
    } catch (error) {
      complain(this.starts, error);
    }
  }

  #follow(id) {
    this.#feed?.stop();
    this.#messages = [];
    this.#build();
    this.#feed = new RunFeed(
      id,
      (run, rows) => this.#seen(run, rows),
      (error) => complain(this.detail, error),
    );
    this.#runs();
    this.app.address(`progress/${id}`);
  }

  // Once a training is done: whether its model is the one that proposes, and the way to make it so.
  async #afterwards(run) {
    const made = run.state === "done" && ["train", "autolabel"].includes(run.kind);
    const key = made ? `${run.id}` : "";
    if (key === this.told) return;
    this.told = key;
    if (!made) {
      put(this.after);
      return;
    }
    const base = `/projects/${this.app.project.id}/models`;
    const { models } = await get(base).catch(() => ({ models: [] }));
    const model = models.find((one) => one.run_id === run.id);
    if (!model || this.told !== key) return;
    const before = inUse(models);
    put(
      this.after,
      model.active
        ? "This model is in use: it makes the next proposals. "
        : `This model is not in use yet${before ? `: proposals are still made by ${before.title || before.id}` : ""}. `,
      model.active
        ? button("detect-with-it", "Detect on all images", () => this.#begin("detect", {}))
        : button(
            "use-model",
            "Use this model",
            async () => {
              try {
                await post(`${base}/${model.id}/activate`);
                this.told = null;
                await this.#afterwards(run);
              } catch (error) {
                complain(this.detail, error);
              }
            },
            { kind: "primary" },
          ),
    );
  }

  #build() {
    this.title = h("h2.run-title", {});
    this.actions = h("div.row", {});
    this.bar = h("progress", { max: 1, value: 0, "aria-label": "Progress", testid: "run-progress" });
    this.share = h("output.share", { testid: "run-percent" }, DASH);
    this.words = h("p.run-words", { testid: "run-message" });
    this.after = h("p.after", { testid: "after-training" });
    this.told = "";
    this.facts = h("dl.facts.tiles", { testid: "run-facts" });
    this.charts = h("div.charts", { testid: "run-charts" });
    this.log = h("ol.log", { testid: "run-log", tabindex: 0, "aria-label": "Log" });
    this.settings = h("dl.settings");
    put(
      this.detail,
      h("div.page-head", {}, this.title, this.actions),
      h("div.progress-line", {}, this.bar, this.share),
      this.words,
      this.after,
      this.facts,
      this.charts,
      h("h3", {}, "Log"),
      this.log,
      h("details", {}, h("summary", {}, "Settings of this run"), this.settings),
    );
  }

  async #seen(run, rows) {
    complain(this.detail, null);
    put(this.title, `${KINDS[run.kind]} ${run.id} `, status(stateOf(run)));
    put(this.actions, this.#buttons(run));
    this.bar.value = run.progress;
    this.share.textContent = percent(run.progress, 0);
    this.words.textContent =
      run.error ?? (run.position ? `Waits: ${run.position}. in the queue.` : sentence(run.message));
    this.words.className = run.error ? "run-words error" : "run-words";
    const last = rows.findLast((row) => row.step !== undefined && row.loss !== undefined) ?? {};
    this.#figures(run, last);
    this.#curves(rows);
    this.#write(run, rows);
    put(
      this.settings,
      Object.entries(run.parameters).map(([name, value]) =>
        h("div", {}, h("dt", {}, name), h("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value))),
      ),
      run.snapshot && h("div", {}, h("dt", {}, "snapshot of the labels"), h("dd", {}, run.snapshot)),
    );
    if (AT_WORK.has(run.state)) this.machine = await get("/system").catch(() => this.machine);
    if (!AT_WORK.has(run.state)) this.app.runs.look();
    await this.#afterwards(run);
  }

  #buttons(run) {
    const act = (what) => async () => {
      try {
        await post(`/runs/${run.id}/${what}`);
        this.#feed.again();
        this.app.runs.look();
      } catch (error) {
        complain(this.detail, error);
      }
    };
    const pauses = run.kind === "train" && run.state === "running";
    return [
      pauses
        ? button("pause-run", "Pause", act("cancel"), { icon: "pause", title: "Keep this step; resume goes on from it" })
        : null,
      AT_WORK.has(run.state) && !pauses ? button("cancel-run", "Cancel", act("cancel"), { icon: "stop" }) : null,
      run.resumable && !AT_WORK.has(run.state)
        ? button("resume-run", "Resume", act("resume"), { icon: "play", kind: "primary" })
        : null,
      run.state === "done" && run.kind === "train"
        ? h(
            "a.button.primary",
            { href: `#/p/${this.app.project.id}/results/run-${run.id}`, testid: "see-results" },
            "Results",
          )
        : null,
      run.state === "done" && run.kind === "autolabel"
        ? h("a.button.primary", { href: `#/p/${this.app.project.id}/fewshot`, testid: "see-fewshot" }, "Candidates")
        : null,
      run.state === "done" && ["detect", "order"].includes(run.kind)
        ? h("a.button.primary", { href: `#/p/${this.app.project.id}/label`, testid: "see-queue" }, "To the queue")
        : null,
    ];
  }

  #figures(run, last) {
    const took = seconds(run.started, run.ended);
    const left = run.state === "running" && run.progress > 0.02 ? (took / run.progress) * (1 - run.progress) : null;
    const device = this.machine?.devices[0];
    const fact = (name, value, testid) => h("div", {}, h("dt", {}, name), h("dd", { testid }, value));
    put(
      this.facts,
      fact(
        run.unit ? run.unit[0].toUpperCase() + run.unit.slice(1) : "Done",
        `${count(run.done)} / ${run.total ? count(run.total) : DASH}`,
        "run-steps",
      ),
      run.kind === "train" ? fact("Epoch", count(last.epoch)) : null,
      run.kind === "train" ? fact("Loss", decimal(last.loss)) : null,
      run.kind === "train" ? fact("Learning rate", decimal(last.lr, 5)) : null,
      last.seconds_per_step ? fact("A step", duration2(last.seconds_per_step)) : null,
      fact("Took", duration(took)),
      left === null ? null : fact("Left, about", duration(left)),
      last.memory ? fact("Memory", bytes(last.memory)) : null,
      this.machine && AT_WORK.has(run.state) ? fact("Processor", `${Math.round(this.machine.cpu_percent)} %`) : null,
      device && AT_WORK.has(run.state)
        ? fact("Device memory", `${bytes(device.memory_used)} of ${bytes(device.memory_total)}`)
        : null,
    );
  }

  #curves(rows) {
    put(this.charts, trainingCharts(rows));
  }

  #write(run, rows) {
    if (run.message && this.#messages.at(-1)?.text !== run.message)
      this.#messages.push({ time: new Date().toISOString(), text: run.message });
    const lines = rows
      .filter((row) => row.step !== undefined && (row.scores || "loss" in row)) // not: begun, paused
      .map((row) => ({
        time: row.time,
        text: row.scores
          ? `step ${count(row.step)}: ${Object.entries(row.scores)
              .map(([name, value]) => `${name} ${score(value)}`)
              .join(", ")}`
          : `step ${count(row.step)} of ${count(row.total_steps)}: loss ${decimal(row.loss)}`,
      }));
    const all = [...lines, ...this.#messages].sort((a, b) => when(a.time) - when(b.time)).slice(-LOG_ROWS);
    const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 30;
    put(
      this.log,
      all.map((line) => h("li", {}, h("time", {}, clock(line.time)), line.text)),
      run.artefacts.includes("log") &&
        h("li", {}, h("a", { href: address(`/runs/${run.id}/artefacts/log`), download: "" }, "The whole log")),
    );
    if (atEnd) this.log.scrollTop = this.log.scrollHeight;
  }
}

const duration2 = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);

// The curves of a training: its loss, the parts of it, and the scores of validations.
export function trainingCharts(rows) {
  const steps = [];
  for (const row of rows.filter((one) => one.step !== undefined && "loss" in one)) {
    while (steps.length && steps.at(-1).step >= row.step) steps.pop(); // resumed from a step before
    steps.push(row);
  }
  const named = [...new Set(steps.flatMap((row) => Object.keys(row.losses ?? {})))];
  const last = named.filter((name) => name.startsWith("loss_") && !/_(\d+|enc)$/.test(name)); // of the last layer
  const parts = (last.length ? last : named).slice(0, 6);
  const tested = rows
    .filter((row) => row.scores)
    .map((row) => ({ ...row, step: row.step ?? steps.at(-1)?.step })) // the last ones come after the last step
    .filter((row) => row.step !== undefined);
  const names = [...new Set(tested.flatMap((row) => Object.keys(row.scores)))].filter((name) =>
    /^AP(50|75)?$/.test(name),
  );
  const curves = [];
  if (steps.length)
    curves.push(
      lineChart({
        title: "Loss",
        xName: "step",
        testid: "chart-loss",
        series: [{ name: "loss", points: steps.map((row) => [row.step, row.loss]) }],
      }),
    );
  if (parts.length) {
    curves.push(
      lineChart({
        title: "Parts of the loss",
        xName: "step",
        testid: "chart-losses",
        series: parts.map((name) => ({ name: name.replace(/^loss_/, ""), points: steps.map((row) => [row.step, row.losses?.[name] ?? null]) })),
      }),
    );
  }
  if (names.length && tested.length === 1) {
    curves.push(
      h(
        "figure.chart",
        { testid: "chart-scores" },
        h("figcaption", {}, "Average precision"),
        h(
          "dl.facts.tiles",
          {},
          names.map((name) => h("div", {}, h("dt", {}, name), h("dd", {}, score(tested[0].scores[name])))),
        ),
        h("p.reading", {}, `Measured once, after ${plural(tested[0].step, "step")}.`),
      ),
    );
  } else if (names.length) {
    curves.push(
      lineChart({
        title: "Average precision",
        xName: "step",
        most: 1,
        text: score,
        tick: (share) => percent(share),
        testid: "chart-scores",
        series: names.map((name) => ({ name, points: tested.map((row) => [row.step, row.scores[name]]) })),
      }),
    );
  }
  return curves;
}
