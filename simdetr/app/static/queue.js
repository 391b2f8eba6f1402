// The list of images beside the editor: the queue by priority, or the images that a filter leaves.

import { address, get } from "./api.js";
import { button, h, put, status } from "./elements.js";
import { count, plural } from "./numbers.js";

const VIEWS = [
  ["queue", "To do, by priority"],
  ["", "All images"],
  ["proposed", "With proposals"],
  ["new", "New"],
  ["in_inspection", "Open"],
  ["inspected", "Inspected"],
  ["skipped", "Skipped"],
  ["unreadable", "Unreadable"],
];
const SOURCES = [
  ["", "Any source"],
  ["user", "Drawn"],
  ["detector", "Detector"],
  ["lvc", "Few-shot"],
  ["wsol", "Localised"],
  ["import", "Imported"],
  ["mined", "Mined"],
];
const PAGE = 40;
const END = 11; // letters of a name that are never cut

const options = (rows) => rows.map(([value, text]) => h("option", { value }, text));

// Names that begin alike are told apart by their ends: where there is no room for all of one, its head is cut.
const cutInTheMiddle = (name) => {
  const letters = [...name];
  const tail = Math.min(END, Math.floor(letters.length / 2));
  return [
    h("span.name-head", {}, letters.slice(0, letters.length - tail).join("")),
    h("span.name-tail", {}, letters.slice(letters.length - tail).join("")),
  ];
};

export class Queue {
  #images = [];
  #next = null;
  #asked = 0;
  #current = null;
  #order = "";

  // `open(id)` shows an image; proposals below `minScore()` are not counted.
  constructor(project, { open, minScore }) {
    this.project = project;
    this.open = open;
    this.minScore = minScore;
    this.view = h(
      "select",
      { testid: "filter-status", "aria-label": "Which images", onchange: () => this.load() },
      options(VIEWS),
    );
    this.source = h(
      "select",
      { testid: "filter-source", "aria-label": "Source of boxes", onchange: () => this.load() },
      options(SOURCES),
    );
    this.kind = h("select", {
      testid: "filter-class",
      "aria-label": "Class of boxes",
      dir: "auto",
      onchange: () => this.load(),
    });
    this.search = h("input", {
      type: "search",
      placeholder: "Name contains…",
      testid: "filter-search",
      "aria-label": "Name contains",
      oninput: () => {
        clearTimeout(this.typing);
        this.typing = setTimeout(() => this.load(), 250);
      },
    });
    this.more = h(
      "details.filters",
      { testid: "filters" },
      h("summary", {}, "Filter"),
      this.search,
      this.kind,
      this.source,
    );
    this.list = h("ol.queue", { testid: "queue", "aria-label": "Images" });
    this.note = h("p.note", { testid: "queue-note" });
    this.bar = h("progress", { max: 1, value: 0, "aria-label": "Images inspected" });
    this.done = h("p.done", { testid: "inspected-count" });
    this.element = h(
      "aside.left",
      { "aria-label": "Queue" },
      h("div.panel-head", {}, this.done, this.bar, this.view, this.more),
      this.list,
      this.note,
    );
    this.classes = [];
  }

  set classes(classes) {
    const chosen = this.kind.value;
    put(this.kind, options([["", "Any class"], ...classes.map((one) => [one.id, one.name])]));
    this.kind.value = chosen;
  }

  get isQueue() {
    return this.view.value === "queue" && !this.#filtered();
  }

  get images() {
    return this.#images;
  }

