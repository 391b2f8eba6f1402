// Every edit is a write of its own, in order, each with the version that the one before gave; so the server's undo goes
// back edit by edit. What cannot be written is kept, here and in the browser's storage, and tried again; boxes that the
// server refuses are kept too, until a later write takes their place.

import { ask, holder } from "./api.js";

const WAITS_MS = [1000, 2000, 4000, 8000];
const ORPHAN_MS = 20_000; // unsaved edits of a tab that was closed

// Of one image that is open. `hooks`: {adopt(sheet, boxes), state(name, error), told(error) of a change that is not made
// of boxes and was refused, conflict(mine, current) -> "mine"/"theirs"}.
export class Saver {
  #ops = [];
  #refused = null; // the last boxes, where the server would not take them
  #running = null;
  #keys = new Map(); // of an id: the editor's key
  #ids = new Map(); // of a key: the server's id
  #wake = null;
  #ended = false;

  constructor(sheet, hooks) {
    this.image = sheet.image.id;
    this.know(sheet);
    this.hooks = hooks;
    this.failures = 0;
  }

  // What the server has now, as far as this tab was told.
  know(sheet) {
    this.version = sheet.version;
    this.known = sheet.boxes.filter((box) => box.status !== "rejected");
  }

  get pending() {
    return this.#ops.length > 0 || this.#refused !== null;
  }

