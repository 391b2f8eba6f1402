// Labels out and in: formats, what is written, a dry run before anything is changed, a report.

import { ask, get, post } from "./api.js";
import { button, complain, field, h, put } from "./elements.js";
import { count, plural } from "./numbers.js";
import { uploadPanel } from "./upload.js";

const STATUSES = [
  ["inspected", "Accepted", true],
  ["corrected", "Corrected", true],
  ["manual", "Drawn", true],
  ["proposed", "Proposed, with scores", false],
  ["rejected", "Rejected", false],
];
const NAMES = {
  coco: "COCO",
  yolo: "YOLO",
  voc: "Pascal VOC",
  csv: "CSV",
  cvat: "CVAT",
  "label-studio": "Label Studio",
  simdetr: "Parquet of simdetr",
};
const named = (name) => NAMES[name] ?? name;

export class ExchangeScreen {
  constructor(app) {
    this.app = app;
    this.project = app.project;
    this.format = h("select", { testid: "export-format" });
    this.statuses = STATUSES.map(([value, text, on]) => [
      value,
      h("input", { type: "checkbox", checked: on, testid: `export-${value}` }),
      text,
    ]);
    this.images = h("input", { type: "checkbox", testid: "export-images" });
    this.written = h("div.report", { testid: "export-report", "aria-live": "polite" });
    this.exportForm = h(
      "form.card",
      {
        testid: "export-form",
        onsubmit: (event) => {
          event.preventDefault();
          this.#export();
        },
      },
      h("h2", {}, "Export"),
      field("Format", this.format),
      h(
        "fieldset",
        {},
        h("legend", {}, "Boxes that are"),
        this.statuses.map(([, input, text]) => h("label.check", {}, input, text)),
      ),
      h("label.check", {}, this.images, "The images too, in one zip"),
      h("div.row", {}, h("button.button.primary", { testid: "export" }, "Export")),
      this.written,
    );
    this.file = h("input", {
      type: "file",
      testid: "import-file",
      required: true,
      accept: ".json,.zip,.csv,.xml,.txt,.jsonl,.tar,.parquet",
      onchange: () => {
        this.importButton.disabled = true;
        put(this.found);
        if (this.file.files.length) this.#import(true);
      },
    });
    this.status = h(
      "select",
      { testid: "import-status" },
      h("option", { value: "manual" }, "labels that people made"),
      h("option", { value: "proposed" }, "proposals to inspect"),
    );
    this.skipBad = h("input", { type: "checkbox", testid: "skip-bad" });
    this.found = h("div.report", { testid: "import-report", "aria-live": "polite" });
    this.importButton = button("import", "Import", () => this.#import(false), { disabled: true, kind: "primary" });
    this.reads = h("p.note", {});
    this.importForm = h(
      "form.card",
      {
        testid: "import-form",
        onsubmit: (event) => {
          event.preventDefault();
          this.#import(true);
        },
      },
      h("h2", {}, "Import labels"),
      field("File", this.file),
      this.reads,
      field("Its boxes are", this.status),
      h("label.check", {}, this.skipBad, "Leave out what is wrong, instead of importing nothing"),
      h("div.row", {}, h("button.button", { testid: "dry-run" }, "Check, change nothing"), this.importButton),
      this.found,
    );
    this.element = h(
      "div.page",
      { testid: "screen-export" },
      h("h1", {}, "Export and import"),
      h("div.two", {}, this.exportForm, this.importForm),
      h(
        "section.card",
        {},
        h("h2", {}, "More images"),
        uploadPanel(this.project, () => this.app.refresh()),
      ),
    );
  }

  async start() {
    try {
      const { read, write } = await get("/formats");
      put(
        this.format,
        write.map((name) => h("option", { value: name }, named(name))),
      );
      this.reads.textContent = `Reads ${read.map(named).join(", ")}; what it is, is found out.`;
    } catch (error) {
      complain(this.exportForm, error);
    }
  }

  async #export() {
    complain(this.exportForm, null);
    const chosen = this.statuses.filter(([, input]) => input.checked).map(([value]) => value);
    if (!chosen.length) {
      complain(this.exportForm, new Error("Choose at least one kind of boxes."));
      return;
    }
    try {
      const made = await post(`/projects/${this.project.id}/exports`, {
        format: this.format.value,
        statuses: chosen,
        images: this.images.checked,
      });
      put(
        this.written,
        h(
          "p",
          {},
          `${plural(made.boxes, "box", "boxes")} on ${plural(made.images, "image")} as ${named(made.format)}.`,
        ),
        h(
          "p",
          {},
          h(
            "a.button.primary",
            { href: made.download, download: "", testid: "download-export", "data-format": made.format },
            "Download",
          ),
        ),
        notes(made.notes),
        h("p.muted", {}, `Snapshot ${made.snapshot}`),
      );
    } catch (error) {
      complain(this.exportForm, error);
    }
  }

  async #import(dry) {
    complain(this.importForm, null);
    const form = new FormData();
    form.append("file", this.file.files[0]);
    try {
      const found = await ask("POST", `/projects/${this.project.id}/imports`, {
        form,
        query: { dry_run: dry, skip_bad: this.skipBad.checked, status: this.status.value },
      });
      const fine = found.boxes > 0 && (!found.problems.length || this.skipBad.checked);
      this.importButton.disabled = found.imported || !fine;
      put(
        this.found,
        h(
          "p",
          {},
          h("b", {}, found.imported ? "Imported: " : "Would import: "),
          `${plural(found.boxes, "box", "boxes")} on ${plural(found.images, "image")}, from ${named(found.format)}.`,
        ),
        found.classes.length ? h("p", { dir: "auto" }, `Classes: ${found.classes.join(", ")}`) : null,
        found.unknown_images
          ? h("p.warn", {}, `${count(found.unknown_images)} images of the file are not in this project.`)
          : null,
        found.problems.length
          ? h(
              "div",
              {},
              h(
                "p.warn",
                {},
                `${plural(found.problems.length, "problem")}${this.skipBad.checked ? ", left out" : ": nothing is imported unless what is wrong is left out"}.`,
              ),
              notes(found.problems),
            )
          : null,
        notes(found.notes),
      );
    } catch (error) {
      complain(this.importForm, error);
    }
  }
}

const notes = (lines) =>
  lines.length
    ? h(
        "ul.notes",
        {},
        lines.slice(0, 30).map((line) => h("li", { dir: "auto" }, line)),
        lines.length > 30 ? h("li", {}, `and ${lines.length - 30} more`) : null,
      )
    : null;
