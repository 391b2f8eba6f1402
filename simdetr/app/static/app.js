// The frame of the page: header, routes in the address (#/p/PROJECT/SCREEN/ITEM), banner.

import { author, get } from "./api.js";
import { ClustersScreen } from "./clusters.js";
import { button, dialog, empty, field, h, iconButton, put } from "./elements.js";
import { ExchangeScreen } from "./exchange.js";
import { FewShotScreen } from "./fewshot.js";
import { LabelScreen } from "./label.js";
import { percent } from "./numbers.js";
import { ProgressScreen } from "./progress.js";
import { ProjectsScreen } from "./projects.js";
import { ResultsScreen } from "./results.js";
import { KINDS, RunWatch } from "./runs.js";
import { showKeys } from "./shortcuts.js";
import { StopScreen } from "./stop.js";
import { TrainScreen } from "./train.js";

const SCREENS = {
  label: ["Label", LabelScreen],
  fewshot: ["Few-shot", FewShotScreen],
  clusters: ["Clusters", ClustersScreen],
  train: ["Train", TrainScreen],
  progress: ["Progress", ProgressScreen],
  results: ["Results", ResultsScreen],
  stop: ["Stop?", StopScreen],
  export: ["Export, import", ExchangeScreen],
};

class App {
  project = null;
  #screen = null;
  #name = null;
  #turn = 0;