  #filtered() {
    return Boolean(this.search.value || this.kind.value || this.source.value);
  }

  async load() {
    const asked = ++this.#asked;
    this.#next = null;
    if (this.isQueue) {
      const found = await get(`/projects/${this.project.id}/queue`, { limit: PAGE, min_score: this.minScore() });
      if (asked !== this.#asked) return;
      this.#images = found.images;
      this.#order = found.order ? `Ordered by “${found.order.strategy}”.` : "Not ordered yet: by name.";
      this.#left(found.left);
    } else {
      const found = await this.#page(null);
      if (asked !== this.#asked) return;
      this.#images = found.images;
      this.#next = found.next;
      this.note.textContent = found.images.length ? "" : "No image is like that. Change the filter above.";
    }
    this.#paint();
  }

  // What was found meanwhile on the images of the list; their order stays.
  async refresh() {
    const asked = this.#asked;
    const found = this.isQueue
      ? await get(`/projects/${this.project.id}/queue`, { limit: PAGE, min_score: this.minScore() })
      : await this.#page(null);
    if (asked !== this.#asked) return;
    for (const image of found.images) if (image.id !== this.#current) this.mark(image);
  }

  #left(images) {
    this.note.textContent = images ? `${count(images)} to do. ${this.#order}` : "";
  }

  #page(after) {
    const wanted = this.view.value === "queue" ? ["new", "proposed", "in_inspection"] : this.view.value || null;
    return get(`/projects/${this.project.id}/images`, {
      status: wanted,
      class_id: this.kind.value || null,
      source: this.source.value || null,
      search: this.search.value.trim() || null,
      min_score: this.minScore(),
      limit: PAGE,
      after,
    });
  }

  async #append() {
    const found = await this.#page(this.#next);
    this.#images.push(...found.images);
    this.#next = found.next;
    this.#paint();
  }

  progress(project) {
    const { inspected, skipped } = project.by_status;
    const left = project.by_status.new + project.by_status.proposed + project.by_status.in_inspection;
    if (this.isQueue && this.#order) this.#left(left);
    this.bar.value = project.images ? inspected / project.images : 0;
    put(
      this.done,
      h("b", {}, count(inspected)),
      ` of ${plural(project.images, "image")} inspected`,
      skipped ? `, ${count(skipped)} skipped` : "",
    );
  }

  // The image after or before this one in the list; null at its end.
  beside(id, by) {
    const place = this.#images.findIndex((image) => image.id === id);
    return this.#images[place + by] ?? null;
  }

  mark(image) {
    const place = this.#images.findIndex((one) => one.id === image.id);
    if (place >= 0) {
      this.#images[place] = image;
      this.list.children[place]?.replaceWith(this.#item(image));
    }
  }

  // Show which image is open; one that is not in the list comes to its top.
  current(image) {
    const before = this.#current;
    this.#current = image.id;
    if (!this.#images.some((one) => one.id === image.id)) {
      this.#images.unshift(image);
      this.list.prepend(this.#item(image));
    } else this.mark(image);
    const old = this.#images.findIndex((one) => one.id === before);
    if (before !== image.id && old >= 0) this.list.children[old]?.replaceWith(this.#item(this.#images[old]));
    this.list.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  }

  #paint() {
    put(
      this.list,
      this.#images.map((image) => this.#item(image)),
      this.#next &&
        h(
          "li",
          {},
          button("load-more", "More", () => this.#append(), { kind: "quiet" }),
        ),
    );
  }

  #item(image) {
    const boxes = Object.entries(image.counts).reduce(
      (sum, [name, number]) => sum + (name === "rejected" ? 0 : number),
      0,
    );
    return h(
      "li",
      {},
      h(
        "button.queue-item",
        {
          type: "button",
          testid: "queue-item",
          "data-image": image.id,
          title: [image.name, image.reason].filter(Boolean).join(": "),
          "aria-current": image.id === this.#current ? "true" : null,
          onclick: () => this.open(image.id),
        },
        h("img", {
          src: address(`/images/${image.id}/thumbnail`, { size: 128 }),
          alt: "",
          loading: "lazy",
          width: 64,
          height: 48,
        }),
        h(
          "span.queue-text",
          {},
          h("span.queue-name", { dir: "auto" }, cutInTheMiddle(image.name)),
          h(
            "span.queue-line",
            {},
            status(image.status),
            boxes ? h("span", {}, plural(boxes, "box", "boxes")) : null,
          ),
          h("span.queue-reason", { dir: "auto" }, image.reason ?? ""),
        ),
      ),
    );
  }
}
