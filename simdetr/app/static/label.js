// The Label screen: queue, editor, classes, list of boxes.

import { address, get, holder, post } from "./api.js";
import "./box-editor.js";
import { ClassPicker, isUnnamed } from "./class-picker.js";
import { chooseSide } from "./conflict.js";
import { button, complain, empty, h, iconButton, put, toast } from "./elements.js";
import { middle, right, SCORE_STEP } from "./label-parts.js";
import { inUse, offerModels } from "./models.js";
import { count, decimal, percent, plural } from "./numbers.js";
import { Queue } from "./queue.js";
import { AT_WORK, finished } from "./runs.js";
import { Saver, unsaved } from "./saving.js";
import { chooseScore, isScoreChosen, shownScore } from "./shown-score.js";
import { actionOf, showKeys } from "./shortcuts.js";
import { uploadPanel } from "./upload.js";

const LEASE_MS = 240_000;
const NUDGE_MS = 350; // arrow presses closer than this are one edit
const BEST = 10; // so many more proposals are shown at once
const RECOUNT_MS = 300; // the slider stands still
const TRAIL = 200; // images that `[` goes back over
const LOOK_MS = 1500; // for proposals of a run that is at work
const STATES = {
  saved: "Saved",
  saving: "Saving…",
  failed: "Not saved yet",
  conflict: "Changed elsewhere",
  refused: "Not saved",
};

// As `n` walks them: what a machine was surest of first, what has no score last.
const inOrder = (boxes) => [...boxes].sort((a, b) => (b.score ?? -1) - (a.score ?? -1));
// A box that a person drew is drawn, however often it is moved; one that a machine found is corrected then.
const touch = (box) => {
  if (box.id) box.status = box.source === "user" ? "manual" : "corrected";
};
const asDrawn = (box) => (box.source === "user" && box.status === "corrected" ? { ...box, status: "manual" } : box);
const stamp = (box) => JSON.stringify([box.status, box.class_id, box.xyxy, box.ignore]);

export class LabelScreen {
  #boxes = []; // all that are alive, hidden ones too, with keys
  #rejected = [];
  #sheet = null;
  #saver = null;
  #nudge = null;
  #nameless = null; // what a person wanted done with boxes that had no name: it is done once there is one
  #moving = false;
  #stale = false; // what is shown is older than the boxes, since a drag was going on
  #drawnOn = null; // the image that the boxes are of
  #asked = 0;

