// Results of trainings: every detector, its curves, its scores by class, what it is made of; use it or take it along.

import { address, get, post } from "./api.js";
import { bars } from "./charts.js";
import { button, complain, empty, h, put, toast } from "./elements.js";
import { count, DASH, day, decimal, score, short } from "./numbers.js";
import { trainingCharts } from "./progress.js";
import { finished } from "./runs.js";

const PAIRS = 4;

export class ResultsScreen {
  #models = [];
  #shown = null;

  constructor(app) {
    this.app = app;
    this.base = `/projects/${app.project.id}/models`;
    this.list = h("ul.runs.side-list", { testid: "models", "aria-label": "Models" });
    this.detail = h("div.run-detail", { testid: "model-detail" });
    this.element = h(
      "div.page.split",
      { testid: "screen-results" },
      h("aside", {}, h("h1", {}, "Models"), this.list),
      this.detail,
    );
  }

  async start(argument) {
    try {
      this.#models = (await get(this.base)).models;
      this.#paint();
      const wanted =
        this.#models.find((one) => one.id === argument) ?? this.#models.find((one) => one.active) ?? this.#models[0];
      if (wanted) await this.#show(wanted.id);
      else {
        this.list.hidden = true;
        this.element.classList.remove("split");
        put(
          this.detail,
          empty(
            "No model yet",
            "A training makes one from the images that you inspected. Its curves and scores come up here.",
            h("a.button.primary", { href: `#/p/${this.app.project.id}/train`, testid: "go-train" }, "Train"),
          ),
        );
      }
    } catch (error) {
      complain(this.detail, error);
    }
  }

