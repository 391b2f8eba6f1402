// Line charts as SVG: curves of losses and scores.

import { h, s } from "./elements.js";
import { count, decimal } from "./numbers.js";

const WIDTH = 520;
const HEIGHT = 200;
const LEFT = 48;
const BOTTOM = 24;
const TOP = 10;
const RIGHT = 10;
const COLOURS = 6;

// series: [{name, points: [[x, y or null]]}]; a null breaks the line. `text` writes a value, `tick` one at the axis.
export function lineChart({ title, xName, series, most, testid, text = decimal, tick: mark = tidy }) {
  const shown = series.map((one, place) => ({ ...one, colour: `var(--curve-${place % COLOURS})` }));
  const points = shown.flatMap((one) => one.points).filter(([, y]) => Number.isFinite(y));
  const figure = h("figure.chart", { testid });
  figure.append(h("figcaption", {}, title));
  if (!points.length) {
    figure.append(h("p.chart-empty", {}, "No value yet."));
    return figure;
  }
  const x = scale(
    points.map((point) => point[0]),
    LEFT,
    WIDTH - RIGHT,
    false,
  );
  const y = scale(points.map((point) => point[1]).concat(0, most ?? []), HEIGHT - BOTTOM, TOP, true);
  const size = `0 0 ${WIDTH} ${HEIGHT}`;
  const picture = s("svg", { viewBox: size, role: "img", "aria-label": spoken(title, shown, text) });
  for (const tick of y.ticks) {
    picture.append(
      s("line.grid", { x1: LEFT, x2: WIDTH - RIGHT, y1: y.at(tick), y2: y.at(tick) }),
      s("text", { x: LEFT - 6, y: y.at(tick) + 3.5, "text-anchor": "end" }, mark(tick)),
    );
  }
  for (const tick of x.ticks) {
    picture.append(s("text", { x: x.at(tick), y: HEIGHT - 8, "text-anchor": "middle" }, count(tick)));
  }
  for (const one of shown) picture.append(...curve(one, x, y));
  const reading = h("p.reading", {}, "Point at a curve to read it.");
  const cross = s("line.cross", { y1: TOP, y2: HEIGHT - BOTTOM, x1: -9, x2: -9 });
  picture.append(cross);
  picture.addEventListener("pointermove", (event) => read(event, picture, x, shown, cross, reading, xName, text));
  figure.append(
    picture,
    h(
      "div.legend",
      {},
      shown.map((one) =>
        h(
          "span",
          {},
          h("i", { style: { background: one.colour } }),
          h("span", { dir: "auto" }, one.name),
          " ",
          h("b", {}, text(last(one.points))),
        ),
      ),
    ),
    reading,
  );
  return figure;
}

function curve(one, x, y) {
  const parts = [];
  let path = "";
  let pen = false;
  for (const [px, py] of one.points) {
    if (!Number.isFinite(py)) {
      pen = false;
      continue;
    }
    path += `${pen ? "L" : "M"}${x.at(px).toFixed(1)} ${y.at(py).toFixed(1)}`;
    pen = true;
  }
  parts.push(s("path.curve", { d: path, style: { stroke: one.colour } }));
  if (one.points.length < 25) {
    for (const [px, py] of one.points) {
      if (Number.isFinite(py))
        parts.push(s("circle", { cx: x.at(px), cy: y.at(py), r: 2.5, style: { fill: one.colour } }));
    }
  }
  return parts;
}

function read(event, picture, x, shown, cross, reading, xName, text) {
  const frame = picture.getBoundingClientRect();
  const wanted = x.from(((event.clientX - frame.left) / frame.width) * WIDTH);
  const all = shown.flatMap((one) => one.points);
  const near = all.reduce((best, point) => (Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best));
  cross.setAttribute("x1", x.at(near[0]));
  cross.setAttribute("x2", x.at(near[0]));
  const values = shown.map((one) => `${one.name} ${text(one.points.find((point) => point[0] === near[0])?.[1])}`);
  reading.textContent = `${xName} ${count(near[0])}: ${values.join(", ")}`;
}

function scale(values, start, end, nice) {
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (low === high) high = low + (Math.abs(low) || 1);
  const step = roundStep((high - low) / 4);
  if (nice) {
    low = Math.floor(low / step) * step;
    high = Math.ceil(high / step) * step;
  }
  const at = (value) => start + ((value - low) / (high - low)) * (end - start);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step / 1e6; tick += step) ticks.push(tick);
  return { at, ticks, from: (place) => low + ((place - start) / (end - start)) * (high - low) };
}

function roundStep(raw) {
  const power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= raw * 0.999);
}

const tidy = (value) => String(Number(value.toPrecision(3)));
const last = (points) => points.findLast((point) => Number.isFinite(point[1]))?.[1] ?? null;
const spoken = (title, shown, text) =>
  `${title}: ${shown.map((one) => `${one.name} ${text(last(one.points))}`).join(", ")}`;

// Bars of shares from 0 to 1, one row each: [{name, share, text}].
export function bars(rows) {
  return h(
    "ul.bars",
    {},
    rows.map((row) =>
      h(
        "li",
        {},
        h("span.bar-name", { dir: "auto" }, row.name),
        h("span.bar", {}, h("span", { style: { width: `${Math.max(0, Math.min(1, row.share || 0)) * 100}%` } })),
        h("span.bar-value", {}, row.text),
      ),
    ),
  );
}
