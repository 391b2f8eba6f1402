// All projects: how far they are; make, open, rename, delete.

import { ask, get, post, send } from "./api.js";
import { button, complain, dialog, empty, field, h, iconButton, put } from "./elements.js";
import { count, day, plural } from "./numbers.js";

export class ProjectsScreen {
  constructor(app) {
    this.app = app;
    this.list = h("ul.projects-list", { testid: "projects" });
    this.trouble = h("div", {});
    this.element = h(
      "div.page",
      { testid: "screen-projects" },
      h(
        "div.page-head",
        {},
        h(
          "div",
          {},
          h("h1", {}, "Projects"),
          h("p.muted", {}, "A project is a set of images with its classes, boxes and runs."),
        ),
        button("new-project", "New project", () => this.#new(), { icon: "plus", kind: "primary" }),
      ),
      this.trouble,
      this.list,
    );
  }

  start() {
    return this.#load();
  }

  leave() {
    clearTimeout(this.timer);
  }

  async #load() {
    clearTimeout(this.timer);
    try {
      const { projects } = await get("/projects");
      complain(this.trouble, null);
      put(
        this.list,
        projects.map((project) => this.#item(project)),
      );
      if (!projects.length) {
        put(
          this.list,
          h(
            "li",
            {},
            empty(
              "No project yet",
              "Make one for your images: of a folder that `simdetr label --images` was started with, or for uploads.",
              button("first-project", "New project", () => this.#new(), { kind: "primary", icon: "plus" }),
            ),
          ),
        );
      }
      if (projects.some((project) => project.indexing)) this.timer = setTimeout(() => this.#load(), 1000);
    } catch (error) {
      complain(this.trouble, error);
    }
  }

  #item(project) {
    const { inspected, proposed, skipped, unreadable } = project.by_status;
    const share = (number) => (project.images ? number / project.images : 0);
    const part = (name, number) => h(`span.part.${name}`, { style: { width: `${share(number) * 100}%` } });
    return h(
      "li.card.project",
      { testid: "project" },
      h(
        "a.project-open",
        { href: `#/p/${project.id}/label`, testid: "open-project" },
        h("h2", { dir: "auto" }, project.name),
        h("p.muted", { dir: "auto" }, project.folder || "uploads"),
      ),
      h(
        "div.project-bar",
        {},
        h(
          "div.parts",
          {
            role: "img",
            "aria-label":
              `${inspected} of ${project.images} images inspected, ${proposed} with ` + `proposals, ${skipped} skipped`,
          },
          part("inspected", inspected),
          part("proposed", proposed),
          part("skipped", skipped),
        ),
        h(
          "p.muted",
          {},
          `${count(inspected)} of ${plural(project.images, "image")} inspected`,
          proposed ? `, ${count(proposed)} with proposals` : "",
          unreadable ? `, ${count(unreadable)} unreadable` : "",
          project.indexing ? ", more are being listed" : "",
        ),
      ),
      h(
        "dl.facts",
        {},
        h("div", {}, h("dt", {}, "Boxes"), h("dd", {}, count(project.boxes))),
        h("div", {}, h("dt", {}, "Model"), h("dd", {}, project.active_model ?? "none yet")),
        h("div", {}, h("dt", {}, "Made"), h("dd", {}, day(project.created))),
      ),
      h(
        "div.project-actions",
        {},
        iconButton("edit-project", "edit", `Settings of ${project.name}`, () => this.#edit(project)),
        iconButton("delete-project", "remove", `Delete ${project.name}`, () => this.#delete(project)),
      ),
    );
  }

  async #new() {
    const made = await dialog("New project", (close) => {
      const name = h("input", { required: true, maxlength: 200, dir: "auto", testid: "project-new-name" });
      const folder = h("input", { maxlength: 1000, placeholder: "e.g. north/", testid: "project-folder" });
      const kind = h(
        "select",
        {
          testid: "project-kind",
          onchange: () => {
            where.hidden = kind.value !== "folder";
          },
        },
        h("option", { value: "upload" }, "Images that I upload"),
        h("option", { value: "folder" }, "A folder on this machine"),
      );
      const where = field(
        "Folder",
        folder,
        "Below the folder that `simdetr label --images` was started with. The images stay there and are only read.",
      );
      where.hidden = true;
      const form = h(
        "form",
        {
          onsubmit: async (event) => {
            event.preventDefault();
            try {
              close(
                await post("/projects", {
                  name: name.value,
                  ...(kind.value === "folder" ? { folder: folder.value || "." } : {}),
                }),
              );
            } catch (error) {
              complain(form, error);
            }
          },
        },
        field("Name", name),
        field("Images", kind),
        where,
        h(
          "div.row.end",
          {},
          button("cancel", "Cancel", () => close(null)),
          h("button.button.primary", { testid: "create-project" }, "Create"),
        ),
      );
      return form;
    });
    if (made) location.hash = `#/p/${made.id}/label`;
  }

  async #edit(project) {
    await dialog("Settings", (close) => {
      const name = h("input", {
        value: project.name,
        required: true,
        maxlength: 200,
        dir: "auto",
        testid: "project-rename",
      });
      const rejected = h(
        "select",
        { testid: "rejected-as" },
        h("option", { value: "ignore" }, "is ignored: neither object nor background"),
        h("option", { value: "background" }, "is background"),
      );
      rejected.value = project.rejected_as;
      const form = h(
        "form",
        {
          onsubmit: async (event) => {
            event.preventDefault();
            try {
              await send("PATCH", `/projects/${project.id}`, { name: name.value, rejected_as: rejected.value });
              close(true);
            } catch (error) {
              complain(form, error);
            }
          },
        },
        field("Name", name),
        field("In training a rejected box", rejected),
        h(
          "div.row.end",
          {},
          button("cancel", "Cancel", () => close(null)),
          h("button.button.primary", { testid: "save-project" }, "Save"),
        ),
      );
      return form;
    });
    this.#load();
  }

  async #delete(project) {
    await dialog(`Delete this project?`, (close) => {
      const name = h("input", {
        dir: "auto",
        autocomplete: "off",
        testid: "confirm-name",
        oninput: () => {
          go.disabled = name.value !== project.name;
        },
      });
      const go = h("button.button.danger", { testid: "confirm-delete", disabled: true }, "Delete");
      const form = h(
        "form",
        {
          onsubmit: async (event) => {
            event.preventDefault();
            try {
              await ask("DELETE", `/projects/${project.id}`, { query: { confirm: name.value } });
              close(true);
            } catch (error) {
              complain(form, error);
            }
          },
        },
        h(
          "p",
          {},
          `Its ${plural(project.boxes, "box", "boxes")} and runs go for good. Images of a folder stay ` +
            `where they are; uploads are deleted.`,
        ),
        field(`Type “${project.name}” to confirm`, name),
        h(
          "div.row.end",
          {},
          button("cancel", "Cancel", () => close(null)),
          go,
        ),
      );
      return form;
    });
    this.#load();
  }
}
