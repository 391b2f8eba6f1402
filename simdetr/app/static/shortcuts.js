// The keys of the editor: one table, for what they do and for the list that `?` shows.

import { dialog, h, button } from "./elements.js";

// [keys as shown, action, words]; the action's name is what label.js does. Letters are matched by what they type.
export const GROUPS = [
  [
    "Boxes",
    [
      ["n", "next-box", "Next box (also Tab)"],
      ["p", "previous-box", "Previous box (also Shift Tab)"],
      ["a", "accept", "Accept the selected proposal, select the next"],
      ["Shift+A", "accept-all", "Accept all proposals that are shown"],
      ["r", "reject", "Reject the box, select the next proposal"],
      ["Delete", "remove", "Remove the box"],
      ["1–9", "class", "Accept the proposal as this class, select the next; else class of the box, or of the next one drawn"],
      ["c", "find-class", "Find a class by name, as its digit would; or add one for the next box drawn"],
      ["i", "ignore", "A region to ignore, or no more"],
      ["b", "draw", "A new box in the middle of the view"],
      ["Arrows", "move", "Move by 1 px, with Shift by 10"],
      ["Alt+Arrows", "resize", "Resize by 1 px, with Shift by 10"],
      ["Escape", "escape", "End the drag, or select nothing"],
      ["Shift+drag", null, "Draw a box, also within the selected one"],
    ],
  ],
  [
    "Images",
    [
      ["Enter", "inspected", "Accept what is shown, save as inspected, next image (also Space)"],
      ["s", "skip", "Skip, next image"],
      ["[", "back", "The image before"],
      ["d", "detect", "Detect on this image"],
      ["Ctrl+Z", "undo", "Undo, without end"],
      ["Ctrl+Shift+Z", "redo", "Redo (also Ctrl Y)"],
    ],
  ],
  [
    "View",
    [
      ["+", "zoom-in", "Zoom in"],
      ["-", "zoom-out", "Zoom out"],
      ["0", "fit", "Fit the image"],
      ["Wheel", null, "Zoom at the pointer; pinch on touch screens"],
      ["Space+drag", null, "Pan; also the middle button"],
      ["?", "keys", "This list"],
    ],
  ],
];

const ACTIONS = new Map(
  GROUPS.flatMap(([, rows]) => rows)
    .filter(([, action]) => action)
    .map(([key, action]) => [key.toLowerCase(), action]),
);
const OTHERS = { backspace: "remove", "ctrl+y": "redo", "=": "zoom-in", "/": "keys" };
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const parts = (key) => (key === "+" ? [key] : key.split("+"));

// What a key asks for: {action, by} or {action, digit}; null if nothing.
export function actionOf(event) {
  const arrow = ARROWS[event.key];
  if (arrow && !event.ctrlKey && !event.metaKey) {
    const step = event.shiftKey ? 10 : 1;
    return { action: event.altKey ? "resize" : "move", by: arrow.map((one) => one * step) };
  }
  if (event.altKey) return null;
  const control = event.ctrlKey || event.metaKey;
  if (!control && /^[1-9]$/.test(event.key)) return { action: "class", digit: event.key };
  const key = event.key === "+" ? "+" : event.key.toLowerCase();
  const letter = /^[a-z]$/.test(key);
  const name = `${control ? "ctrl+" : ""}${event.shiftKey && letter ? "shift+" : ""}${key}`;
  const action = ACTIONS.get(name) ?? OTHERS[name];
  return action ? { action } : null;
}

export function showKeys() {
  if (document.querySelector("[data-testid=keys]")) return null;
  return dialog(
    "Keys",
    (close) =>
      h(
        "div",
        {},
        h(
          "div.keys",
          {},
          GROUPS.map(([title, rows]) =>
            h(
              "section",
              {},
              h("h3", {}, title),
              h(
                "dl",
                {},
                rows.map(([key, , words]) =>
                  h(
                    "div",
                    {},
                    h(
                      "dt",
                      {},
                      parts(key).map((part, place) => [
                        place ? " " : "",
                        h("kbd", {}, part.length === 1 ? part.toUpperCase() : part),
                      ]),
                    ),
                    h("dd", {}, words),
                  ),
                ),
              ),
            ),
          ),
        ),
        h(
          "div.row.end",
          {},
          button("close-keys", "Close", () => close(null), { kind: "primary" }),
        ),
      ),
    { wide: true, testid: "keys" },
  );
}
