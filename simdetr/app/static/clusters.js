// Clusters: what the pretraining took to be kinds of things; people name, merge and part them.

import { address, get, post, send } from "./api.js";
import { pickCrops } from "./crops.js";
import { button, complain, empty, h, iconButton, put, toast } from "./elements.js";
import { plural } from "./numbers.js";

// What a cluster is called where it stands beside others.
export const titleOf = (one) =>
  one.name ?? (one.members.length ? `pseudo-class ${one.members.join(", ")}` : `picked crops ${one.id}`);

export class ClustersScreen {
  #clusters = [];
  #chosen = new Set();
  #turn = 0;

  constructor(app) {
    this.app = app;
    this.project = app.project;
    this.merge = button(
      "merge",
      "Merge the chosen",
      () => this.#act(() => post("/clusters/merge", { cluster_ids: [...this.#chosen] })),
      { disabled: true },
    );
    this.propose = button("propose", "Propose boxes of named clusters", () => this.#propose(), {
      kind: "primary",
      disabled: true,
    });
    this.undo = iconButton("undo-clusters", "undo", "Undo", () => this.#travel("undo"), { disabled: true });
    this.redo = iconButton("redo-clusters", "redo", "Redo", () => this.#travel("redo"), { disabled: true });
    this.trouble = h("div");
    this.grid = h("ul.clusters", { testid: "clusters" });
    this.element = h(
      "div.page",
      { testid: "screen-clusters" },
      h(
        "div.page-head",
        {},
        h(
          "div",
          {},
          h("h1", {}, "Clusters"),
          h(
            "p.muted",
            {},
            "Regions that look alike. Name a cluster to make its boxes proposals of a class; merge those " +
              "that are one kind, and pick the crops that are another.",
          ),
        ),
        h("div.row", {}, this.undo, this.redo, this.merge, this.propose),
      ),
      this.trouble,
      this.grid,
    );
  }

  async start() {
    try {
      this.#take(await get(`/projects/${this.project.id}/clusters`));
    } catch (error) {
      complain(this.trouble, error);
    }
  }

  #take({ clusters, can_undo, can_redo }) {
    this.#clusters = clusters;
    this.undo.disabled = !can_undo;
    this.redo.disabled = !can_redo;
    this.#paint();
  }

  async #travel(what) {
    complain(this.trouble, null);
    try {
      this.#take(await post(`/projects/${this.project.id}/clusters/${what}`));
    } catch (error) {
      complain(this.trouble, error);
    }
  }

  #paint() {
    const turn = ++this.#turn;
    this.#chosen = new Set([...this.#chosen].filter((id) => this.#clusters.some((one) => one.id === id)));
    this.merge.disabled = this.#chosen.size < 2;
    this.propose.disabled = !this.#clusters.some((one) => one.name);
    put(
      this.grid,
      this.#clusters.map((one) => this.#card(one, turn)),
    );
    if (!this.#clusters.length) {
      put(
        this.grid,
        h(
          "li",
          {},
          empty(
            "No clusters here",
            "They come with a pretraining: end this server and start simdetr label again with --run and its folder. " +
              "The kinds that it told apart are then shown here.",
          ),
        ),
      );
    }
  }

  #card(one, turn) {
    const name = h("input", {
      value: one.name ?? "",
      placeholder: "Name this kind",
      dir: "auto",
      maxlength: 200,
      testid: "cluster-name",
      "aria-label": `Name of cluster ${one.id}`,
    });
    const chosen = h("input", {
      type: "checkbox",
      testid: "choose-cluster",
      "aria-label": `Choose cluster ${one.name ?? one.id}`,
      onchange: () => {
        if (chosen.checked) this.#chosen.add(one.id);
        else this.#chosen.delete(one.id);
        this.merge.disabled = this.#chosen.size < 2;
        card.classList.toggle("chosen", chosen.checked);
      },
    });
    chosen.checked = this.#chosen.has(one.id);
    const card = h(
      "li.card.cluster",
      { testid: "cluster" },
      h("img", {
        src: address(`/clusters/${one.id}/montage`, { rows: 2, columns: 5, turn }),
        alt: `Examples of cluster ${one.name ?? one.id}`,
        width: 400,
        height: 160,
        loading: "lazy",
      }),
      h(
        "form.row",
        {
          onsubmit: (event) => {
            event.preventDefault();
            this.#act(() => send("PATCH", `/clusters/${one.id}`, { name: name.value }), card);
          },
        },
        chosen,
        name,
        h("button.button", { testid: "name-cluster" }, "Name"),
      ),
      h("p.muted.contents", {}, `${plural(one.boxes, "box", "boxes")} · ${contents(one)}`),
      h(
        "div.row.end",
        {},
        one.members.length + Math.min(one.picked, 1) > 1 &&
          button("split", "Take apart again", () => this.#act(() => post(`/clusters/${one.id}/split`), card), {
            kind: "quiet",
          }),
        one.boxes > 1 && button("pick-crops", "Pick crops", () => this.#pick(one), { kind: "quiet" }),
      ),
    );
    return card;
  }

  async #pick(one) {
    await pickCrops(
      one,
      this.#clusters.filter((other) => other.id !== one.id),
      titleOf,
    );
    await this.start();
  }

  async #act(work, place = this.trouble) {
    complain(place, null);
    try {
      await work();
      this.#chosen.clear();
      await this.start();
    } catch (error) {
      complain(place, error);
    }
  }

  async #propose() {
    complain(this.trouble, null);
    try {
      const { boxes } = await post(`/projects/${this.project.id}/clusters/propose`);
      toast(`${plural(boxes, "proposal")} to inspect on the Label screen.`);
    } catch (error) {
      complain(this.trouble, error);
    }
  }
}

function contents({ members, picked }) {
  const own = members.length > 1 ? `${members.length} pseudo-classes` : members.length ? `pseudo-class ${members[0]}` : "";
  return [own, picked ? `${plural(picked, "crop")} moved here` : ""].filter(Boolean).join(", ");
}
