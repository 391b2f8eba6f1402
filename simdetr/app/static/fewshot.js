// Few-shot: examples of every class, examples of what looks like it, and what became of every detection.

import { address, ask, get, post } from "./api.js";
import { button, complain, empty, field, h, put } from "./elements.js";
import { inUse, offerModels, pretrained } from "./models.js";
import { count, decimal, DASH, duration, percent } from "./numbers.js";
import { AT_WORK, secondsPerStep } from "./runs.js";

const STEPS = 400; // as a training on the command line

const RULES = [
  ["agreement", "votes agree with the detector"],
  ["precision", "measured on left-out shots"],
  ["per_class_top", "the best per shot"],
  ["absolute", "a fixed score"],
];

const REASON_OF = { all: undefined, kept: "" };

export class FewShotScreen {
  #run = null;

  constructor(app) {
    this.app = app;
    this.project = app.project;
    this.shots = h("div.shots", { testid: "shots" });
    this.rule = h(
      "select",
      { testid: "score-rule" },
      RULES.map(([value, text]) => h("option", { value }, text)),
    );
    this.init = h("select", { testid: "fewshot-init" });
    this.steps = h("input", {
      type: "number",
      min: 1,
      max: 1_000_000,
      value: STEPS,
      required: true,
      testid: "fewshot-steps",
      oninput: () => this.#long(),
    });
    this.time = h("span", { testid: "fewshot-time" });
    this.go = h("button.button.primary", { testid: "start-autolabel" }, "Label all from these");
    this.needs = h("p.note", { testid: "fewshot-needs" });
    this.form = h(
      "form.card.fewshot-form",
      {
        onsubmit: (event) => {
          event.preventDefault();
          this.#begin();
        },
      },
      h("h2", {}, "From few labels to many"),
      h(
        "p.muted",
        {},
        "The detector learns the shots and looks at all images; crops are compared with the shots, which " +
          "vote; what is kept becomes proposals.",
      ),
      field("Start from", this.init),
      field("A detection is a candidate if", this.rule),
      field("Steps of each training", this.steps, this.time),
      this.needs,
      h("div.row", {}, this.go),
    );
    this.stages = h("div.stages", { testid: "stages" });
    this.reason = h("select", {
      testid: "reason",
      "aria-label": "Which candidates",
      onchange: () => this.#candidates(),
    });
    this.candidates = h("ul.candidates", { testid: "candidates" });
    this.more = h("div.row");
    this.result = h(
      "section",
      { hidden: true },
      h("h2", {}, "What became of every detection"),
      this.stages,
      h("div.row", {}, "Show ", this.reason),
      this.candidates,
      this.more,
    );
    this.element = h(
      "div.page",
      { testid: "screen-fewshot" },
      h("h1", {}, "Few-shot"),
      h("div.two.wide-left", {}, h("section", {}, this.shots), this.form),
      this.result,
    );
    this.onRuns = () => this.#watch();
    app.runs.addEventListener("runs", this.onRuns);
  }

  leave() {
    this.app.runs.removeEventListener("runs", this.onRuns);
  }

  async start() {
    try {
      const [{ shots }, { classes }, { models }] = await Promise.all([
        get(`/projects/${this.project.id}/shots`),
        get(`/projects/${this.project.id}/classes`),
        get(`/projects/${this.project.id}/models`),
      ]);
      this.classes = new Map(classes.map((one) => [one.id, one]));
      offerModels(this.init, models, models.length ? [] : [["", "no detector yet"]]);
      this.init.value = pretrained(models) ?? inUse(models)?.id ?? models[0]?.id ?? "";
      this.init.disabled = !models.length;
      this.#gallery(shots);
      this.go.disabled = !models.length || !shots.some((shot) => !shot.negative);
      put(
        this.needs,
        models.length
          ? null
          : [
              "There is no detector to start from yet: ",
              h("a", { href: `#/p/${this.project.id}/train`, testid: "go-train" }, "train one"),
              ", or start ",
              h("code", {}, "simdetr label --run"),
              " with the folder of a pretraining.",
            ],
      );
    } catch (error) {
      complain(this.form, error);
    }
    this.#watch();
    this.#long();
  }