  constructor(app) {
    this.app = app;
    this.project = app.project;
    this.minScore = shownScore();
    this.editor = document.createElement("box-editor");
    this.classes = new Map();
    const minScore = () => this.minScore;
    this.queue = new Queue(this.project, { open: (id) => this.open(id), minScore });
    this.picker = new ClassPicker(this.project.id, {
      pick: (id, how) => this.#picked(id, how),
      changed: (classes) => this.#classesChanged(classes),
      minScore,
    });
    this.element = h(
      "div.label",
      { testid: "screen-label" },
      h("h1.unseen", {}, "Label"),
      this.queue.element,
      middle(this),
      right(this),
    );
    this.editor.addEventListener("edit", (event) => this.#edited(event.detail));
    this.editor.addEventListener("select", () => this.#selected());
    this.editor.addEventListener("rest", () => {
      if (this.#stale) this.#paint();
    });
    this.editor.addEventListener("view", (event) => {
      this.zoom.textContent = percent(event.detail.zoom);
    });
    this.onKey = (event) => this.#key(event);
    this.onKeyUp = (event) => this.#keyUp(event);
    this.onHide = () => this.#release(true);
    this.onUnload = (event) => {
      if (this.#saver?.pending || this.#nudge) event.preventDefault();
    };
    document.addEventListener("keydown", this.onKey);
    document.addEventListener("keyup", this.onKeyUp);
    window.addEventListener("pagehide", this.onHide);
    window.addEventListener("beforeunload", this.onUnload);
    this.lease = setInterval(() => this.#renew(), LEASE_MS);
    this.looking = setInterval(() => this.#look(), LOOK_MS);
  }

  // ------------------------------------------------------------------------------------------------- coming and going

  async start(argument) {
    try {
      await this.picker.load();
      this.#models();
      this.project = await this.app.refresh();
      this.queue.progress(this.project);
      if (!this.project.images) {
        this.#noImages();
        return;
      }
      await this.queue.load();
      if (argument) await this.open(Number(argument));
      else await this.#next(null);
    } catch (error) {
      this.#covered(
        empty(
          "The images could not be listed",
          error.message,
          button("retry", "Try again", () => this.start(argument)),
        ),
      );
    }
  }

  // The address names another image: the back button of the browser, a link.
  update(argument) {
    const id = Number(argument);
    if (id && id !== this.#sheet?.image.id) this.open(id);
  }

  async leave() {
    document.removeEventListener("keydown", this.onKey);
    document.removeEventListener("keyup", this.onKeyUp);
    window.removeEventListener("beforeunload", this.onUnload);
    window.removeEventListener("pagehide", this.onHide);
    clearInterval(this.lease);
    clearInterval(this.looking);
    clearTimeout(this.recounting);
    this.#asked = -1;
    await this.#close();
    this.app.banner(null);
  }

  async #close() {
    this.#commit();
    const saver = this.#saver;
    const image = this.#sheet?.image.id;
    if (!saver) return;
    this.#saver = null;
    saver
      .settled()
      .then(() => post(`/images/${image}/release`, { holder }))
      .catch(() => {});
  }

  #release(going) {
    if (this.#sheet) post(`/images/${this.#sheet.image.id}/release`, { holder }, { keepalive: going }).catch(() => {});
  }

  #renew() {
    if (this.#sheet && this.#saver) post(`/images/${this.#sheet.image.id}/open`, { holder }).catch(() => {});
  }

  // Proposals of a run that mines come while their image is open, as long as nothing was drawn on it.
  async #look() {
    const saver = this.#saver;
    const proposes = (run) => run.kind === "mine" || (run.kind === "detect" && run.parameters.first);
    const mining = this.app.runs.runs.find((run) => proposes(run) && AT_WORK.has(run.state));
    this.miningNote.hidden = !mining;
    if (mining)
      this.miningNote.textContent = mining.total
        ? `First proposals: ${count(mining.done)} of ${count(mining.total)} images.`
        : "The first proposals are being made…";
    if (mining || this.mined) this.#queueAfter(`${mining?.id} ${mining?.done}`);
    if (this.project.indexing) {
      // the run is asked for once the folder is read
      this.project = await this.app.refresh().catch(() => this.project);
      this.app.runs.look();
    }
    if (!mining && !this.mined) return;
    this.mined = Boolean(mining); // once more after it has ended
    if (!saver || this.#boxes.length || saver.pending || this.#nudge || this.editor.busy) return;
    try {
      const { image } = this.#sheet;
      const sheet = await get(`/images/${image.id}/boxes`);
      if (this.#saver !== saver || saver.pending || sheet.version === saver.version || this.editor.busy) return;
      await this.picker.load();
      if (this.#saver !== saver || saver.pending || this.#boxes.length) return;
      saver.know(sheet);
      this.#adopt(sheet, saver.keyed(sheet.boxes));
      this.#onward();
    } catch {
      /* the next look may work */
    }
  }

  // The queue shows what a run found so far.
  #queueAfter(mark) {
    if (mark === this.queueMark) return;
    this.queueMark = mark;
    this.queue.refresh().catch(() => {}); // the next look may work
  }

  #isUnnamed(box) {
    const kind = this.classes.get(box.class_id);
    return box.status === "proposed" && (kind ? isUnnamed(kind) : box.source === "mined");
  }

  async open(id, { anyway = false } = {}) {
    if (this.#sheet?.image.id === id && this.#saver && !anyway) return;
    const asked = ++this.#asked;
    await this.#close();
    this.#say(null);
    try {
      const sheet = anyway ? await get(`/images/${id}/boxes`) : await post(`/images/${id}/open`, { holder });
      if (asked === this.#asked) this.#show(sheet);
    } catch (error) {
      if (asked !== this.#asked) return;
      if (error.status === 409 && error.body?.lease) {
        this.#taken(id, error);
        return;
      }
      this.#covered(
        empty(
          "This image could not be opened",
          error.message,
          button("next-image", "Next image", () => this.#next(null)),
        ),
      );
    }
  }

  // The next image: of the queue, or of the filtered list.
  async #next(after) {
    const asked = ++this.#asked;
    if (!this.queue.isQueue && after) {
      const beside = this.queue.beside(after, 1);
      if (beside) await this.open(beside.id);
      else toast("This was the last image of the list.");
      return;
    }
    const sheet = await post(`/projects/${this.project.id}/next`, { holder, ...(after ? { after } : {}) });
    if (asked !== this.#asked) return;
    if (sheet) this.#show(sheet);
    else this.#finished();
  }

  #show(sheet) {
    if (!sheet.image.width) {
      this.#covered(
        empty(
          "This image cannot be read",
          sheet.image.reason ?? "The file is damaged or is no image.",
          button("next-image", "Next image", () => this.#next(null), { kind: "primary" }),
        ),
      );
      return;
    }
    const { image } = sheet;
    const saver = new Saver(sheet, {
      adopt: (now, boxes) => {
        if (this.#saver === saver) this.#adopt(now, boxes);
      },
      state: (name, error) => this.#state(saver, name, error),
      told: (error) => this.#say(error),
      conflict: (mine, current) => chooseSide(image, mine, current.boxes, this.classes),
    });
    this.#saver = saver;
    this.#rejected = [];
    this.#nameless = null;
    this.#sheet = sheet;
    this.cover.hidden = true;
    this.editor.load({
      src: address(`/images/${image.id}/file`),
      alt: image.name,
      width: image.width,
      height: image.height,
    });
    this.name.textContent = image.name;
    this.name.title = image.name;
    this.facts.textContent = `${image.width} × ${image.height}`;
    this.#adopt(sheet, saver.keyed(sheet.boxes));
    this.#onward();
    this.#state(saver, "saved");
    this.queue.current(this.#counted(sheet));
    this.#remember(image.id);
    this.app.address(`label/${image.id}`);
    const inside = document.activeElement;
    if (!inside || inside === document.body || !inside.closest?.("dialog, .left input, .left select, .right input"))
      this.editor.focus({ preventScroll: true });
    this.#prefetch(image.id);
    this.#restore(sheet, saver);
  }

  // Edits that a closed tab could not write are written now, or shown beside what came since.
  async #restore(sheet, saver) {
    const kept = unsaved(sheet.image.id);
    if (!kept) return;
    if (
      kept.version === sheet.version ||
      (await chooseSide(sheet.image, kept.boxes, sheet.boxes, this.classes)) === "mine"
    ) {
      const there = new Set(sheet.boxes.map((box) => box.id));
      this.#boxes = kept.boxes.map((box) => ({ ...box, id: there.has(box.id) ? box.id : undefined, score: null }));
      this.#paint();
      saver.save(this.#boxes);
      toast("An edit that was not saved before is back.");
    }
  }

  // Images in the order in which this tab first showed them, also over a reload: the list has only those that are to do.
  get #trail() {
    return JSON.parse(sessionStorage.getItem(`simdetr.trail.${this.project.id}`) ?? "[]");
  }

  #remember(id) {
    const trail = this.#trail;
    if (trail.includes(id)) return;
    sessionStorage.setItem(`simdetr.trail.${this.project.id}`, JSON.stringify([...trail, id].slice(-TRAIL)));
  }

  #openBefore(id) {
    const trail = this.#trail;
    return trail[trail.indexOf(id) - 1] ?? null;
  }

  #prefetch(id) {
    const next = this.queue.images.find(
      (image) => image.id !== id && ["new", "proposed", "in_inspection"].includes(image.status),
    );
    if (!next) return;
    this.ahead = new Image();
    this.ahead.src = address(`/images/${next.id}/file`);
  }

  // ------------------------------------------------------------------------------------------------- states

  #covered(content) {
    this.#sheet = null;
    this.#saver = null;
    this.editor.clear();
    this.#boxes = [];
    this.#rejected = [];
    this.name.textContent = "";
    this.facts.textContent = "";
    this.cover.hidden = false;
    put(this.cover, content);
    this.#paint();
  }

  #noImages() {
    const { indexing } = this.project;
    this.#covered(
      indexing
        ? empty("The folder is being read", "Its images come up here as soon as they are known.")
        : h(
            "section.empty",
            { testid: "empty" },
            h("h2", {}, "No images yet"),
            h("p", {}, "Add some; they are copied into the app's folder and never leave this machine."),
            uploadPanel(this.project, () => this.start()),
          ),
    );
    if (indexing)
      setTimeout(() => {
        if (this.#asked >= 0) this.start();
      }, 1000);
  }

  #finished() {
    this.app
      .refresh()
      .then((project) => this.queue.progress(project))
      .catch(() => {});
    const go = (screen) => () => this.app.go(screen);
    this.#covered(
      empty(
        "Nothing is left to do",
        "Every image was inspected or skipped. Train on them, see whether errors are left, or export the labels.",
        button("go-train", "Train", go("train"), { kind: "primary" }),
        button("go-stop", "Errors left?", go("stop")),
        button("go-export", "Export", go("export")),
      ),
    );
  }

  #taken(id, error) {
    const until = new Date(error.body.lease.until).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    this.#covered(
      h(
        "section.empty",
        { testid: "taken" },
        h("h2", {}, "Somebody has this image open"),
        h(
          "p",
          {},
          `Another tab or person holds it until ${until}. If both edit it, the second to save is asked ` +
            `whose boxes count.`,
        ),
        h(
          "div.row",
          {},
          button("open-anyway", "Open it anyway", () => this.open(id, { anyway: true })),
          button("next-image", "Next image", () => this.#next(null), { kind: "primary" }),
        ),
      ),
    );
  }