  update(argument) {
    if (argument && argument !== this.#shown) this.#show(argument);
  }

  #paint() {
    put(
      this.list,
      this.#models.map((one) =>
        h(
          "li",
          {},
          h(
            "a",
            {
              href: `#/p/${this.app.project.id}/results/${one.id}`,
              testid: "model-link",
              "aria-current": one.id === this.#shown ? "true" : null,
            },
            h("b", {}, one.title || one.id),
            one.active ? h("span.status.inspected", {}, "in use") : null,
            h(
              "span.muted",
              {},
              one.scores?.AP !== undefined && one.scores.AP !== null
                ? `AP ${score(one.scores.AP)}`
                : one.created
                  ? day(one.created)
                  : "",
            ),
          ),
        ),
      ),
    );
  }

  async #show(id) {
    this.#shown = id;
    this.#paint();
    this.app.address(`results/${id}`);
    const model = this.#models.find((one) => one.id === id);
    if (!model) {
      put(this.detail, empty("There is no such model", "It may have been deleted. Choose one on the left."));
      return;
    }
    const trouble = h("div");
    const summary = h("section.card", { testid: "model-summary" }, h("h3", {}, "Model"), h("p.muted", {}, "Counting…"));
    const curves = h("div.charts", { testid: "model-curves" });
    const classes = h("section.card", { testid: "per-class" }, h("h3", {}, "By class"));
    const scores = h(
      "dl.facts.tiles",
      { testid: "model-scores" },
      Object.entries(model.scores ?? {})
        .slice(0, 8)
        .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, score(value)))),
    );
    put(
      this.detail,
      h(
        "div.page-head",
        {},
        h("h2.run-title", {}, model.title || model.id),
        h(
          "div.row",
          {},
          model.active
            ? [
                h("span.status.inspected", { testid: "in-use" }, "in use"),
                button("detect-all", "Detect on all images", () => this.#detect(trouble), { kind: "primary" }),
              ]
            : button("use-model", "Use this model", () => this.#use(model, trouble), { kind: "primary" }),
          h(
            "a.button",
            { href: address(`${this.base}/${model.id}/download`), download: "", testid: "download-model" },
            "Download",
          ),
        ),
      ),
      trouble,
      scores,
      curves,
      this.#compared(model),
      h("div.two", {}, classes, summary),
    );
    await Promise.all([this.#summary(model, summary), this.#curves(model, curves, classes)]);
  }

  async #summary(model, place) {
    try {
      const found = await get(`${this.base}/${model.id}`);
      const rows = [
        ["Detector", found.detector ?? DASH],
        ["Parameters", count(found.parameters)],
        ["of these trained", count(found.trainable)],
        ["Layers", count(found.layers)],
        ["GFLOPs an image", found.gflops === null ? DASH : decimal(found.gflops, 2)],
        ["Image size", found.image_size.join(" × ")],
        ["Classes", model.classes.join(", ") || DASH],
        ["Snapshot of the labels", found.snapshot ?? DASH],
      ];
      put(
        place,
        h("h3", {}, "Model"),
        h(
          "dl.settings",
          {},
          rows.map(([name, value]) =>
            h("div", {}, h("dt", {}, name), h("dd", { dir: "auto", title: String(value) }, value)),
          ),
        ),
        found.configuration &&
          h("details", {}, h("summary", {}, "Configuration"), h("pre", { tabindex: 0 }, found.configuration)),
      );
      place.title = `${short(found.parameters)} parameters`;
    } catch (error) {
      put(place, h("h3", {}, "Model"));
      complain(place, error);
    }
  }

  async #curves(model, curves, classes) {
    if (!model.run_id) {
      put(curves, h("p.note", {}, "This is where trainings start from; it was not trained here."));
      put(classes, h("h3", {}, "By class"), h("p.note", {}, "Scores by class come with a training here."));
      return;
    }
    try {
      const { metrics } = await get(`/runs/${model.run_id}`, { since: 0 });
      const charts = trainingCharts(metrics);
      put(curves, charts.length ? charts : h("p.note", {}, "This training left no curves."));
      const last = metrics.findLast((row) => row.per_class && Object.keys(row.per_class).length);
      const rows = Object.entries(last?.per_class ?? {}).map(([name, value]) => [
        name,
        typeof value === "object" ? value?.AP : value,
      ]);
      put(
        classes,
        h("h3", {}, "Average precision by class"),
        rows.length
          ? bars(rows.map(([name, share]) => ({ name, share, text: score(share) })))
          : h(
              "p.note",
              {},
              "This training was not measured by class: that needs inspected images that are kept for validation.",
            ),
      );
    } catch (error) {
      complain(curves, error);
    }
  }

  // What comes after a training: its proposals for every image that nobody has inspected.
  async #detect(trouble) {
    try {
      const run = await post(`/projects/${this.app.project.id}/runs`, { kind: "detect", parameters: {} });
      this.app.runs.look();
      this.app.go("progress", run.id);
    } catch (error) {
      complain(trouble, error);
    }
  }

  // Pictures of images that were held out: what another model found on them, or none, beside what this one finds.
  #compared(model) {
    const others = this.#models.filter((one) => one.id !== model.id);
    const before = h(
      "select",
      { testid: "compare-with", "aria-label": "Before" },
      h("option", { value: "" }, "no model"),
      others.map((one) => h("option", { value: one.id }, one.title || one.id)),
    );
    before.value = others.at(-1)?.id ?? ""; // the first there was
    const pictures = h("div.compared", { testid: "compared" });
    const go = button("compare", "Show", () => this.#compare(model, before.value, go, pictures));
    return h(
      "section.card",
      {},
      h("h3", {}, "Before and after"),
      h("div.row", {}, h("label", {}, "On images that it did not learn from, beside ", before), go),
      pictures,
    );
  }

  async #compare(model, other, go, place) {
    go.disabled = true;
    put(place, h("p.muted", { role: "status" }, "Detecting…"));
    try {
      const { images } = await get(`${this.base}/${model.id}/held_out`, { limit: PAIRS });
      if (!images.length) {
        put(place, h("p.note", {}, "Every image was learned from: none is left to look at."));
        return;
      }
      const image_ids = images.map((image) => image.id);
      const [before, after] = await Promise.all(
        [other, model.id].map(async (id) => {
          if (!id) return null;
          const parameters = { model: id, image_ids, propose: false };
          return finished(await post(`/projects/${this.app.project.id}/runs`, { kind: "detect", parameters }));
        }),
      );
      put(
        place,
        images.map((image) =>
          h(
            "figure",
            {},
            [
              ["Before", before],
              ["After", after],
            ].map(([word, run]) =>
              h("img", {
                src: run
                  ? address(`/runs/${run.id}/pictures/${image.id}`)
                  : address(`/images/${image.id}/thumbnail`, { size: 512 }),
                alt: `${word}: ${image.name}`,
                title: word,
              }),
            ),
            h("figcaption", { dir: "auto" }, image.name),
          ),
        ),
      );
    } catch (error) {
      put(place);
      complain(place, error);
    } finally {
      go.disabled = false;
    }
  }

  async #use(model, trouble) {
    try {
      await post(`${this.base}/${model.id}/activate`);
      toast("The next detections are this model's.");
      await this.start(model.id);
    } catch (error) {
      complain(trouble, error);
    }
  }
}