  // The server's boxes with the keys that the editor knows them by.
  keyed(boxes) {
    return boxes.map((box) => ({ ...box, key: this.#keys.get(box.id) ?? `b${box.id}` }));
  }

  // Write the boxes as they are now; rejected ones and those without a class are left out.
  save(boxes, { inspected = false, minScore } = {}) {
    const kept = boxes
      .filter((box) => box.status !== "rejected" && box.class_id)
      .map(({ key, id, class_id, xyxy, ignore, status }) => ({
        key,
        id: id ?? this.#ids.get(key),
        class_id,
        xyxy: [...xyxy],
        ignore,
        status,
      }));
    return this.#add({ kind: "boxes", boxes: kept, inspected, ...(inspected ? { minScore } : {}) });
  }

  // Write a change that is not made of boxes: ["POST", "/undo"], ["PUT", "/status", {status}], ["POST", "/accept",
  // {...}].
  write(method, path, json = {}) {
    return this.#add({ kind: "write", method, path, json });
  }

  #add(op) {
    return new Promise((resolve) => {
      this.#ops.push({ ...op, resolve });
      if (op.kind === "boxes") this.#refused = null; // they are among these
      this.#keep();
      this.#start();
    });
  }

  #start() {
    this.hooks.state("saving");
    this.#running ??= this.#run().finally(() => {
      this.#running = null;
    });
  }

  // Resolves when all is written; at once if nothing waits.
  async settled() {
    while (this.#running) await this.#running;
  }

  retry() {
    this.#wake?.();
    if (!this.#refused) return;
    this.#ops.push(this.#refused);
    this.#refused = null;
    this.#start();
  }

  // Stop trying: the image is left. What was not written stays in the browser's storage.
  end() {
    this.#ended = true;
    this.#wake?.();
  }

  async #run() {
    while (this.#ops.length && !this.#ended) {
      const op = this.#ops[0];
      let sheet;
      try {
        sheet = await this.#request(op);
      } catch (error) {
        await this.#failed(op, error);
        continue;
      }
      this.failures = 0;
      this.#refused = null;
      this.know(sheet);
      if (op.kind === "boxes") this.#name(op, sheet);
      this.#ops.shift();
      this.#keep();
      op.resolve(sheet);
      if (!this.#ops.length) this.#adopt(sheet);
    }
    if (!this.pending) this.hooks.state("saved");
  }

  #request(op) {
    const base = `/images/${this.image}`;
    if (op.kind === "write") return ask(op.method, base + op.path, { json: { ...op.json, version: this.version } });
    const boxes = op.boxes.map(({ id, class_id, xyxy, ignore, status }) => ({
      ...(id ? { id } : {}),
      class_id,
      xyxy,
      ignore: Boolean(ignore),
      ...(id && status === "inspected" ? { status } : {}),
    }));
    return ask("PUT", `${base}/boxes`, {
      json: { version: this.version, boxes, ...(op.inspected ? { inspected: true, min_score: op.minScore } : {}) },
    });
  }

  // New boxes learn their ids: those of the answer that were unknown, each the nearest to what was sent.
  #name(op, sheet) {
    const known = new Set(op.boxes.map((box) => box.id).filter(Boolean));
    const unknown = sheet.boxes.filter((box) => !known.has(box.id));
    for (const sent of op.boxes.filter((box) => !box.id)) {
      const far = (box) =>
        (box.class_id === sent.class_id ? 0 : 1e6) +
        box.xyxy.reduce((sum, value, place) => sum + Math.abs(value - sent.xyxy[place]), 0);
      unknown.sort((a, b) => far(a) - far(b));
      const found = unknown.shift();
      if (!found) break;
      this.#keys.set(found.id, sent.key);
      this.#ids.set(sent.key, found.id);
      for (const later of this.#ops) {
        for (const box of later.boxes ?? []) if (box.key === sent.key) box.id = found.id;
      }
    }
  }

  #adopt(sheet) {
    this.hooks.adopt(sheet, this.keyed(sheet.boxes));
  }

  async #failed(op, error) {
    if (error.status === 409 && error.body?.current) {
      await this.#conflict(op, error);
    } else if (error.passing || error.status === 401) {
      this.hooks.state("failed", error);
      const wait = WAITS_MS[Math.min(this.failures++, WAITS_MS.length - 1)];
      await new Promise((resolve) => {
        this.#wake = resolve;
        setTimeout(resolve, wait);
      });
    } else {
      // The server will not take this one as it is: say so, and keep what was drawn.
      this.#ops.shift();
      op.resolve(null);
      if (op.kind === "write") this.hooks.told(error);
      else if (!this.#ops.some((one) => one.kind === "boxes")) this.#refused = op;
      this.#keep();
      if (this.#refused) this.hooks.state("refused", error);
    }
  }

  async #conflict(op, error) {
    const current = error.body.current;
    if (op.kind === "write" && current.version === this.version) {
      this.#ops.shift();
      op.resolve(current);
      this.#refused = null;
      if (!this.#ops.length) this.#adopt(current);
      return;
    }
    if (this.#isOnlyProposals(current)) {
      this.#take(current);
      return;
    }
    const mine = this.#ops.findLast((one) => one.kind === "boxes");
    this.hooks.state("conflict", error);
    const choice = mine ? await this.hooks.conflict(mine.boxes, current) : "theirs";
    this.know(current);
    const dropped = this.#ops.splice(0);
    if (choice === "mine") {
      const there = new Set(current.boxes.map((box) => box.id));
      for (const box of mine.boxes) if (box.id && !there.has(box.id)) box.id = undefined;
      for (const [key, id] of this.#ids) if (!there.has(id)) this.#ids.delete(key);
      this.#ops.push(mine);
      for (const one of dropped) if (one !== mine) one.resolve(null);
    } else {
      for (const one of dropped) one.resolve(null);
      this.#refused = null;
      this.#adopt(current);
    }
    this.#keep();
  }

  // Whether only a run wrote meanwhile: other proposals, and all that people left as it was. Images that were saved as
  // inspected are not for this: nobody has seen what came.
  #isOnlyProposals(current) {
    const settled = (boxes) =>
      JSON.stringify(
        boxes
          .filter((box) => !["proposed", "rejected"].includes(box.status))
          .map((box) => [box.id, box.class_id, box.xyxy, box.ignore]),
      );
    return !this.#ops.some((op) => op.inspected) && settled(this.known) === settled(current.boxes);
  }

  // A run's proposals join the boxes that wait to be written; those that it took away go, unless a person used them.
  #take(current) {
    const before = new Set(this.known.map((box) => box.id));
    const there = new Set(current.boxes.map((box) => box.id));
    const added = this.keyed(current.boxes.filter((box) => box.status === "proposed" && !before.has(box.id)));
    for (const op of this.#ops.filter((one) => one.kind === "boxes")) {
      op.boxes = op.boxes.filter((box) => !box.id || there.has(box.id) || box.status !== "proposed");
      for (const box of op.boxes) if (box.id && !there.has(box.id)) box.id = undefined;
      op.boxes.push(...added.map((box) => ({ ...box, xyxy: [...box.xyxy] })));
    }
    this.know(current);
    this.#keep();
  }

  #keep() {
    const last = this.#ops.findLast((op) => op.kind === "boxes") ?? this.#refused;
    const name = storageName(this.image);
    try {
      if (!last) {
        localStorage.removeItem(name);
        return;
      }
      localStorage.setItem(
        name,
        JSON.stringify({ version: this.version, boxes: last.boxes, holder, time: Date.now() }),
      );
    } catch {
      /* full or forbidden storage: the edit is still in this tab */
    }
  }
}

const storageName = (image) => `simdetr.unsaved.${image}`;

// Edits of this image that a tab could not write before it was closed; null if there are none.
export function unsaved(image) {
  const text = localStorage.getItem(storageName(image));
  if (!text) return null;
  const found = JSON.parse(text);
  if (found.holder !== holder && Date.now() - found.time < ORPHAN_MS) return null; // a living tab's
  localStorage.removeItem(storageName(image));
  return found;
}
