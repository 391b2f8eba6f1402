// What the Label screen is made of, beside its queue: the editor with its tools on the one hand, classes, boxes and colours
// on the other. The parts become fields of the screen, which works with them.

import { button, h, iconButton } from "./elements.js";

const LEGEND = [
  ["proposed", "Proposed"],
  ["inspected", "Accepted"],
  ["corrected", "Corrected"],
  ["manual", "Drawn"],
  ["rejected", "Rejected"],
];

export const SCORE_STEP = 0.05;

// The editor, tools above it, what is open and what comes next below.
export function middle(screen) {
  screen.zoom = h("output.zoom", { testid: "zoom", "aria-label": "Zoom" }, "100 %");
  screen.undo = iconButton("undo", "undo", "Undo (Ctrl Z)", () => screen.do("undo"), { disabled: true });
  screen.redo = iconButton("redo", "redo", "Redo (Ctrl Shift Z)", () => screen.do("redo"), { disabled: true });
  screen.model = h("select.model", { testid: "model", "aria-label": "Model that detects", hidden: true });
  screen.detectButton = button("detect", "Detect", () => screen.do("detect"), {
    icon: "detect",
    title: "Detect on this image (D)",
  });
  screen.scoreText = h("output", { testid: "min-score-text" }, screen.minScore.toFixed(2));
  screen.score = h("input", {
    type: "range",
    min: 0,
    max: 1,
    step: SCORE_STEP,
    value: screen.minScore,
    testid: "min-score",
    "aria-label": "Least score of the proposals that are shown",
    oninput: () => screen.setScore(Number(screen.score.value)),
  });
  screen.acceptAll = button("accept-all", "Accept all", () => screen.do("accept-all"), {
    title: "Accept all proposals that are shown (Shift A)",
  });
  screen.tools = h(
    "div.toolbar",
    { role: "toolbar", "aria-label": "Tools of the editor" },
    screen.undo,
    screen.redo,
    h("span.gap"),
    iconButton("zoom-out", "minus", "Zoom out (-)", () => screen.editor.zoomBy(1 / 1.25)),
    screen.zoom,
    iconButton("zoom-in", "plus", "Zoom in (+)", () => screen.editor.zoomBy(1.25)),
    iconButton("zoom-fit", "fit", "Fit (0)", () => screen.editor.fit()),
    h("span.gap"),
    screen.model,
    screen.detectButton,
    h("span.grow"),
    h(
      "span.score",
      { title: "Proposals below this score are hidden, and removed when the image is saved as inspected: nobody has judged them" },
      h("span.word", {}, "Score "),
      "≥ ",
      screen.score,
      screen.scoreText,
    ),
    screen.acceptAll,
  );
  screen.notice = h("div.notice", { testid: "notice", hidden: true });
  screen.onlyHidden = h("div.only-hidden", { testid: "only-hidden", role: "status", hidden: true });
  screen.cover = h("div.cover", { testid: "cover" }, h("p.muted", {}, "Loading…"));
  screen.name = h("span.image-name", { testid: "image-name", dir: "auto" });
  screen.facts = h("span.muted", { testid: "image-facts" });
  screen.saved = h("span.saved", { testid: "save-state", role: "status" }, "Saved");
  screen.foot = h(
    "div.foot",
    {},
    iconButton("previous-image", "previous", "The image before ([)", () => screen.do("back")),
    h("span.image", {}, screen.name, screen.facts),
    screen.saved,
    button("skip", "Skip", () => screen.do("skip"), { key: "S" }),
    button("inspected", "Inspected, next", () => screen.do("inspected"), { kind: "primary", key: "↵" }),
  );
  return h(
    "section.middle",
    { "aria-label": "Editor" },
    screen.tools,
    screen.notice,
    screen.onlyHidden,
    h("div.canvas", {}, screen.editor, screen.cover),
    screen.foot,
  );
}

// The classes, the list of boxes, the legend of colours.
export function right(screen) {
  screen.boxCount = h("h2", { testid: "box-count" }, "Boxes");
  screen.boxList = h("ol.box-list", { testid: "box-list", "aria-label": "List of boxes" });
  screen.miningNote = h("p.note", { testid: "mining-note", hidden: true });
  screen.hiddenNote = h("p.note", { testid: "hidden-note" });
  screen.shots = h(
    "div.row.shot-row",
    {},
    button("add-shot", "Use as shot", () => screen.shot(false), {
      kind: "quiet",
      title: "The selected box is an example of its class for few-shot labelling",
    }),
    button("add-negative", "Negative shot", () => screen.shot(true), {
      kind: "quiet",
      title: "The selected box looks like its class and is none",
    }),
  );
  const colours = h(
    "select",
    {
      testid: "colour-by",
      "aria-label": "Colours by",
      onchange: () => {
        screen.editor.dataset.colours = colours.value;
      },
    },
    h("option", { value: "status" }, "by status"),
    h("option", { value: "class" }, "by class"),
  );
  return h(
    "aside.right",
    { "aria-label": "Classes and boxes" },
    screen.picker.element,
    h(
      "section.panel.fill",
      { "aria-label": "Boxes" },
      screen.boxCount,
      screen.boxList,
      screen.hiddenNote,
      screen.miningNote,
      screen.shots,
    ),
    h(
      "section.panel.legend-panel",
      { "aria-label": "Legend" },
      h("div.panel-title", {}, h("h2", {}, "Colours"), colours),
      h(
        "ul.box-legend",
        { testid: "legend" },
        LEGEND.map(([name, text]) => h("li", {}, h(`i.swatch.${name}`), text)),
      ),
    ),
  );
}
