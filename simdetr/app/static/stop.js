// Stop?: how many errors are likely left among what nobody has looked at, and what the next images would buy.

import { get, post } from "./api.js";
import { button, complain, h, put, s, toast } from "./elements.js";
import { about, count, percent, plural, sentence } from "./numbers.js";
import { shownScore } from "./shown-score.js";

const AUDIT = 20;

export class StopScreen {
  constructor(app) {
    this.app = app;
    this.confidence = h(
      "select",
      { testid: "confidence", "aria-label": "Confidence of the interval", onchange: () => this.start() },
      [0.8, 0.9, 0.95, 0.99].map((one) => h("option", { value: one }, percent(one))),
    );
    this.confidence.value = "0.95";
    this.body = h("div.stop", { testid: "estimate" });
    this.element = h(
      "div.page",
      { testid: "screen-stop" },
      h(
        "div.page-head",
        {},
        h(
          "div",
          {},
          h("h1", {}, "Is it enough?"),
          h(
            "p.muted",
            {},
            "Errors among the proposals on images that nobody has inspected, estimated from what you " +
              "accepted, corrected, rejected and drew.",
          ),
        ),
        h("label.row", {}, "Confidence ", this.confidence),
      ),
      this.body,
    );
  }

  async start() {
    complain(this.element, null);
    try {
      const asked = { confidence: this.confidence.value, min_score: shownScore() };
      this.#show(await get(`/projects/${this.app.project.id}/estimate`, asked));
    } catch (error) {
      complain(this.element, error);
    }
  }

  // Images that chance chose say what the others are like; those that were chosen for being difficult do not.
  async #audit() {
    try {
      const { images } = await post(`/projects/${this.app.project.id}/audit`, { images: AUDIT });
      toast(`${plural(images, "image")} come first in the queue now.`);
      this.app.go("label");
    } catch (error) {
      complain(this.body.firstChild, error);
    }
  }

  #show(found) {
    const left = found.errors_left;
    const tile = (name, value, note) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, value), note && h("dd.muted", {}, note));
    put(
      this.body,
      h(
        "section.card.answer",
        {},
        left
          ? h(
              "div",
              {},
              h("p.huge", { testid: "errors-left" }, `${about(left.total)} errors left`),
              h(
                "p.muted",
                {},
                `between ${about(left.low)} and ${about(left.high)}, at ${percent(left.confidence)}`,
              ),
              interval(left, found.left_detections),
              h(
                "p",
                {},
                `${about(left.wrong)} wrong boxes and ${about(left.missed)} missed objects. ` +
                  `${sentence(left.basis)}`,
              ),
            )
          : [h("p.huge", {}, "Not known yet"), h("p", { testid: "why" }, sentence(found.why))],
        h(
          "div.row",
          {},
          button("audit", `Draw ${AUDIT} images at random to inspect`, () => this.#audit()),
          found.left_detections
            ? null
            : h("a.button", { href: `#/p/${this.app.project.id}/progress`, testid: "go-detect" }, "To the detection"),
        ),
      ),
      h(
        "section.card",
        {},
        h("h2", {}, "The next 20 images"),
        found.next_20
          ? h(
              "p",
              { testid: "next-20" },
              `Would find about ${about(found.next_20.errors_found)} errors`,
              found.next_20.minutes === null
                ? "."
                : found.next_20.minutes < 1
                  ? " in less than a minute of your time."
                  : ` in about ${plural(Math.round(found.next_20.minutes), "minute")} of your time.`,
            )
          : h(
              "p.note",
              {},
              "What they would buy is known once there are proposals left and some images were inspected.",
            ),
        h(
          "div.row",
          {},
          button("go-label", "Go on labelling", () => this.app.go("label"), { kind: "primary" }),
          button("go-export", "Stop and export", () => this.app.go("export")),
        ),
      ),
      h(
        "section.card.wide",
        {},
        h("h2", {}, "What you did"),
        h(
          "dl.facts.tiles",
          {},
          tile("Inspected images", count(found.inspected)),
          tile("Accepted", count(found.accepted)),
          tile("Corrected", count(found.corrected)),
          tile("Rejected", count(found.rejected)),
          tile("Drawn", count(found.drawn)),
          tile("Images left", count(found.left_images)),
          tile("Proposals left", count(found.left_detections), "without mined ones"),
        ),
      ),
    );
  }
}

function interval({ total, low, high }, most) {
  const end = Math.max(most, high, 1);
  const at = (value) => 6 + (value / end) * 388;
  return s(
    "svg.interval",
    {
      viewBox: "0 0 400 34",
      role: "img",
      "aria-label": `from ${Math.round(low)} to ${Math.round(high)} of ${Math.round(end)}`,
    },
    s("line.grid", { x1: 6, x2: 394, y1: 10, y2: 10 }),
    s("line.span", { x1: at(low), x2: at(high), y1: 10, y2: 10 }),
    s("circle.total", { cx: at(total), cy: 10, r: 5 }),
    s("text", { x: 6, y: 30 }, 0),
    s("text", { x: 394, y: 30, "text-anchor": "end" }, count(end)),
  );
}