  // How long it will take, by the last training here.
  async #long() {
    this.perStep ??= await secondsPerStep(this.app.runs.runs);
    const steps = Number(this.steps.value);
    this.time.textContent =
      "It trains twice: on the shots, and on what was kept." +
      (this.perStep && steps
        ? ` About ${duration(2 * steps * this.perStep)} as the last training here went, and the looks at all images.`
        : " How long that takes is known once something was trained here.");
  }

  #gallery(shots) {
    if (!shots.length) {
      put(
        this.shots,
        empty(
          "No shots yet",
          "On the Label screen, select a box and “Use as shot”. Ten good examples of every class are a good start.",
          button("go-label", "To the Label screen", () => this.app.go("label"), { kind: "primary" }),
        ),
      );
      return;
    }
    const group = (title, some, dir) =>
      h(
        "section.card",
        {},
        h("h2", { dir }, title, h("span.muted", {}, ` ${some.length}`)),
        h(
          "ul.crops",
          {},
          some.map((shot) =>
            h(
              "li",
              { testid: "shot" },
              h("img", {
                src: address(`/boxes/${shot.box.id}/crop`, { size: 128 }),
                alt: `Shot of ${this.classes.get(shot.box.class_id)?.name ?? "a class"}`,
                width: 80,
                height: 80,
                loading: "lazy",
              }),
              h(
                "button.crop-remove",
                {
                  type: "button",
                  testid: "remove-shot",
                  "aria-label": "Take this shot away",
                  title: "Take this shot away",
                  onclick: () => this.#remove(shot),
                },
                "×",
              ),
            ),
          ),
        ),
      );
    const good = shots.filter((shot) => !shot.negative);
    const bad = shots.filter((shot) => shot.negative);
    put(
      this.shots,
      [...this.classes.values()]
        .map((one) => [one, good.filter((shot) => shot.box.class_id === one.id)])
        .filter(([, some]) => some.length)
        .map(([one, some]) => group(one.name, some, "auto")),
      bad.length ? group("Looks like one, and is none", bad) : null,
    );
  }

  async #remove(shot) {
    try {
      await ask("DELETE", `/shots/${shot.id}`);
      await this.start();
    } catch (error) {
      complain(this.shots, error);
    }
  }

  async #begin() {
    complain(this.form, null);
    try {
      const run = await post(`/projects/${this.project.id}/runs`, {
        kind: "autolabel",
        parameters: {
          score_rule: this.rule.value,
          max_steps: Number(this.steps.value),
          ...(this.init.value ? { init: this.init.value } : {}),
        },
      });
      this.app.runs.look();
      this.app.go("progress", run.id);
    } catch (error) {
      complain(this.form, error);
    }
  }

  async #watch() {
    const run = this.app.runs.runs.find((one) => one.kind === "autolabel");
    if (!run) return;
    const key = `${run.id} ${run.state} ${run.message}`;
    if (key === this.seen) return;
    this.seen = key;
    this.#run = run;
    this.result.hidden = false;
    try {
      const { stages } = await get(`/runs/${run.id}/stages`);
      put(
        this.stages,
        stages.map(({ stage, counts, quality }, place) =>
          h(
            "section.card.stage-card",
            {},
            h("h3", {}, `${place + 1}. ${stage}`),
            h(
              "dl.settings",
              {},
              Object.entries(counts).map(([name, value]) =>
                h("div", {}, h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, count(value))),
              ),
              Object.entries(quality ?? {}).map(([name, value]) =>
                h("div", {}, h("dt", {}, name), h("dd", {}, decimal(value, 2))),
              ),
            ),
          ),
        ),
      );
      const reasons = new Set(stages.flatMap((one) => Object.keys(one.counts)).filter((name) => name !== "kept"));
      const chosen = this.reason.value;
      put(
        this.reason,
        h("option", { value: "all" }, "all candidates"),
        h("option", { value: "kept" }, "kept"),
        [...reasons].map((name) => h("option", { value: name }, name.replaceAll("_", " "))),
      );
      this.reason.value = chosen || "all";
      if (!stages.length)
        put(
          this.stages,
          h(
            "p.note",
            {},
            AT_WORK.has(run.state) ? "The first stage is at work." : (run.error ?? "No stage was finished."),
          ),
        );
      await this.#candidates();
    } catch (error) {
      complain(this.result, error);
    }
  }

  async #candidates(after) {
    complain(this.result, null);
    try {
      const { candidates, next } = await get(`/runs/${this.#run.id}/candidates`, {
        reason: this.reason.value in REASON_OF ? REASON_OF[this.reason.value] : this.reason.value,
        limit: 24,
        after,
      });
      const items = candidates.map((one) => this.#candidate(one));
      if (after) this.candidates.append(...items);
      else put(this.candidates, items);
      if (!items.length && !after) put(this.candidates, h("li.note", {}, "None."));
      put(this.more, next === null ? null : button("more-candidates", "More", () => this.#candidates(next)));
    } catch (error) {
      complain(this.result, error);
    }
  }

  #candidate(one) {
    const kept = !one.reason;
    const name = one.class_name ?? one.class;
    return h(
      "li.card.candidate",
      { testid: "candidate" },
      one.image_id
        ? h(
            "a",
            { href: `#/p/${this.project.id}/label/${one.image_id}` },
            h("img", {
              src: address(`/images/${one.image_id}/thumbnail`, { size: 256 }),
              alt: one.image,
              width: 150,
              height: 100,
              loading: "lazy",
            }),
          )
        : null,
      h("p", {}, h("b", { dir: "auto" }, name), ` ${decimal(one.score, 2)}`),
      h(`span.status.${kept ? "inspected" : "rejected"}`, {}, kept ? "kept" : one.reason.replaceAll("_", " ")),
      h(
        "p.muted",
        { dir: "auto" },
        one.why || (one.vote ? `the shots say ${one.vote}, by ${decimal(one.margin, 2)}` : DASH),
      ),
      one.nearest.length
        ? h(
            "p.muted",
            {},
            `nearest: ${one.nearest
              .slice(0, 3)
              .map((near) => `shot ${near.shot} ${percent(near.similarity)}`)
              .join(", ")}`,
          )
        : null,
    );
  }
}
