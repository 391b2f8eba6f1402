// The classes beside the editor: pick one by click, digit or name; add, rename, colour and delete them.

import { ApiError, get, post, send } from "./api.js";
import { button, complain, dialog, field, h, iconButton, put } from "./elements.js";
import { count, plural } from "./numbers.js";

// Whether a class is that of boxes that nobody has named yet.
export const isUnnamed = (kind) => kind?.kind === "pseudo";

export class ClassPicker {
  #classes = [];
  #current = null;

  // `pick(id, {added, gone})`: a person chose a class, or one was just made by its name; null for none, or where one is
  // gone. `changed(classes)`: the classes are others now; `minScore()`: proposals below it are not counted.
  constructor(projectId, { pick, changed, minScore }) {
    this.project = projectId;
    this.pick = pick;
    this.changed = changed;
    this.minScore = minScore;
    this.list = h("ul.classes", { testid: "classes", "aria-label": "Classes" });
    this.input = h("input", {
      placeholder: "Find or add a class",
      testid: "class-input",
      dir: "auto",
      maxlength: 200,
      autocomplete: "off",
      "aria-label": "Find or add a class",
      oninput: () => this.#paint(),
      onkeydown: (event) => this.#key(event),
    });
    this.element = h(
      "section.panel",
      { "aria-label": "Class" },
      h("div.panel-title", {}, h("h2", {}, "Classes"), h("kbd", {}, "C")),
      this.input,
      this.list,
    );
  }

  async load() {
    this.#take((await get(`/projects/${this.project}/classes`, { min_score: this.minScore() })).classes);
  }

  // A class that stands for "no name yet" comes last, has no digit, and is never the current one.
  #take(all) {
    const classes = [...all.filter((one) => !isUnnamed(one)), ...all.filter(isUnnamed)];
    this.#classes = classes;
    if (!this.#named().some((one) => one.id === this.#current)) this.#current = this.#named()[0]?.id ?? null;
    this.#paint();
    this.changed(classes);
  }

