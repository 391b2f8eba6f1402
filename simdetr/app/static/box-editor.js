// <box-editor>: an image with boxes that are drawn, moved and resized. It knows nothing of the server, and owns no box:
// it shows those that it is given, and tells what a person drew or changed; whoever keeps the boxes gives them anew.
//
// Coordinates are image pixels as floats. Everything that follows the pointer is done in its own event, so that a box
// is where the pointer is in the same frame. A click selects (again: the box beneath); a drag on the selected box moves
// it, on a handle resizes it; anywhere else, and with Shift there too, it draws.
//
// Events: "edit" {what, box} after a change, with the whole box as it is then; "select" {key}; "rest" once no drag goes on
// any more; "view" {zoom}.

import { h, s } from "./elements.js";
import { HANDLES, area, contains, grown, handleAt, moved, pulled, same, spanned } from "./geometry.js";
import { percent } from "./numbers.js";

const LEAST_ZOOM = 0.25;
const MOST_ZOOM = 4;
const CLICK_PX = 3;
const REACH_PX = { mouse: 8, pen: 12, touch: 20 };
const LEAST_BOX_PX = 2;
const CURSORS = {
  nw: "nwse-resize",
  se: "nwse-resize",
  ne: "nesw-resize",
  sw: "nesw-resize",
  n: "ns-resize",
  s: "ns-resize",
  e: "ew-resize",
  w: "ew-resize",
};

class BoxEditor extends HTMLElement {
  #boxes = [];
  #nodes = new Map();
  #classes = new Map();
  #selected = null;
  #size = [1, 1];
  #view = { zoom: 1, x: 0, y: 0, fitted: true };
  #gesture = null;
  #frame = null;
  #pointers = new Map();
  #made = 0;
  #frozen = true;
  panning = false;
  panned = false;

