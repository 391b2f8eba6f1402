// Somebody else wrote this image meanwhile: both states side by side, and the choice.

import { address } from "./api.js";
import { button, dialog, h, s } from "./elements.js";
import { plural } from "./numbers.js";

export function chooseSide(image, mine, theirs, classes) {
  return dialog(
    "This image was changed elsewhere",
    (close) =>
      h(
        "div",
        {},
        h(
          "p",
          {},
          "Your last edit was not saved yet, because another tab or person saved this image first. " +
            "Nothing is lost until you choose.",
        ),
        h(
          "div.sides",
          {},
          side("Yours", image, mine, classes, theirs),
          side("On the server", image, theirs, classes, mine),
        ),
        h(
          "div.row.end",
          {},
          button("take-theirs", "Take the server's", () => close("theirs")),
          button("keep-mine", "Keep mine", () => close("mine"), { kind: "primary" }),
        ),
      ),
    { wide: true, must: true, testid: "conflict" },
  ).then((choice) => choice ?? "theirs");
}

function side(title, image, boxes, classes, others) {
  const shown = boxes.filter((box) => box.status !== "rejected");
  const differs = (box) =>
    !others.some(
      (other) =>
        other.class_id === box.class_id && other.xyxy.every((value, place) => Math.abs(value - box.xyxy[place]) < 0.5),
    );
  return h(
    "section.side",
    {},
    h("h3", {}, title),
    s(
      "svg",
      {
        viewBox: `0 0 ${image.width} ${image.height}`,
        role: "img",
        "aria-label": `${title}: ${plural(shown.length, "box", "boxes")}`,
      },
      s("image", {
        href: address(`/images/${image.id}/thumbnail`, { size: 512 }),
        width: image.width,
        height: image.height,
        preserveAspectRatio: "none",
      }),
      shown.map(({ xyxy: [x0, y0, x1, y1], class_id }) =>
        s("rect", {
          x: x0,
          y: y0,
          width: x1 - x0,
          height: y1 - y0,
          style: { stroke: classes.get(class_id)?.colour ?? "#fff" },
        }),
      ),
    ),
    h("p.muted", {}, plural(shown.length, "box", "boxes")),
    h(
      "ul.differences",
      {},
      shown
        .filter(differs)
        .slice(0, 6)
        .map((box) =>
          h(
            "li",
            {},
            h("span", { dir: "auto" }, classes.get(box.class_id)?.name ?? "?"),
            ` at ${box.xyxy.map(Math.round).join(", ")}`,
          ),
        ),
    ),
  );
}
