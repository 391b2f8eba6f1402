// Train: on what, from what, how long, with which changes of the images; what it will need; runs that can go on.

import { address, get, post } from "./api.js";
import { button, complain, field, h, put, status } from "./elements.js";
import { offerModels, pretrained } from "./models.js";
import { bytes, count, day, plural } from "./numbers.js";
import { KINDS, stateOf } from "./runs.js";

const PREVIEWS = 4;
const LEAST_KEPT = 5; // images to measure by; fewer say too little

export class TrainScreen {
  #augmentations = [];
  #labelled = 0;

  constructor(app) {
    this.app = app;
    this.project = app.project;
    this.init = h("select", { testid: "init", onchange: () => this.#estimate() });
    this.epochs = number("epochs", 1, 10_000, 30, () => this.#fromEpochs());
    this.steps = number("steps", 1, 1_000_000, 400, () => this.#fromSteps());
    this.batch = number("batch-size", 1, 512, 4, () => {
      this.#fromEpochs();
      this.#estimate();
    });
    this.rate = h("input", {
      type: "number",
      min: 0,
      step: "any",
      placeholder: "as configured",
      testid: "learning-rate",
    });
    this.seed = number("seed", 0, 2 ** 31 - 1, 0, () => this.#preview());
    this.kept = h("input", {
      type: "number",
      min: 0,
      max: 0.5,
      step: 0.05,
      value: 0.2,
      required: true,
      testid: "validate-on",
      oninput: () => this.#measured(),
    });
    this.proposed = h("input", {
      type: "checkbox",
      testid: "with-proposed",
      onchange: () => {
        this.minScore.disabled = !this.proposed.checked;
      },
    });
    this.minScore = h("input", {
      type: "number",
      min: 0,
      max: 1,
      step: 0.05,
      value: 0.5,
      disabled: true,
      testid: "proposed-score",
      "aria-label": "Least score of proposals that count",
    });
    this.device = h("select", { testid: "device", "aria-label": "Device", onchange: () => this.#estimate() });
    this.need = h("p.fact", { testid: "memory-estimate" }, "…");
    this.hint = h("p.muted", { testid: "train-hint" });
    this.data = h("p.lead", { testid: "train-data" }, "…");
    this.measure = h("p.note", { testid: "measured-by" });
    this.changes = h("div.augmentations", { testid: "augmentations" });
    this.pictures = h("div.previews", { testid: "augmentation-preview" });
    this.past = h("ul.runs", { testid: "past-runs" });
    this.startButton = h("button.button.primary.big", { testid: "start-training" }, "Start training");
    this.form = h(
      "form.train-form",
      {
        testid: "train-form",
        onsubmit: (event) => {
          event.preventDefault();
          this.#begin();
        },
      },
      h(
        "section.card",
        {},
        h("h2", {}, "What it learns from"),
        this.data,
        field(
          "Start from",
          this.init,
          "The pretrained detector learns from few labels; scratch needs many. A training before is started from only if " +
            "you choose it.",
        ),
        h(
          "div.field.check",
          {},
          h("label", {}, this.proposed, " Proposals count as labels from a score of "),
          this.minScore,
        ),
      ),
      h(
        "section.card",
        {},
        h("h2", {}, "How long"),
        h(
          "div.columns",
          {},
          field("Epochs", this.epochs),
          field("Steps", this.steps),
          field("Images per step", this.batch),
        ),
        this.measure,
        h(
          "details",
          {},
          h("summary", {}, "More"),
          h(
            "div.columns",
            {},
            field("Learning rate", this.rate),
            field("Seed", this.seed),
            field(
              "Kept for measuring",
              this.kept,
              "A part of the inspected images that is not trained on.",
            ),
          ),
        ),
      ),
      h(
        "section.card.wide",
        {},
        h("h2", {}, "Changes of the images"),
        h(
          "p.muted",
          {},
          "Each time an image is seen it is changed by chance, and its boxes with it, so that few labels teach more.",
        ),
        this.changes,
        this.pictures,
      ),
      h(
        "section.card.wide.go",
        {},
        h(
          "dl.facts",
          {},
          h("div", {}, h("dt", {}, "Device"), h("dd", {}, this.device)),
          h("div", {}, h("dt", {}, "Memory"), h("dd", {}, this.need)),
        ),
        this.hint,
        this.startButton,
      ),
    );
    this.element = h(
      "div.page",
      { testid: "screen-train" },
      h("h1", {}, "Train"),
      this.form,
      h("section", {}, h("h2", {}, "Trainings so far"), this.past),
    );
    this.onRuns = () => this.#runs();
    app.runs.addEventListener("runs", this.onRuns);
  }

  leave() {
    this.app.runs.removeEventListener("runs", this.onRuns);
  }

  async start() {
    this.#runs();
    try {
      const [project, { models }, { augmentations }, system] = await Promise.all([
        this.app.refresh(),
        get(`/projects/${this.project.id}/models`),
        get("/augmentations").catch(() => ({ augmentations: [] })),
        get("/system"),
      ]);
      this.project = project;
      this.system = system;
      this.#labelled = project.by_status.inspected;
      put(
        this.data,
        h("b", {}, plural(this.#labelled, "inspected image")),
        ` of ${count(project.images)}. Those that show nothing count as empty; images that nobody ` +
          `inspected are left out.`,
      );
      offerModels(this.init, models, [["", "Scratch: no weights"]]);
      this.init.value = pretrained(models) ?? "";
      this.#devices();
      this.#augmentations = augmentations;
      put(
        this.changes,
        augmentations.map((one) => this.#augmentation(one)),
      );
      this.#fromEpochs();
      this.#measured();
      this.#estimate();
      this.#preview();
      this.startButton.disabled = !this.#labelled;
      put(
        this.hint,
        this.#labelled
          ? null
          : [
              "Nothing to learn from yet: ",
              h("a", { href: `#/p/${this.project.id}/label`, testid: "go-label" }, "inspect some images"),
              " first.",
            ],
      );
    } catch (error) {
      complain(this.form, error);
    }
  }

  // The processor and every GPU; the one that the app takes by itself is chosen.
  #devices() {
    const { system, project } = this;
    const chips = system.devices.map((one) => [
      one.name,
      `${one.title || one.name}, ${bytes(one.memory_total - one.memory_used)} free`,
    ]);
    put(
      this.device,
      [...chips, ["cpu", `Processor: ${plural(system.cores, "core")}`]].map(([value, text]) =>
        h("option", { value }, text),
      ),
    );
    const own = project.default_device === "cuda" ? "cuda:0" : project.default_device;
    this.device.value = own;
    if (this.device.value !== own) this.device.value = "cpu";
    this.byItself = this.device.value;
  }

  get free() {
    const chip = this.system.devices.find((one) => one.name === this.device.value);
    return chip ? chip.memory_total - chip.memory_used : this.system.memory_total - this.system.memory_used;
  }

  #augmentation(one) {
    if (one.kind === "switch") {
      one.input = h("input", {
        type: "checkbox",
        checked: one.default,
        testid: `augment-${one.name}`,
        onchange: () => this.#preview(),
      });
      return h("label.augmentation.check", {}, one.input, titled(one));
    }
    if (one.kind === "choice") {
      one.input = h(
        "select",
        { testid: `augment-${one.name}`, "aria-label": titled(one), onchange: () => this.#preview() },
        one.choices.map((choice) => h("option", {}, choice)),
      );
      one.input.value = one.default;
      return h("div.augmentation", {}, h("span", {}, titled(one)), one.input);
    }
    const shown = h("output", {}, one.default);
    one.input = h("input", {
      type: "range",
      min: one.least ?? 0,
      max: one.most ?? 1,
      step: (one.most ?? 1) > 2 ? 1 : 0.05,
      value: one.default,
      testid: `augment-${one.name}`,
      "aria-label": titled(one),
      oninput: () => {
        shown.textContent = one.input.value;
        clearTimeout(this.typing);
        this.typing = setTimeout(() => this.#preview(), 300);
      },
    });
    return h("div.augmentation", {}, h("span", {}, titled(one)), one.input, shown);
  }

  #chosen() {
    return Object.fromEntries(
      this.#augmentations.map((one) => [
        one.name,
        one.kind === "switch" ? one.input.checked : one.kind === "choice" ? one.input.value : Number(one.input.value),
      ]),
    );
  }

  async #preview() {
    if (!this.example) {
      const { images } = await get(`/projects/${this.project.id}/images`, { status: "inspected", limit: 20 }).catch(
        () => ({ images: [] }),
      );
      this.example = images.find((image) => Object.values(image.counts).some(Boolean)) ?? images[0];
    }
    if (!this.example) {
      put(this.pictures, h("p.note", {}, "A preview comes up here once an image is inspected."));
      return;
    }
    const seed = Number(this.seed.value);
    put(
      this.pictures,
      Array.from({ length: PREVIEWS }, (_, place) =>
        h("img", {
          src: address(`/images/${this.example.id}/augmented`, { ...this.#chosen(), seed: seed + place }),
          alt: `Example ${place + 1} of changed images, with boxes`,
          width: 240,
          height: 180,
          onerror: (event) => event.target.remove(),
        }),
      ),
    );
  }

  #perEpoch() {
    return Math.max(1, Math.ceil(this.#labelled / Math.max(1, Number(this.batch.value))));
  }

  #measured() {
    const kept = Math.round(this.#labelled * Number(this.kept.value));
    const wanted = Math.ceil(LEAST_KEPT / Math.max(Number(this.kept.value), 0.01));
    this.measure.hidden = !this.#labelled;
    this.measure.textContent = !Number(this.kept.value)
      ? "Nothing is kept to measure it by: there will be no scores."
      : kept >= LEAST_KEPT
        ? `${plural(kept, "inspected image")} are kept to measure it by, and not trained on.`
        : `It learns from all of them, so there are no scores. From ${count(wanted)} images on, some are kept to measure by.`;
  }

  #fromEpochs() {
    this.steps.value = Math.max(1, Number(this.epochs.value) * this.#perEpoch());
  }

  #fromSteps() {
    this.epochs.value = Math.max(1, Math.round(Number(this.steps.value) / this.#perEpoch()));
  }

  async #estimate() {
    if (!this.init.value) {
      this.need.textContent = "known once it runs";
      return;
    }
    try {
      const path = `/projects/${this.project.id}/models/${this.init.value}/memory`;
      const need = await get(path, { batch_size: Math.max(1, Number(this.batch.value)) });
      this.need.textContent =
        need.bytes === null ? "known once it runs" : `${bytes(need.bytes)}, an estimate; ${bytes(this.free)} free`;
      this.need.title = need.basis;
      this.need.classList.toggle("bad", need.bytes > this.free);
    } catch {
      this.need.textContent = "unknown";
    }
  }

  async #begin() {
    complain(this.form.lastChild, null);
    const parameters = {
      init: this.init.value || null,
      max_steps: Number(this.steps.value),
      validate_on: Number(this.kept.value),
      batch_size: Number(this.batch.value),
      seed: Number(this.seed.value),
      ...(this.device.value !== this.byItself ? { device: this.device.value } : {}),
      with_proposed: this.proposed.checked,
      ...(this.proposed.checked ? { min_score: Number(this.minScore.value) } : {}),
      ...(this.rate.value ? { lr: Number(this.rate.value) } : {}),
      ...this.#chosen(),
    };
    this.startButton.disabled = true;
    try {
      const run = await post(`/projects/${this.project.id}/runs`, { kind: "train", parameters });
      this.app.runs.look();
      this.app.go("progress", run.id);
    } catch (error) {
      complain(this.form.lastChild, error);
    } finally {
      this.startButton.disabled = false;
    }
  }

  #runs() {
    const runs = this.app.runs.runs.filter((run) => run.kind === "train");
    put(
      this.past,
      runs.length
        ? runs.map((run) =>
            h(
              "li",
              {},
              h(
                "a",
                { href: `#/p/${this.project.id}/progress/${run.id}`, testid: "past-run" },
                `${KINDS[run.kind]} ${run.id}`,
              ),
              status(stateOf(run)),
              h("span.muted", {}, `${count(run.done)} of ${count(run.total)} ${run.unit}`),
              h("span.muted", {}, day(run.created)),
              run.resumable
                ? button(
                    "resume",
                    "Resume",
                    async () => {
                      try {
                        await post(`/runs/${run.id}/resume`);
                        this.app.runs.look();
                        this.app.go("progress", run.id);
                      } catch (error) {
                        complain(this.past, error);
                      }
                    },
                    { icon: "play" },
                  )
                : null,
            ),
          )
        : h("li.note", {}, "None yet."),
    );
  }
}

const titled = (one) => {
  const title = one.title || one.name;
  return title[0].toUpperCase() + title.slice(1);
};

const number = (testid, min, max, value, onchange) =>
  h("input", { type: "number", min, max, value, required: true, testid, oninput: onchange });
