// The crops of a cluster in a dialog: those that are another kind are chosen and moved.

import { address, get, post } from "./api.js";
import { button, complain, dialog, h, toast } from "./elements.js";
import { plural } from "./numbers.js";

const PAGE = 60;
const SIZE_PX = 96;

// `others`: clusters that crops may go to; `titleOf(cluster)` names one. Resolves when the dialog is closed.
export function pickCrops(cluster, others, titleOf) {
  const chosen = new Set();
  let rows = []; // those that are shown, each at the place of its item
  let last = null; // the row of the last click, for a range

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

  const toggle = (row, range) => {
    const place = rows.indexOf(row);
    const other = range && last !== null ? rows.indexOf(last) : place;
    const on = !chosen.has(row);
    for (const one of rows.slice(Math.min(place, other), Math.max(place, other) + 1)) {
      if (on) chosen.add(one);
      else chosen.delete(one);
    }
    last = row;
    paint();
  };

  const load = async () => {
    complain(trouble, null);
    try {
      const { crops, next } = await get(`/clusters/${cluster.id}/crops`, { limit: PAGE, after: rows.length });
      rows = [...rows, ...crops.map((one) => one.row)];
      grid.append(
        ...crops.map((one) =>
          h(
            "li",
            {},
            h(
              "button.crop",
              {
                type: "button",
                testid: "crop",
                title: one.image,
                "aria-label": `Crop ${one.row} of ${one.image}`,
                "aria-pressed": "false",
                onclick: (event) => toggle(one.row, event.shiftKey),
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
      // what stays keeps its place, and so does whoever looks through it
      rows.forEach((row, place) => chosen.has(row) && grid.children[place].classList.add("moved"));
      for (const item of [...grid.querySelectorAll(".moved")]) item.remove();
      rows = rows.filter((row) => !chosen.has(row));
      if (chosen.has(last)) last = null;
      chosen.clear();
      if (!rows.length) await load();
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
