// Clusters: what the pretraining took to be kinds of things; people name, merge and split them.

import { address, get, post, send } from "./api.js";
import { button, complain, empty, h, put, toast } from "./elements.js";
import { plural } from "./numbers.js";

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
              "that are one kind.",
          ),
        ),
        h("div.row", {}, this.merge, this.propose),
      ),
      this.trouble,
      this.grid,
    );
  }

  async start() {
    try {
      this.#clusters = (await get(`/projects/${this.project.id}/clusters`)).clusters;
      this.#paint();
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
      h(
        "div.row.between",
        {},
        h(
          "span.muted",
          {},
          `${plural(one.boxes, "box", "boxes")} · ${one.members.length > 1 ? `${one.members.length} pseudo-classes` : `pseudo-class ${one.members[0] ?? one.id}`}`,
        ),
        one.members.length > 1 &&
          button("split", "Take apart again", () => this.#act(() => post(`/clusters/${one.id}/split`), card), {
            kind: "quiet",
          }),
      ),
    );
    return card;
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
