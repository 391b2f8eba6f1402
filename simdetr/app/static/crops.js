// The crops of a cluster in a dialog: those that are another kind are chosen and moved.

import { address, get, post } from "./api.js";
import { button, complain, dialog, h, put, toast } from "./elements.js";
import { plural } from "./numbers.js";

const PAGE = 60;
const SIZE_PX = 96;

// `others`: clusters that crops may go to; `titleOf(cluster)` names one. Resolves when the dialog is closed.
export function pickCrops(cluster, others, titleOf) {
  const chosen = new Set();
  let rows = [];
  let last = null; // place of the last click, for a range

  const grid = h("ul.crops", { testid: "crops", "aria-label": "Crops" });
  const more = button("more-crops", "More", () => load(), { kind: "quiet" });
  const target = h(
    "select",
    { testid: "crop-target", "aria-label": "Where the chosen crops go" },
    h("option", { value: "" }, "a new pseudo-class"),
    others.map((one) => h("option", { value: one.id }, titleOf(one))),
  );
  const go = button("move-crops", "Move", () => move(), { kind: "primary", disabled: true });
  const trouble = h("div");

  const paint = () => {
    go.disabled = !chosen.size;
    go.lastChild.textContent = chosen.size ? `Move ${plural(chosen.size, "crop")}` : "Move";
    rows.forEach((row, place) => {
      grid.children[place].firstChild.setAttribute("aria-pressed", String(chosen.has(row)));
    });
  };

  const toggle = (place, range) => {
    const from = range && last !== null ? Math.min(last, place) : place;
    const to = range && last !== null ? Math.max(last, place) : place;
    const on = !chosen.has(rows[place]);
    for (const row of rows.slice(from, to + 1)) {
      if (on) chosen.add(row);
      else chosen.delete(row);
    }
    last = place;
    paint();
  };

  const load = async () => {
    complain(trouble, null);
    try {
      const { crops, next } = await get(`/clusters/${cluster.id}/crops`, { limit: PAGE, after: rows.length });
      const start = rows.length;
      rows = [...rows, ...crops.map((one) => one.row)];
      grid.append(
        ...crops.map((one, place) =>
          h(
            "li",
            {},
            h(
              "button.crop",
              {
                type: "button",
                testid: "crop",
                title: one.image,
                "aria-label": `Crop ${start + place + 1} of ${one.image}`,
                "aria-pressed": "false",
                onclick: (event) => toggle(start + place, event.shiftKey),
              },
              h("img", {
                src: address(`/clusters/${cluster.id}/crops/${one.row}`, { size: SIZE_PX }),
                alt: "",
                loading: "lazy",
                width: SIZE_PX,
                height: SIZE_PX,
              }),
            ),
          ),
        ),
      );
      more.hidden = next === null;
    } catch (error) {
      complain(trouble, error);
    }
  };

  const move = async () => {
    complain(trouble, null);
    go.disabled = true;
    try {
      const wish = { rows: [...chosen], ...(target.value ? { target: Number(target.value) } : {}) };
      const there = await post(`/clusters/${cluster.id}/move`, wish);
      toast(`${plural(chosen.size, "crop")} moved to ${titleOf(there)}.`);
      if (!target.value) {
        // further ones of this kind go there too
        target.append(h("option", { value: there.id }, titleOf(there)));
        target.value = there.id;
      }
      chosen.clear();
      rows = [];
      last = null;
      put(grid);
      await load();
      paint();
    } catch (error) {
      complain(trouble, error);
      paint();
    }
  };

  load();
  return dialog(
    `Crops of ${titleOf(cluster)}`,
    (close) =>
      h(
        "div",
        {},
        h("p.muted", {}, "Choose the crops that are another kind, with Shift a whole range, and move them."),
        grid,
        more,
        trouble,
        h(
          "div.row.end",
          {},
          h("label.row", {}, "to ", target),
          go,
          button("close-crops", "Close", () => close(null)),
        ),
      ),
    { wide: true, testid: "pick-crops-dialog" },
  );
}