  connectedCallback() {
    if (this.stage) return;
    this.tabIndex = 0;
    this.setAttribute("role", "application");
    this.setAttribute("aria-label", "Box editor; ? lists the keys");
    this.dataset.testid = "editor";
    this.picture = h("img", { alt: "", draggable: "false" });
    this.list = s("g", { role: "listbox", "aria-label": "Boxes" });
    this.rubber = s("rect.rubber", { visibility: "hidden" });
    this.grips = s(
      "g.grips",
      {},
      Object.keys(HANDLES).map((name) =>
        s("rect.grip", { width: 9, height: 9, rx: 2, "data-testid": `handle-${name}` }),
      ),
    );
    this.scaled = s("g", {}, this.list, this.rubber);
    this.tags = h("div.tags", { "aria-hidden": "true" });
    this.guides = h("div.guides", { "aria-hidden": "true" }, h("i"), h("i"));
    this.stage = h("div.stage", {}, this.picture, s("svg", {}, this.scaled, this.grips), this.tags, this.guides);
    this.append(this.stage);
    this.stage.addEventListener("pointerdown", (event) => this.#down(event));
    this.stage.addEventListener("pointermove", (event) => this.#move(event));
    this.stage.addEventListener("pointerup", (event) => this.#up(event));
    this.stage.addEventListener("pointercancel", (event) => this.#up(event, true));
    this.stage.addEventListener("pointerleave", () => this.guides.classList.remove("shown"));
    this.stage.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    this.watcher = new ResizeObserver(() => (this.#view.fitted ? this.fit() : this.#look()));
    this.watcher.observe(this.stage);
  }

  disconnectedCallback() {
    this.watcher.disconnect();
  }

  // ------------------------------------------------------------------------------------------------- what is shown

  // Show an image: {src, alt, width, height}. The boxes come by `boxes`.
  load({ src, alt, width, height }) {
    this.cancel();
    this.#size = [width, height];
    this.#selected = null;
    this.boxes = [];
    this.picture.removeAttribute("src");
    this.picture.src = src;
    this.picture.alt = alt;
    this.picture.style.width = `${width}px`;
    this.picture.style.height = `${height}px`;
    this.#frozen = false;
    this.fit();
  }

  clear() {
    this.cancel();
    this.boxes = [];
    this.#frozen = true;
    this.picture.removeAttribute("src");
    this.picture.alt = "";
  }

  // Boxes: [{key, id?, class_id, xyxy, status, score, ignore}]; those of status "rejected" are only shown.
  get boxes() {
    return this.#boxes;
  }

  set boxes(boxes) {
    this.#boxes = boxes.map((box) => ({ ...box, xyxy: [...box.xyxy] }));
    if (this.#gesture?.key && !this.#find(this.#gesture.key)) this.cancel();
    if (!this.#live().some((box) => box.key === this.#selected)) this.#selected = null;
    this.#paint();
  }

  // Map of class id to {name, colour}.
  set classes(classes) {
    this.#classes = classes;
    this.#paint();
  }

  get busy() {
    return this.#gesture !== null;
  }

  get selected() {
    return this.#find(this.#selected) ?? null;
  }

  get zoom() {
    return this.#view.zoom;
  }

  #find(key) {
    return this.#boxes.find((box) => box.key === key);
  }

  #live() {
    return this.#boxes.filter((box) => box.status !== "rejected");
  }

  // ------------------------------------------------------------------------------------------------- what keys ask for

  select(key, { reveal = true } = {}) {
    const box = this.#find(key);
    this.#selected = box ? key : null;
    this.#paint();
    if (box && reveal) this.#reveal(box.xyxy);
    this.#tell("select", { key: this.#selected });
  }

  // The next (1) or previous (-1) box; false at the end when `round` is false, so that Tab can leave.
  step(by, { round = true } = {}) {
    const boxes = this.#live();
    if (!boxes.length) return false;
    const place = boxes.findIndex((box) => box.key === this.#selected);
    const wanted = place < 0 ? (by > 0 ? 0 : boxes.length - 1) : place + by;
    if (!round && (wanted < 0 || wanted >= boxes.length)) return false;
    this.select(boxes[(wanted + boxes.length) % boxes.length].key);
    return true;
  }

  nudge(dx, dy) {
    this.#change("move", (box) => moved(box.xyxy, dx, dy, ...this.#size));
  }

  grow(dx, dy) {
    this.#change("resize", (box) => grown(box.xyxy, dx, dy, ...this.#size));
  }

  #change(what, change) {
    const box = this.selected;
    if (!box || this.#gesture) return;
    const after = change(box);
    if (same(after, box.xyxy)) return;
    box.xyxy = after;
    this.#place(box);
    this.#grip();
    this.#tell("edit", { what, box: { ...box } });
  }

  // A box in the middle of what is seen, for those who draw by keys.
  drawInView() {
    if (this.#frozen) return;
    const { width, height } = this.stage.getBoundingClientRect();
    const [x0, y0] = this.#at(width * 0.375, height * 0.375);
    const [x1, y1] = this.#at(width * 0.625, height * 0.625);
    this.#add(spanned([x0, y0], [x1, y1], ...this.#size));
  }

  // End a drag as if it had not been; true if there was one.
  cancel() {
    const gesture = this.#gesture;
    if (!gesture) return false;
    const box = this.#find(gesture.key);
    if (box && gesture.before) {
      box.xyxy = gesture.before;
      this.#place(box);
      this.#grip();
    }
    this.rubber?.setAttribute("visibility", "hidden");
    this.#gesture = null;
    this.#tell("rest");
    return true;
  }

  #add(xyxy) {
    if (xyxy[2] - xyxy[0] < LEAST_BOX_PX || xyxy[3] - xyxy[1] < LEAST_BOX_PX) return;
    const key = `n${++this.#made}-${Date.now()}`;
    const box = { key, class_id: null, xyxy, status: "manual", source: "user", score: null, ignore: false };
    this.#tell("edit", { what: "draw", box }); // whoever keeps the boxes gives them back with this one
    this.select(key, { reveal: false });
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  // ------------------------------------------------------------------------------------------------- zoom and pan

  fit() {
    const { width, height } = this.stage.getBoundingClientRect();
    if (!width || !height) return;
    const margin = 12;
    const zoom = Math.min((width - 2 * margin) / this.#size[0], (height - 2 * margin) / this.#size[1], MOST_ZOOM);
    this.#view = { zoom, x: (width - zoom * this.#size[0]) / 2, y: (height - zoom * this.#size[1]) / 2, fitted: true };
    this.#look();
  }

  // Zoom to a scale, about a point of the stage or its middle.
  zoomTo(zoom, at) {
    const { width, height } = this.stage.getBoundingClientRect();
    const [px, py] = at ?? [width / 2, height / 2];
    const [x, y] = this.#at(px, py);
    const least = Math.min(LEAST_ZOOM, this.#view.zoom);
    const wanted = Math.min(Math.max(zoom, least), MOST_ZOOM);
    this.#view = { zoom: wanted, x: px - x * wanted, y: py - y * wanted, fitted: false };
    this.#look();
  }

  zoomBy(factor, at) {
    this.zoomTo(this.#view.zoom * factor, at);
  }

  panBy(dx, dy) {
    this.#view = { ...this.#view, x: this.#view.x + dx, y: this.#view.y + dy, fitted: false };
    this.#look();
  }

  #at(px, py) {
    return [(px - this.#view.x) / this.#view.zoom, (py - this.#view.y) / this.#view.zoom];
  }

  #look() {
    const { zoom } = this.#view;
    const { width, height } = this.stage.getBoundingClientRect();
    const kept = 60; // pixels of the image that stay in sight
    this.#view.x = Math.min(Math.max(this.#view.x, kept - zoom * this.#size[0]), width - kept);
    this.#view.y = Math.min(Math.max(this.#view.y, kept - zoom * this.#size[1]), height - kept);
    const { x, y } = this.#view;
    this.picture.style.transform = `matrix(${zoom}, 0, 0, ${zoom}, ${x}, ${y})`;
    this.picture.classList.toggle("pixels", zoom >= 3);
    this.scaled.setAttribute("transform", `matrix(${zoom} 0 0 ${zoom} ${x} ${y})`);
    for (const box of this.#boxes) this.#place(box);
    this.#grip();
    this.#tell("view", { zoom });
  }

  #reveal([x0, y0, x1, y1]) {
    const { width, height } = this.stage.getBoundingClientRect();
    const { zoom, x, y } = this.#view;
    const margin = 24;
    const shift = (low, high, room) =>
      high - low > room - 2 * margin
        ? 0
        : low < margin
          ? margin - low
          : high > room - margin
            ? room - margin - high
            : 0;
    const dx = shift(x0 * zoom + x, x1 * zoom + x, width);
    const dy = shift(y0 * zoom + y, y1 * zoom + y, height);
    if ((dx || dy) && !this.#view.fitted) this.panBy(dx, dy);
  }

  #wheel(event) {
    event.preventDefault();
    if (this.#frozen) return;
    if (event.shiftKey) {
      this.panBy(-(event.deltaX || event.deltaY), 0);
      return;
    }
    const pixels = event.deltaMode ? event.deltaY * 33 : event.deltaY;
    this.zoomBy(
      Math.exp(-Math.max(-240, Math.min(240, pixels)) * (event.ctrlKey ? 0.01 : 0.0016)),
      this.#stagePoint(event),
    );
  }

  // ------------------------------------------------------------------------------------------------- pointers

  #stagePoint(event) {
    const frame = this.#frame ?? this.stage.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top];
  }

  #down(event) {
    if (this.#frozen) return;
    this.#frame = this.stage.getBoundingClientRect(); // measured once for the whole drag
    const point = this.#stagePoint(event);
    this.#pointers.set(event.pointerId, point);
    this.stage.setPointerCapture(event.pointerId);
    this.focus({ preventScroll: true });
    if (this.#pointers.size === 2) {
      this.cancel();
      this.#gesture = { kind: "pinch", ...this.#pinch() };
    } else if (event.button === 1 || (this.panning && event.button === 0)) {
      event.preventDefault();
      this.panned = true;
      this.#gesture = { kind: "pan", last: point };
    } else if (event.button === 0 && this.#pointers.size === 1) {
      this.#gesture = this.#begin(point, REACH_PX[event.pointerType] ?? 8, event.shiftKey);
    }
  }

  #begin(point, reach, draws) {
    const at = this.#at(...point);
    const box = draws ? null : this.selected;
    const gesture = { start: at, point, going: false };
    const handle = box && handleAt(box.xyxy, at, reach / this.#view.zoom);
    if (handle) return { ...gesture, kind: "pull", handle, key: box.key, before: [...box.xyxy] };
    if (box && contains(box.xyxy, at)) return { ...gesture, kind: "move", key: box.key, before: [...box.xyxy] };
    return { ...gesture, kind: "draw" };
  }

  #move(event) {
    const point = this.#stagePoint(event);
    if (this.#pointers.has(event.pointerId)) this.#pointers.set(event.pointerId, point);
    const gesture = this.#gesture;
    if (!gesture) {
      this.#hover(event, point);
      return;
    }
    if (gesture.kind === "pan") {
      this.panBy(point[0] - gesture.last[0], point[1] - gesture.last[1]);
      gesture.last = point;
      return;
    }
    if (gesture.kind === "pinch") {
      this.#pinchOn(gesture);
      return;
    }
    if (!gesture.going && Math.hypot(point[0] - gesture.point[0], point[1] - gesture.point[1]) < CLICK_PX) return;
    gesture.going = true;
    const at = this.#at(...point);
    const [dx, dy] = [at[0] - gesture.start[0], at[1] - gesture.start[1]];
    if (gesture.kind === "draw") {
      gesture.xyxy = spanned(gesture.start, at, ...this.#size);
      outline(this.rubber, gesture.xyxy);
      this.rubber.setAttribute("visibility", "visible");
      this.#guide(event.pointerType, point);
      return;
    }
    const box = this.#find(gesture.key);
    box.xyxy =
      gesture.kind === "move"
        ? moved(gesture.before, dx, dy, ...this.#size)
        : pulled(gesture.before, gesture.handle, dx, dy, ...this.#size);
    this.#place(box);
    this.#grip();
  }

  #up(event, cancelled = false) {
    this.#pointers.delete(event.pointerId);
    if (!this.#pointers.size) this.#frame = null;
    const gesture = this.#gesture;
    if (!gesture) return;
    if (gesture.kind === "pinch" && this.#pointers.size) return;
    if (cancelled) {
      this.cancel();
      return;
    }
    this.#gesture = null;
    this.rubber.setAttribute("visibility", "hidden");
    this.#finish(gesture);
    this.#tell("rest");
  }

  #finish(gesture) {
    if (gesture.kind === "pinch" || gesture.kind === "pan") return;
    if (!gesture.going) {
      this.#click(gesture.start);
      return;
    }
    if (gesture.kind === "draw") {
      this.#add(gesture.xyxy);
      return;
    }
    const box = this.#find(gesture.key);
    if (area(box.xyxy) < LEAST_BOX_PX) box.xyxy = gesture.before;
    this.#place(box);
    this.#grip();
    if (!same(box.xyxy, gesture.before))
      this.#tell("edit", { what: gesture.kind === "move" ? "move" : "resize", box: { ...box } });
  }

  // The smallest box there; where one of them is selected, the next larger.
  #click(at) {
    const there = this.#live()
      .filter((box) => contains(box.xyxy, at, 4 / this.#view.zoom))
      .sort((a, b) => area(a.xyxy) - area(b.xyxy));
    const place = there.findIndex((box) => box.key === this.#selected);
    this.select(there.length ? there[(place + 1) % there.length].key : null, { reveal: false });
  }

  #pinch() {
    const [[ax, ay], [bx, by]] = [...this.#pointers.values()];
    return { span: Math.hypot(ax - bx, ay - by), middle: [(ax + bx) / 2, (ay + by) / 2] };
  }

  #pinchOn(gesture) {
    if (this.#pointers.size < 2) return;
    const now = this.#pinch();
    this.panBy(now.middle[0] - gesture.middle[0], now.middle[1] - gesture.middle[1]);
    if (gesture.span > 0) this.zoomBy(now.span / gesture.span, now.middle);
    Object.assign(gesture, now);
  }

  #hover(event, point) {
    if (this.#frozen) return;
    const at = this.#at(...point);
    const box = event.shiftKey ? null : this.selected;
    const handle = box && handleAt(box.xyxy, at, REACH_PX.mouse / this.#view.zoom);
    this.stage.style.cursor = this.panning
      ? "grab"
      : handle
        ? CURSORS[handle]
        : box && contains(box.xyxy, at)
          ? "move"
          : "crosshair";
    this.#guide(event.pointerType, point);
  }

  #guide(pointerType, [x, y]) {
    this.guides.classList.toggle("shown", pointerType === "mouse");
    this.guides.firstChild.style.transform = `translateX(${x}px)`;
    this.guides.lastChild.style.transform = `translateY(${y}px)`;
  }

  // ------------------------------------------------------------------------------------------------- drawing

  #paint() {
    if (!this.stage) return;
    const seen = new Set();
    let number = 0;
    // the selected one last, on top of the others
    for (const box of this.#boxes) {
      seen.add(box.key);
      if (!this.#nodes.has(box.key)) this.#nodes.set(box.key, this.#make(box));
      const { group, tag, dot, name, score } = this.#nodes.get(box.key);
      const kind = this.#classes.get(box.class_id);
      const chosen = box.key === this.#selected;
      const rejected = box.status === "rejected";
      const label =
        `${rejected ? "Rejected box" : `Box ${++number}`}: ${kind?.name ?? "no class yet"}, ${box.status}` +
        (box.score === null || box.score === undefined ? "" : `, ${percent(box.score)}`) +
        (box.ignore ? ", ignored" : "");
      group.setAttribute("class", `box ${box.status}${chosen ? " selected" : ""}${box.ignore ? " ignored" : ""}`);
      group.style.setProperty("--class", kind?.colour ?? "var(--muted)");
      group.setAttribute("aria-selected", chosen);
      group.setAttribute("aria-label", label);
      group.dataset.id = box.id ?? "";
      tag.className = `tag ${box.status}${chosen ? " selected" : ""}`;
      dot.style.background = kind?.colour ?? "transparent";
      name.textContent = kind?.name ?? "?";
      score.textContent =
        box.score === null || box.score === undefined || box.status !== "proposed" ? "" : box.score.toFixed(2);
      this.#place(box);
    }
    for (const [key, { group, tag }] of this.#nodes) {
      if (!seen.has(key)) {
        group.remove();
        tag.remove();
        this.#nodes.delete(key);
      }
    }
    this.tags.classList.toggle("crowded", this.#live().length > 40);
    if (this.#selected) {
      this.list.append(this.#nodes.get(this.#selected).group);
      this.setAttribute("aria-activedescendant", `box-${this.#selected}`);
    } else this.removeAttribute("aria-activedescendant");
    this.#grip();
  }

  #make(box) {
    const halo = s("rect.halo");
    const edge = s("rect.edge");
    const group = s("g", { role: "option", id: `box-${box.key}`, "data-testid": "box" }, halo, edge);
    const dot = h("i");
    const name = h("span.tag-name", { dir: "auto" });
    const score = h("span.tag-score");
    const tag = h("div", {}, dot, name, score);
    this.list.append(group);
    this.tags.append(tag);
    return { group, halo, edge, tag, dot, name, score };
  }

  #place(box) {
    const found = this.#nodes.get(box.key);
    if (!found) return;
    outline(found.halo, box.xyxy);
    outline(found.edge, box.xyxy);
    const { zoom, x, y } = this.#view;
    const top = box.xyxy[1] * zoom + y;
    found.tag.style.transform = `translate(${box.xyxy[0] * zoom + x - 1}px, ${top > 20 ? top - 20 : top + 2}px)`;
  }

  #grip() {
    const box = this.selected;
    this.grips.setAttribute("visibility", box ? "visible" : "hidden");
    if (!box) return;
    const { zoom, x, y } = this.#view;
    const [x0, y0, x1, y1] = box.xyxy;
    Object.values(HANDLES).forEach(([fx, fy], place) => {
      const grip = this.grips.children[place];
      grip.setAttribute("x", (x0 + fx * (x1 - x0)) * zoom + x - 4.5);
      grip.setAttribute("y", (y0 + fy * (y1 - y0)) * zoom + y - 4.5);
    });
  }
}

function outline(rect, [x0, y0, x1, y1]) {
  rect.setAttribute("x", x0);
  rect.setAttribute("y", y0);
  rect.setAttribute("width", x1 - x0);
  rect.setAttribute("height", y1 - y0);
}

customElements.define("box-editor", BoxEditor);