  #named() {
    return this.#classes.filter((one) => !isUnnamed(one));
  }

  get current() {
    return this.#current;
  }

  set current(id) {
    this.#current = id;
    this.#paint();
  }

  // The class of a digit: the one that has it as its shortcut, else the one at its place.
  byDigit(digit) {
    return this.#classes.find((one) => this.#digit(one) === digit)?.id ?? null;
  }

  #digit(kind) {
    if (kind.shortcut) return kind.shortcut;
    if (isUnnamed(kind)) return null;
    const taken = new Set(this.#classes.map((one) => one.shortcut).filter(Boolean));
    const free = [..."123456789"].filter((digit) => !taken.has(digit));
    return free[this.#named().filter((one) => !one.shortcut).indexOf(kind)] ?? null;
  }

  focus() {
    this.input.focus();
    this.input.select();
  }

  async #key(event) {
    if (event.isComposing) return; // an input method is at work: Enter is its own
    if (event.key === "Escape") {
      this.input.value = "";
      this.#paint();
      this.pick(null);
    }
    if (event.key !== "Enter") return;
    event.preventDefault();
    event.stopPropagation();
    const name = this.input.value.trim();
    if (!name) return;
    complain(this.element, null);
    const exact = this.#classes.find((one) => one.name === name);
    const isAdded = isUnnamed(exact) || !this.#whole(name);
    if (isUnnamed(exact)) {
      await send("PATCH", `/classes/${exact.id}`, { kind: "novel" }).catch((error) => complain(this.element, error));
      await this.load();
    }
    try {
      const chosen = this.#whole(name) ?? (await post(`/projects/${this.project}/classes`, { name }));
      this.input.value = "";
      if (isAdded) {
        this.#current = chosen.id;
        await this.load();
      }
      this.choose(chosen.id, { added: isAdded });
    } catch (error) {
      complain(this.element, error);
    }
  }

  choose(id, how) {
    this.current = id;
    this.pick(id, how);
  }

  // The class of this name; in other letters, capital or small, if none has it to the letter.
  #whole(name) {
    return (
      this.#classes.find((one) => one.name === name) ??
      this.#named().find((one) => one.name.toLowerCase() === name.toLowerCase())
    );
  }

  #found() {
    const text = this.input.value.trim().toLowerCase();
    return this.#classes.filter((one) => one.name.toLowerCase().includes(text));
  }

  #paint() {
    const found = this.#found();
    const typed = this.input.value.trim();
    put(
      this.list,
      found.map((one) =>
        h(
          "li",
          {},
          h(
            "button.class",
            {
              type: "button",
              testid: "class",
              "aria-pressed": String(one.id === this.#current),
              title: one.name,
              disabled: isUnnamed(one),
              onclick: () => this.choose(one.id),
            },
            h("i", { style: { background: one.colour } }),
            h("span.class-name", { dir: "auto" }, isUnnamed(one) ? "no name yet" : one.name),
            h("span.muted", {}, count(one.boxes)),
            this.#digit(one) && h("kbd", {}, this.#digit(one)),
          ),
          iconButton("edit-class", "edit", `Edit class ${one.name}`, () => this.#edit(one)),
        ),
      ),
      !found.length && typed ? h("li.note", {}, "Enter adds ", h("b", { dir: "auto" }, typed)) : null,
      !this.#named().length && !typed ? h("li.note", {}, "No class yet: type a name above and press Enter.") : null,
    );
  }

  async #edit(shown) {
    // with all of its boxes, also those that are not shown
    const { classes } = await get(`/projects/${this.project}/classes`).catch(() => ({ classes: [] }));
    const kind = classes.find((one) => one.id === shown.id) ?? shown;
    return dialog("Edit class", (close) => {
      const name = h("input", { value: kind.name, dir: "auto", maxlength: 200, testid: "class-name" });
      const colour = h("input", { type: "color", value: kind.colour, testid: "class-colour" });
      const key = h(
        "select",
        { testid: "class-shortcut", value: "" },
        h("option", { value: "" }, "By place"),
        [..."123456789"].map((digit) => h("option", {}, digit)),
      );
      key.value = kind.shortcut ?? "";
      const others = this.#classes.filter((one) => one.id !== kind.id);
      const target = h(
        "select",
        { dir: "auto", testid: "class-target" },
        h("option", { value: "" }, "Reject its boxes"),
        others.map((one) => h("option", { value: one.id }, `Make them ${one.name}`)),
      );
      const removal = h(
        "fieldset",
        {},
        h("legend", {}, "Delete"),
        kind.boxes ? field(`What becomes of its ${plural(kind.boxes, "box", "boxes")}`, target) : null,
      );
      const form = h(
        "form",
        {
          onsubmit: async (event) => {
            event.preventDefault();
            try {
              await send("PATCH", `/classes/${kind.id}`, {
                name: name.value,
                colour: colour.value,
                shortcut: key.value || null,
              });
              await this.load();
              close(true);
            } catch (error) {
              complain(form, error);
            }
          },
        },
        field("Name", name),
        h("div.columns", {}, field("Colour", colour), field("Key", key)),
        removal,
        h(
          "div.row.end",
          {},
          button("cancel", "Cancel", () => close(null)),
          h("button.button.primary", { testid: "save-class" }, "Save"),
        ),
      );
      removal.append(
        button(
          "delete-class",
          "Delete class",
          async () => {
            try {
              const query = target.value ? `?target=${target.value}` : kind.boxes ? "?reject=true" : "";
              await send("DELETE", `/classes/${kind.id}${query}`);
              await this.load();
              close("deleted");
            } catch (error) {
              complain(removal, error instanceof ApiError ? error : new Error("The class could not be deleted."));
            }
          },
          { kind: "danger" },
        ),
      );
      return form;
    }).then((done) => {
      if (done === "deleted") this.pick(null, { gone: true });
    });
  }
}