  #state(saver, name, error) {
    if (saver !== this.#saver && name !== "failed" && name !== "refused") {
      if (name === "saved") this.app.banner(null);
      return;
    }
    this.saved.textContent = STATES[name];
    this.saved.dataset.state = name;
    if (name === "failed" || name === "refused") {
      const kept = name === "failed" ? "is kept here and tried again" : "is kept here, and goes with your next edit";
      this.app.banner(
        `Your last edit is not saved${name === "failed" ? " yet" : ""}. ${error.message} It ${kept}.`,
        button("retry-save", "Try now", () => saver.retry()),
      );
    } else if (name === "saved") this.app.banner(null);
  }

  #say(error) {
    this.notice.hidden = !error;
    put(this.notice);
    complain(this.notice, error);
    if (error) this.notice.append(iconButton("close-notice", "reject", "Close this message", () => this.#say(null)));
  }

  // ------------------------------------------------------------------------------------------------- boxes

  #adopt(sheet, boxes) {
    this.#sheet = sheet;
    this.undo.disabled = !sheet.can_undo;
    this.redo.disabled = !sheet.can_redo;
    this.queue.mark(this.#counted(sheet));
    if (this.#nudge) return; // what is shown is newer, and will be written
    const unnamed = this.#boxes.filter((box) => !box.class_id && this.#drawnOn === sheet.image.id);
    this.#boxes = inOrder([...boxes.filter((box) => box.status !== "rejected").map(asDrawn), ...unnamed]);
    if (boxes.some((box) => !this.classes.has(box.class_id))) this.picker.load().catch(() => {}); // a run made one
    this.#drawnOn = sheet.image.id;
    this.#paint();
    this.#fetchRejected(sheet);
  }

  async #fetchRejected(sheet) {
    const here = () => this.#sheet?.image.id === sheet.image.id && this.#sheet.version === sheet.version;
    if (!sheet.image.counts.rejected) {
      this.#rejected = [];
    } else {
      const all = await get(`/images/${sheet.image.id}/boxes`, { rejected: true }).catch(() => null);
      if (!all || !here()) return;
      this.#rejected = all.boxes
        .filter((box) => box.status === "rejected")
        .map((box) => ({ ...box, key: `r${box.id}` }));
    }
    this.#paint();
  }

  // What is mined has low scores of its own kind: it is hidden only once a person has moved the slider.
  #isShown(box) {
    if (box.status !== "proposed" || box.score === null || box.score === undefined) return true;
    return box.score >= this.minScore || (box.source === "mined" && !isScoreChosen());
  }

  #paint() {
    const shown = this.#boxes.filter((box) => this.#isShown(box));
    this.#stale = this.editor.busy;
    if (!this.#stale) this.editor.boxes = [...this.#rejected, ...shown];
    const hidden = this.#boxes.length - shown.length;
    this.boxCount.textContent = shown.length ? plural(shown.length, "box", "boxes") : "Boxes";
    this.#tellHidden(shown.length, hidden);
    this.acceptAll.disabled = !shown.some((box) => box.status === "proposed");
    put(
      this.boxList,
      shown.map((box, place) => this.#row(box, place)),
      !shown.length && this.#sheet
        ? h(
            "li.note",
            {},
            hidden
              ? "Every proposal has a lower score than the slider asks for."
              : "No box. Drag on the image to draw one, or save it as inspected: then it shows no object.",
          )
        : null,
    );
    this.#selected();
  }

  // Proposals below the slider are spoken of beside the list; above the image too where nothing else is to be seen.
  #tellHidden(shown, hidden) {
    const lie = `${plural(hidden, "proposal")} below ${this.minScore.toFixed(2)}`;
    const show = (testid) =>
      button(testid, hidden > BEST ? "Show the best" : hidden > 1 ? "Show them" : "Show it", () => this.#showBest(), {
        kind: "quiet",
        title: "Move the slider down to them",
      });
    const gone = `${lie} hidden; gone once the image is inspected. `;
    put(this.hiddenNote, hidden ? [gone, shown ? show("show-hidden") : null] : null);
    this.onlyHidden.hidden = shown > 0 || !hidden;
    put(this.onlyHidden, shown || !hidden ? null : [`${lie}, none above. `, show("show-best")]);
  }

  // Move the slider to where some more proposals are seen, all of them if they are few.
  #showBest() {
    const hidden = inOrder(this.#boxes.filter((box) => !this.#isShown(box)));
    if (!hidden.length) return;
    const { score } = hidden[Math.min(BEST, hidden.length) - 1];
    this.score.value = Math.floor(score / SCORE_STEP + 1e-6) * SCORE_STEP;
    this.setScore(Number(this.score.value));
    this.editor.focus({ preventScroll: true });
  }

  #row(box, place) {
    const kind = this.classes.get(box.class_id);
    const [x0, y0, x1, y1] = box.xyxy;
    const scored = box.status === "proposed" && box.score !== null;
    const chosen = box.key === this.editor.selected?.key;
    return h(
      `li.box-row${chosen ? ".selected" : ""}`,
      { "data-key": box.key },
      h(
        "button.box-main",
        {
          type: "button",
          testid: "box-row",
          "aria-pressed": String(chosen),
          onclick: () => {
            this.editor.select(box.key);
            this.editor.focus();
          },
        },
        h("span.number", {}, place + 1),
        h(`i.swatch.${box.status}`),
        h("span.class-name", { dir: "auto" }, kind && !this.#isUnnamed(box) ? kind.name : "Name it: C"),
        h("span.muted", {}, box.ignore ? "ignored" : scored ? decimal(box.score, 2) : box.status),
        h("span.place", {}, [x0, y0].map(Math.round).join(", "), "   ", [x1 - x0, y1 - y0].map(Math.round).join(" × ")),
      ),
      h(
        "span.box-actions",
        {},
        box.status === "proposed"
          ? iconButton("accept-box", "accept", `Accept box ${place + 1}`, () => this.#accept(box.key))
          : null,
        iconButton(
          "remove-box",
          box.source === "user" ? "remove" : "reject",
          `${box.source === "user" ? "Remove" : "Reject"} box ${place + 1}`,
          () => this.#remove(box.key),
        ),
      ),
    );
  }

  #selected() {
    const key = this.editor.selected?.key;
    for (const row of this.boxList.children) {
      const chosen = row.dataset.key !== undefined && row.dataset.key === key;
      if (row.classList.contains("selected") !== chosen) {
        row.classList.toggle("selected", chosen);
        row.firstChild.setAttribute("aria-pressed", String(chosen));
      }
      if (chosen) row.scrollIntoView({ block: "nearest" });
    }
    const usable = Boolean(this.editor.selected?.id);
    for (const one of this.shots.children) one.disabled = !usable;
  }

  // A box was drawn or changed. One that was taken away while it was being changed is as if it had been drawn.
  #edited({ what, box: seen }) {
    const box = this.#find(seen.key);
    if (box) {
      box.xyxy = [...seen.xyxy];
      if (this.#isUnnamed(box)) box.class_id = this.picker.current;
      touch(box);
    } else {
      const class_id = this.#isUnnamed(seen) ? this.picker.current : (seen.class_id ?? this.picker.current);
      const drawn = { id: undefined, class_id, status: "manual", source: "user", score: null };
      this.#boxes.push({ ...seen, ...drawn, xyxy: [...seen.xyxy] });
    }
    this.#paint();
    if (this.#boxes.some((one) => !one.class_id)) {
      this.picker.focus();
      toast("Name the box: type a class and press Enter.");
      return;
    }
    if (this.keyed && what !== "draw") {
      clearTimeout(this.#nudge);
      this.#nudge = setTimeout(() => this.#commit(), NUDGE_MS);
    } else this.#save();
  }

  #commit() {
    if (!this.#nudge) return;
    clearTimeout(this.#nudge);
    this.#nudge = null;
    this.#save();
  }

  #save(options) {
    clearTimeout(this.#nudge);
    this.#nudge = null;
    return this.#saver?.save(this.#boxes, options);
  }

  // A class was chosen: it is that of the selected box, which so is accepted, and of the next one drawn. One that was just
  // added is that of boxes that waited for a name, and of no other: somebody may be listing all classes in advance.
  #picked(id, { added = false, gone = false } = {}) {
    const asked = this.#nameless;
    this.#nameless = null;
    if (id !== null && added) {
      const drawn = this.#boxes.filter((one) => !one.class_id);
      for (const one of drawn) one.class_id = id;
      this.#paint();
      if (drawn.length) this.#save();
      else if (asked) asked();
      else toast(`Boxes that you draw now are “${this.classes.get(id).name}”.`);
    } else if (id !== null) {
      const box = this.#find(this.editor.selected?.key);
      for (const one of this.#boxes) if (!one.class_id) one.class_id = id;
      const undecided = box?.status === "proposed";
      if (box && (undecided || box.class_id !== id || !box.id)) {
        const asProposed = box.class_id === id || this.#isUnnamed(box);
        if (undecided && asProposed) box.status = "inspected";
        else touch(box);
        box.class_id = id;
        this.#paint();
        this.#save();
        if (undecided) this.#onward(this.#boxes.indexOf(box) + 1);
      } else this.#paint();
    } else if (gone) {
      const image = this.#sheet?.image.id;
      if (image) {
        this.#saver = null;
        this.open(image);
      }
    }
    this.editor.focus({ preventScroll: true });
  }

  #classesChanged(classes) {
    this.classes = new Map(classes.map((one) => [one.id, one]));
    this.editor.classes = new Map(classes.filter((one) => !isUnnamed(one)).map((one) => [one.id, one]));
    this.queue.classes = classes;
    if (this.#sheet) this.#paint();
  }

  #find(key) {
    return this.#boxes.find((box) => box.key === key);
  }

  #accept(key) {
    const box = this.#find(key);
    if (!box) return;
    if (box.status === "proposed") {
      if (!this.#name([box], () => this.#accept(key))) return;
      box.status = "inspected";
      this.#paint();
      this.#save();
    }
    this.#onward(this.#boxes.indexOf(box) + 1);
  }

  // Give boxes that have no name the current class; where there is none, ask for it, say no, and do `again` afterwards.
  #name(boxes, again) {
    const unnamed = boxes.filter((box) => this.#isUnnamed(box));
    if (unnamed.length && !this.picker.current) {
      this.#nameless = again;
      this.picker.focus();
      toast("Name it: type a class and press Enter.");
      return false;
    }
    for (const box of unnamed) box.class_id = this.picker.current;
    return true;
  }

  #remove(key) {
    const place = this.#boxes.findIndex((box) => box.key === key);
    if (place < 0) return;
    this.editor.cancel(); // a drag on it would bring it back
    const [box] = this.#boxes.splice(place, 1);
    if (box.source !== "user" && box.id) this.#rejected.push({ ...box, status: "rejected", key: `r${box.id}` });
    this.#paint();
    this.#save();
    this.#onward(place);
  }

  // Select the next proposal from a place on that nobody has decided on; nothing where none is left, so that no key
  // changes what is settled.
  #onward(place = 0) {
    const next = [...this.#boxes.slice(place), ...this.#boxes.slice(0, place)].find(
      (box) => box.status === "proposed" && this.#isShown(box),
    );
    this.editor.select(next?.key ?? null);
  }

  setScore(score) {
    this.minScore = score;
    chooseScore(score);
    this.scoreText.textContent = score.toFixed(2);
    this.#paint();
    if (!this.editor.selected) this.#onward();
    clearTimeout(this.recounting);
    this.recounting = setTimeout(() => this.#recount().catch((error) => this.#say(error)), RECOUNT_MS);
  }

  // The image of a sheet with as many boxes as are shown.
  #counted({ image, boxes }) {
    const proposed = boxes.filter((box) => box.status === "proposed" && this.#isShown(box)).length;
    return { ...image, counts: { ...image.counts, proposed } };
  }

  async #recount() {
    await Promise.all([this.picker.load(), this.queue.load()]);
    if (this.#sheet) this.queue.current(this.#counted(this.#sheet));
  }

  async shot(negative) {
    const box = this.editor.selected;
    if (!box?.id) return;
    try {
      await this.#saver?.settled();
      await post(`/projects/${this.project.id}/shots`, { box_id: box.id, negative });
      toast(negative ? "A negative shot more." : "A shot more.");
    } catch (error) {
      this.#say(error);
    }
  }

  // ------------------------------------------------------------------------------------------------- actions

  async do(action, details = {}) {
    const editor = this.editor;
    const key = editor.selected?.key;
    if (action === "keys") {
      showKeys();
      return;
    }
    if (action === "find-class") {
      this.picker.focus();
      return;
    }
    if (!this.#sheet || this.#moving) return;
    this.#say(null);
    this.#nameless = null;
    if (action !== "move" && action !== "resize") this.#commit();
    switch (action) {
      case "next-box":
        editor.step(1);
        break;
      case "previous-box":
        editor.step(-1);
        break;
      case "accept":
        if (key) this.#accept(key);
        else this.#onward();
        break;
      case "accept-all":
        this.#acceptShown();
        break;
      case "reject":
      case "remove":
        if (key) this.#remove(key);
        break;
      case "class": {
        const id = this.picker.byDigit(details.digit);
        if (id !== null) this.picker.choose(id);
        break;
      }
      case "ignore":
        this.#ignore(key);
        break;
      case "draw":
        editor.drawInView();
        break;
      case "move":
        if (key) {
          this.keyed = true;
          editor.nudge(...details.by);
          this.keyed = false;
        } else editor.panBy(-40 * Math.sign(details.by[0]), -40 * Math.sign(details.by[1]));
        break;
      case "resize":
        this.keyed = true;
        editor.grow(...details.by);
        this.keyed = false;
        break;
      case "escape":
        if (!editor.cancel()) editor.select(null);
        this.#paint();
        break;
      case "zoom-in":
        editor.zoomBy(1.25);
        break;
      case "zoom-out":
        editor.zoomBy(1 / 1.25);
        break;
      case "fit":
        editor.fit();
        break;
      case "undo":
        if (!this.undo.disabled || this.#saver.pending) await this.#travel("/undo");
        break;
      case "redo":
        if (!this.redo.disabled) await this.#travel("/redo");
        break;
      case "back": {
        const before = this.queue.beside(this.#sheet.image.id, -1)?.id ?? this.#openBefore(this.#sheet.image.id);
        if (before) await this.open(before);
        else toast("This is the first image.");
        break;
      }
      case "detect":
        await this.#detect();
        break;
      case "skip":
        await this.#done(() => this.#saver.write("PUT", "/status", { status: "skipped" }));
        break;
      case "inspected":
        await this.#inspected();
        break;
    }
  }

  // Undo or redo, and select the box that it changed: the next key is meant for that one.
  async #travel(path) {
    const saver = this.#saver;
    const before = new Map(this.#boxes.map((box) => [box.key, stamp(box)]));
    if (!(await saver.write("POST", path)) || saver !== this.#saver) return;
    const changed = this.#boxes.find((box) => before.get(box.key) !== stamp(box) && this.#isShown(box));
    if (changed) this.editor.select(changed.key);
    else if (!this.editor.selected) this.#onward();
  }

  #ignore(key) {
    const box = this.#find(key);
    if (!box) return;
    box.ignore = !box.ignore;
    if (this.#isUnnamed(box)) box.class_id = this.picker.current ?? box.class_id;
    touch(box);
    this.#paint();
    this.#save();
  }

  #acceptShown() {
    const shown = this.#boxes.filter((box) => box.status === "proposed" && this.#isShown(box));
    if (!shown.length || !this.#name(shown, () => this.#acceptShown())) return;
    for (const box of shown) box.status = "inspected";
    this.#paint();
    this.#save();
    this.#onward();
  }

  async #inspected() {
    if (this.#boxes.some((box) => !box.class_id)) {
      this.#say(new Error("A box has no class yet: type one (C) and press Enter, or remove the box."));
      return;
    }
    const shown = this.#boxes.filter((box) => this.#isShown(box) && !(box.source === "mined" && this.#isUnnamed(box)));
    await this.#done(() => this.#saver.save(shown, { inspected: true, minScore: this.minScore }));
  }

  // Write that this image is done with, and show the next.
  async #done(write) {
    const { image } = this.#sheet;
    this.#moving = true;
    try {
      const sheet = await write();
      if (!sheet) return;
      this.queue.mark(this.#counted(sheet));
      await this.#next(image.id);
      this.#count().catch((error) => this.#say(error)); // keys are for the next image already
    } catch (error) {
      this.#say(error);
    } finally {
      this.#moving = false;
    }
  }

  // How many images are done, and how many boxes have each class.
  async #count() {
    this.project = await this.app.refresh();
    this.queue.progress(this.project);
    if (!this.picker.element.contains(document.activeElement)) await this.picker.load();
  }

  async #detect() {
    const { image } = this.#sheet;
    const label = this.detectButton.lastChild;
    this.detectButton.disabled = true;
    label.textContent = "Detecting…";
    try {
      await this.#saver.settled();
      const run = await post(`/images/${image.id}/detect`, this.model.value ? { model: this.model.value } : {});
      await finished(run, ({ position }) => {
        if (position) label.textContent = `Waiting: ${position}`;
      });
      if (this.#sheet?.image.id !== image.id) return;
      await this.#saver.settled();
      await this.picker.load();
      const sheet = await get(`/images/${image.id}/boxes`);
      this.#saver.know(sheet);
      this.#adopt(sheet, this.#saver.keyed(sheet.boxes));
      this.queue.current(this.#counted(sheet));
      this.#onward();
      const found = this.#boxes.filter((box) => box.status === "proposed");
      const shown = found.filter((box) => this.#isShown(box)).length;
      const below = shown < found.length ? `, ${count(found.length - shown)} of them below the score` : "";
      toast(found.length ? `${plural(found.length, "proposal")}${below}.` : "The detector found nothing here.");
    } catch (error) {
      this.#say(error);
    } finally {
      this.detectButton.disabled = false;
      label.textContent = "Detect";
    }
  }

  async #models() {
    const { models } = await get(`/projects/${this.project.id}/models`).catch(() => ({ models: [] }));
    if (!models.length)
      this.detectButton.title = "There is no detector yet: what may be objects is told from the images alone";
    this.model.hidden = models.length < 2;
    offerModels(this.model, models);
    this.model.value = inUse(models)?.id ?? models[0]?.id ?? "";
  }

  // ------------------------------------------------------------------------------------------------- keys

  #key(event) {
    if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
    const target = event.target;
    if (target.closest?.("input:not([type=range]), textarea, select")) return;
    const inEditor = target === this.editor || target === document.body;
    if (event.key === " " || event.key === "Enter") {
      if (!inEditor && target.closest?.("button, a, summary, input")) return;
      event.preventDefault();
      if (event.key === "Enter") {
        if (!event.repeat) this.do("inspected");
        return;
      }
      if (!event.repeat) {
        this.editor.panning = true;
        this.editor.panned = false;
      }
      return;
    }
    if (event.key === "Tab" && target === this.editor) {
      if (this.editor.step(event.shiftKey ? -1 : 1, { round: false })) event.preventDefault();
      return;
    }
    const found = actionOf(event);
    if (!found) return;
    if (target.type === "range" && ["move", "resize"].includes(found.action)) return;
    if (
      event.repeat &&
      !["move", "resize", "zoom-in", "zoom-out", "undo", "redo", "next-box", "previous-box"].includes(found.action)
    )
      return;
    event.preventDefault();
    this.do(found.action, found);
  }

  #keyUp(event) {
    if (event.key !== " " || !this.editor.panning) return;
    this.editor.panning = false;
    if (!this.editor.panned) this.do("inspected");
  }
}
