"""Tables on proposals: results of rivals, sweep, mining_scale and mining_end_to_end in, Markdown out."""

from __future__ import annotations

from typing import Any

SETS = ("fod", "coco256", "bccd")
ROWS = {
    "ours": "**simdetr**, ≤ 25 boxes",
    "ours, at most 100 boxes": "simdetr, ≤ 100 boxes",
    "ours, the document's rule, limits for these features": "the document's filters, ≤ 25 boxes",
    "Selective Search": "Selective Search, 128 × 128, fast",
    "LOST": "LOST",
    "TokenCut": "TokenCut",
    "MaskCut": "MaskCut",
    "random boxes": "random boxes",
}


OLD_RANKING = "Mined with the ranking before that of 2026-11-28, which looks at the encoder too and is ahead (the log)."


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def rivals(result: dict[str, Any]) -> str:
    """Recall of ours beside every rival's, by number of boxes, then by object size."""
    found = {(row["set"], row["method"]): row for row in result["rows"] if row["encoder"] in (None, "colour-texture")}
    lines = [
        (
            "**Recall of mined boxes, no labels and no network weights** (colour-texture encoder, 448 px; "
            f"class-agnostic average recall, percent, {result['rows'][0]['images']} val images per set): "
            "with 25 / 30 / 100 boxes per image."
        ),
        "",
        "| method | " + " | ".join(SETS) + " | small / medium / large objects of coco256, 25 boxes |",
        "|---|" + "--:|" * (len(SETS) + 1),
    ]
    for method, name in ROWS.items():
        if (SETS[0], method) not in found:
            continue
        cells = [" / ".join(percent(found[key, method][f"AR@{k}"]) for k in (25, 30, 100)) for key in SETS]
        cells.append(" / ".join(percent(found["coco256", method][f"AR@25{size}"]) for size in "sml"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        (
            "The document reports, on COCO val: Selective Search 10.9, its own proposals 13.4, after stages 1 "
            "and 2 25.9 and 27.1. Object sizes are COCO's; Selective Search's order is random: mean of three seeds. "
            + OLD_RANKING
        ),
    ]
    return "\n".join(lines) + "\n"


def sweep(result: dict[str, Any]) -> str:
    """What each step from the document's boxes to ours gives."""
    steps = {
        "the document's filters": "grid of 16 px, the document's filters (a)-(e)",
        "cell_px 16": "level sets on cells of 16 px, ranked by contour and recurrence",
        "cell_px 8": "level sets on cells of 8 px",
        "chosen": "level sets on cells of 4 px (chosen)",
        "cell_px 2": "level sets on cells of 2 px",
        "edge_power 0.0": "chosen, without the contour's strength in the ranking",
        "border_factor 1.0": "chosen, without the penalty for the image's border",
        "levels (0.5,)": "chosen, one level (0.5)",
    }
    rows = {row["variant"]: row for row in result["train"]}
    lines = [
        "**What each step gives** (AR with at most 25 boxes on training images, where settings were chosen; percent):",
        "",
        "| boxes | " + " | ".join(SETS) + " |",
        "|---|" + "--:|" * len(SETS),
    ]
    for name, text in steps.items():
        if name in rows:
            lines.append(f"| {text} | " + " | ".join(percent(rows[name][key]["AR"]) for key in SETS) + " |")
    lines += ["", OLD_RANKING]
    return "\n".join(lines) + "\n"


def scale(result: dict[str, Any]) -> str:
    """Cost against the number of images."""
    lines = [
        f"**Cost of mining against the number of images** ({result['what']}, {result['ranks']} ranks of one thread):",
        "",
        "| images | wall | images/s | store | memory of one rank |",
        "|--:|--:|--:|--:|--:|",
    ]
    for run in result["runs"]:
        lines.append(
            f"| {run['images']:,} | {run['seconds']:.0f} s | {run['images'] / run['seconds']:.1f} | "
            f"{run['store_mb']:.0f} MB | {run['peak_rss_mb_of_a_process']:.0f} MB |"
        )
    if "largest_deviation" in result:
        lines += [
            "",
            (
                f"A line of {result['start_seconds']:.0f} s to start and "
                f"{result['images_per_second']:.1f} images/s is {100 * result['largest_deviation']:.1f} % off at most."
            ),
        ]
    return "\n".join(lines) + "\n"


def end_to_end(result: dict[str, Any]) -> str:
    """Mining against decoding and encoding alone."""
    lines = [
        f"**Mining against decoding and the encoder alone** ({result['what']}; CPU):",
        "",
        "| encoder, boxes | decode + encode | mine | ratio |",
        "|---|--:|--:|--:|",
    ]
    for name, row in result["rows"].items():
        times = row["ms_per_image"]
        lines.append(
            f"| {name} | {times['decode_and_encode']:.0f} ms | {times['mine']:.0f} ms | {row['ratio']['median']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def ranking(result: dict[str, Any]) -> str:
    """How well mined boxes are ordered, by encoder: by the image alone, and with what the encoder sees."""
    lines = [
        (
            "**Whether the encoder knows objects**: the best mined boxes of validation images, class-agnostic, in "
            "percent, ordered by the image alone and with the encoder's features, from the same shapes; an untrained "
            "network is the control:"
        ),
        "",
        "| set | images | encoder | order | AR@1 | AR@10 | AR@25 | AP50 |",
        "|---|--:|---|---|--:|--:|--:|--:|",
    ]
    names = {"plain": "image alone", "default": "with features"}
    for row in result["rows"]:
        numbers = " | ".join(f"{100 * row[key]:.1f}" for key in ("AR@1", "AR@10", "AR@25", "AP50"))
        order = names[row["ranking"]]
        lines.append(f"| {row['set']} | {row['images']} | {row['encoder']} | {order} | {numbers} |")
    return "\n".join(lines) + "\n"