  constructor() {
    this.main = document.getElementById("main");
    this.header = document.getElementById("header");
    this.bannerPlace = document.getElementById("banner");
    this.runs = new RunWatch();
    this.runs.addEventListener("runs", () => this.#pill());
    window.addEventListener("hashchange", () => this.route());
    document.addEventListener("keydown", (event) => {
      const writing = event.target.closest?.("input, textarea, select");
      if (event.key === "?" && !writing && this.#name !== "label") {
        event.preventDefault();
        showKeys();
      }
    });
    this.#frame();
  }

  // ------------------------------------------------------------------------------------------------- routes

  async route() {
    const [, project, name = "label", argument = ""] =
      location.hash.match(/^#\/p\/(\d+)(?:\/([a-z]+))?(?:\/(.+))?$/) ?? [];
    const turn = ++this.#turn;
    const same = project ? Number(project) === this.project?.id && name === this.#name : this.#name === "projects";
    if (same && this.#screen) {
      this.#screen.update?.(argument);
      return;
    }
    await this.#screen?.leave?.();
    this.#screen = null;
    if (turn !== this.#turn) return;
    this.banner(null);
    document.querySelectorAll("dialog[open]").forEach((one) => one.close());
    try {
      if (!project || !SCREENS[name]) {
        this.project = null;
        this.runs.stop();
        this.#show("projects", new ProjectsScreen(this), "");
        return;
      }
      if (this.project?.id !== Number(project)) {
        this.project = await get(`/projects/${project}`);
        this.runs.follow(this.project.id);
      }
      if (turn === this.#turn) this.#show(name, new SCREENS[name][1](this), argument);
    } catch (error) {
      this.#name = null;
      this.project = null;
      this.#frame();
      put(
        this.main,
        empty(
          error.status === 404 ? "There is no such project" : "The page could not be shown",
          error.message,
          h("a.button.primary", { href: "#/", testid: "to-projects" }, "Projects"),
          button("retry", "Try again", () => this.route()),
        ),
      );
    }
  }

  #show(name, screen, argument) {
    this.#screen = screen;
    this.#name = name;
    this.main.dataset.screen = name;
    this.#frame();
    put(this.main, screen.element);
    document.title = `${name === "projects" ? "Projects" : `${SCREENS[name][0]} · ${this.project.name}`} · simdetr`;
    screen.start?.(argument);
  }

  go(screen, argument) {
    location.hash = `#/p/${this.project.id}/${screen}${argument ? `/${argument}` : ""}`;
  }

  // The address of what is shown, without showing it anew.
  address(place) {
    const hash = `#/p/${this.project.id}/${place}`;
    if (location.hash === hash) return;
    const first = /^#\/p\/\d+(\/[a-z]+)?$/.test(location.hash);
    history[first ? "replaceState" : "pushState"](null, "", hash);
  }

  async refresh() {
    const project = await get(`/projects/${this.project.id}`);
    if (this.project?.id === project.id) this.project = project;
    return project;
  }

  // ------------------------------------------------------------------------------------------------- frame

  #frame() {
    const { project } = this;
    this.pill = h("a.pill", { testid: "run-pill", hidden: true });
    const who = author();
    put(
      this.header,
      h(
        "a.brand",
        { href: "#/", testid: "home", "aria-label": "simdetr: projects" },
        h("img", { src: "/static/icon.svg", alt: "", width: 22, height: 22 }),
        h("span", {}, "simdetr"),
      ),
      project &&
        h(
          "a.project-name",
          { href: "#/", testid: "project-name", dir: "auto", title: `${project.name}: all projects` },
          project.name,
        ),
      project
        ? h(
            "nav",
            { "aria-label": "Screens" },
            Object.entries(SCREENS).map(([name, [title]]) =>
              h(
                "a.tab",
                {
                  href: `#/p/${project.id}/${name}`,
                  testid: `tab-${name}`,
                  "data-title": title,
                  "aria-current": name === this.#name ? "page" : null,
                },
                title,
              ),
            ),
          )
        : h("span.grow"),
      this.pill,
      h(
        "button.icon-button.who",
        {
          type: "button",
          testid: "author",
          title: "Who labels",
          "aria-label": who ? `Who labels: ${who}` : "Who labels",
          onclick: () => this.#askAuthor(),
        },
        who ? h("span", { dir: "auto" }, [...who][0].toUpperCase()) : iconOf("person"),
      ),
      iconButton("theme", dark() ? "sun" : "moon", dark() ? "Light colours" : "Dark colours", () =>
        this.#switchTheme(),
      ),
      h(
        "button.icon-button",
        { type: "button", testid: "help", title: "Keys (?)", "aria-label": "Keys", onclick: () => showKeys() },
        "?",
      ),
    );
    this.#pill();
  }

  #pill() {
    const run = this.runs.active;
    this.pill.hidden = !run || this.#name === "progress";
    if (!run) return;
    this.pill.href = `#/p/${this.project?.id}/progress/${run.id}`;
    put(this.pill, h("i"), `${KINDS[run.kind]} ${run.state === "running" ? percent(run.progress) : "queued"}`);
  }

  #switchTheme() {
    const next = dark() ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    localStorage.setItem("simdetr.theme", next);
    this.#frame();
    this.header.querySelector("[data-testid=theme]").focus();
  }

  async #askAuthor() {
    const name = await dialog("Who labels?", (close) => {
      const input = h("input", { value: author(), dir: "auto", maxlength: 100, testid: "author-name" });
      return h(
        "form",
        {
          onsubmit: (event) => {
            event.preventDefault();
            close(input.value.trim());
          },
        },
        field("Name", input, "Kept with every box that you draw, accept or correct. It stays in this browser."),
        h(
          "div.row.end",
          {},
          button("cancel", "Cancel", () => close(null)),
          h("button.button.primary", { testid: "save-author" }, "Save"),
        ),
      );
    });
    if (name === null) return;
    localStorage.setItem("simdetr.author", name);
    this.#frame();
  }

  // A line across the page about something that goes on; null takes it away.
  banner(text, ...actions) {
    this.bannerPlace.hidden = !text;
    const words = this.bannerPlace.querySelector("p");
    if (text && words?.textContent === text) return;
    put(this.bannerPlace, text && h("p", {}, text), text && actions);
  }
}

const dark = () => {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

const iconOf = (name) => iconButton("", name, "", null).firstChild;

new App().route();
