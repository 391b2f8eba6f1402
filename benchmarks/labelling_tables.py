"""Tables and figures of the labelling engine's studies: JSON in, tables and an SVG file in docs/ out.

``tables.py`` calls the tables; the figure is drawn by

python -m benchmarks.labelling_tables
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy import stats

from benchmarks.environment import RESULTS
from benchmarks.real_set_tables import TITLES
from simdetr.evaluation.compare import format_mean

DOCS = Path(__file__).parents[1] / "docs"
Row = Mapping[str, Any]
STAGES = {
    "source": "found by the detector (source)",
    "verify": "after the votes (verify)",
    "correct": "after correction",
}
ARMS = {
    "few-shot": "the shots alone",
    "longer": "the same, twice the steps",
    "sourced": "+ its own surest detections",
    "verified": "+ votes",
    "full": "+ votes and correction",
}
ORDERS = {"queue": "clusters by turns, then unsure and unlike", "random": "random"}
HEADS = {
    "location": "location map",
    "ranking": "location map that ranks boxes",
    "pyramid": "spatial pyramid",
    "reversal": "gradient reversal",
}


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return format_mean(mean(values) if values else math.nan, stdev(values) if values[1:] else math.nan)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """Mean difference of equal seeds and its 95 % interval by Student's t, with the number of pairs."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return "–"
    difference = mean(ours[seed] - theirs[seed] for seed in seeds)
    if len(seeds) < 2:
        return f"{difference:+.1f} (1 pair)"
    test = stats.ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    low, high = test.confidence_interval(0.95)
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f}; {len(seeds)} pairs)"


def by_seed(rows: Sequence[Row], name: str = "AP", **keys: object) -> dict[int, float]:
    """A score in percent by seed, of the rows that have these values."""
    return {row["seed"]: 100 * row[name] for row in rows if all(row[key] == value for key, value in keys.items())}


def autolabel(result: Row) -> str:
    """Labels after every stage, and the detectors trained on them."""
    rows = result["rows"]
    groups = sorted({(row["set"], row["shots"]) for row in rows}, key=lambda g: (list(TITLES).index(g[0]), g[1]))
    lines = [
        (
            f"**A few labels to many: the labels** of {result['pool']:,} training images at most, from so many "
            "shots per class; means over seeds, with the standard deviation. Right is what overlaps an object of its "
            "class by at least .5; the mean IoU is that of the right ones."
        ),
        "",
        "| set | shots per class | seeds | boxes | precision, % | recall, % | mean IoU, % |",
        "|---|--:|--:|---|--:|--:|--:|",
    ]
    for name, shots in groups:
        full = [row for row in rows if (row["set"], row["shots"], row["arm"]) == (name, shots, "full")]
        for place, (stage, title) in enumerate(STAGES.items()):
            qualities = [row["stages"][place]["quality"] for row in full if row["stages"][place]["stage"] == stage]
            if qualities:
                numbers = [spread([100 * q[key] for q in qualities]) for key in ("precision", "recall", "mean_iou")]
                lines.append(f"| {TITLES[name]} | {shots} | {len(qualities)} | {title} | {' | '.join(numbers)} |")
            if stage == "source":
                lines += _surest(rows, name, shots)
    lines += [
        "",
        (
            f"**The detectors** trained on them: {result['steps']} steps on the shots, then {result['steps']} more "
            "on shots and labels, all from stage 2 of the pretraining; AP in percent on validation "
            "images that no training saw."
        ),
        "",
        "| set | shots per class | trained on | seeds | AP | AP50 | AP75 | AP − the shots alone, 95 % interval |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for name, shots in groups:
        keys = {"set": name, "shots": shots}
        base = by_seed(rows, arm="few-shot", **keys)
        for arm, title in ARMS.items():
            scores = [list(by_seed(rows, score, arm=arm, **keys).values()) for score in ("AP", "AP50", "AP75")]
            if not scores[0]:
                continue
            gain = "" if arm == "few-shot" else paired(by_seed(rows, arm=arm, **keys), base)
            cells = " | ".join(spread(values) for values in scores)
            lines.append(f"| {TITLES[name]} | {shots} | {title} | {len(scores[0])} | {cells} | {gain} |")
    return "\n".join(lines) + "\n"


def _surest(rows: Sequence[Row], name: str, shots: int) -> list[str]:
    """What the detector found, of several boxes on an object the surest: without votes, what is trained on."""
    own = [row for row in rows if (row["set"], row["shots"], row["arm"]) == (name, shots, "sourced")]
    if not own:
        return []
    qualities = [row["stages"][-1]["quality"] for row in own]
    numbers = [spread([100 * q[key] for q in qualities]) for key in ("precision", "recall", "mean_iou")]
    title = "the surest of them on each object, no votes"
    return [f"| {TITLES[name]} | {shots} | {len(own)} | {title} | {' | '.join(numbers)} |"]


def active(result: Row) -> str:
    """The loop against labelling by hand, orders of images, heads, and what was said of the errors left."""
    rows, settings = result["rows"], result["settings"]
    parts = {part: [row for row in rows if row["part"] == part] for part in ("by-hand", "loop", "first", "head")}
    found = []
    if parts["by-hand"] and parts["loop"]:
        found.append(_loops(parts["by-hand"], parts["loop"], settings))
    if parts["first"]:
        found.append(_orders(parts["first"], settings))
    if parts["head"]:
        found.append(_heads(parts["head"], parts["first"], settings))
    return "\n".join(found)


def _loops(by_hand: Sequence[Row], loops: Sequence[Row], settings: Row) -> str:
    base = by_seed(by_hand)
    lines = [
        (
            f"**The loop with a simulated person** (BCCD, 292 training images; {settings['rounds']} rounds of "
            f"{settings['images_per_round']} images and {settings['audited_per_round']} audited ones; the "
            "person takes 1.6 s to verify a box, 3.7 to 5.9 s to draw one, and redraws what "
            "overlaps by less than .7). All detectors of "
            f"{settings['final_steps']} steps from the same pretraining:"
        ),
        "",
        "| images in the order of | seeds | images | boxes | the person's minutes | AP | AP − by hand, 95 % interval |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for title, own in (
        ("every image by hand", by_hand),
        *((f"the loop, {title}", [row for row in loops if row["arm"] == order]) for order, title in ORDERS.items()),
    ):
        if own:
            numbers = [f"{mean(row[key] for row in own):,.0f}" for key in ("images", "boxes")]
            minutes = f"{mean(row['seconds'] for row in own) / 60:.0f}"
            gain = "" if own is by_hand else paired(by_seed(own), base)
            ap = spread(list(by_seed(own).values()))
            lines.append(f"| {title} | {len(own)} | {' | '.join(numbers)} | {minutes} | {ap} | {gain} |")
    estimates = [(r["errors_left"], r["really_left"]) for row in loops for r in row["rounds"] if "errors_left" in r]
    inside = sum(estimate["low"] <= left <= estimate["high"] for estimate, left in estimates)
    ratios = [estimate["total"] / left for estimate, left in estimates if left]
    lines += [
        "",
        (
            f"**Errors left, as said and as they were**: in {inside} of {len(estimates)} rounds the 95 % interval held "
            "what was really wrong or missed among the images that nobody had seen; the estimate was "
            f"{mean(ratios):.2f} of it on average ({min(ratios):.2f} to {max(ratios):.2f})."
        ),
    ]
    return "\n".join(lines) + "\n"


def _orders(rows: Sequence[Row], settings: Row) -> str:
    base = by_seed(rows, arm="random")
    lines = [
        (
            f"**Which {settings['first_images']} images first**, before anything is labelled (BCCD; all their boxes "
            f"drawn, {settings['first_steps']} steps of 4):"
        ),
        "",
        "| order | seeds | boxes | AP | AP − random, 95 % interval |",
        "|---|--:|--:|--:|--:|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        gain = "" if arm == "random" else paired(by_seed(own), base)
        boxes = f"{mean(row['boxes'] for row in own):,.0f}"
        lines.append(f"| {arm} | {len(own)} | {boxes} | {spread(list(by_seed(own).values()))} | {gain} |")
    return "\n".join(lines) + "\n"


def _heads(rows: Sequence[Row], first: Sequence[Row], settings: Row) -> str:
    plain = by_seed(first, arm="random")
    lines = [
        (
            "**Heads for few labelled images**, each beside the plain detector on the same "
            f"{settings['first_images']} random images (BCCD, {settings['first_steps']} steps of 4):"
        ),
        "",
        "| detector | seeds | AP | AR@100 | AP − plain, 95 % interval |",
        "|---|--:|--:|--:|--:|",
    ]
    random = [row for row in first if row["arm"] == "random"]
    for title, own in (
        ("plain", random),
        *((title, [row for row in rows if row["arm"] == head]) for head, title in HEADS.items()),
    ):
        if own:
            gain = "" if own is random else paired(by_seed(own), plain)
            scores = " | ".join(spread(list(by_seed(own, name).values())) for name in ("AP", "AR@100"))
            lines.append(f"| {title} | {len(own)} | {scores} | {gain} |")
    return "\n".join(lines) + "\n"


def stopping(result: Row) -> str:
    """How often the interval of the errors left holds them, over simulated loops."""
    rows = result["coverage"]
    told = [row for row in rows if row["informative"]]
    shares = [row["coverage"] for row in told]
    return (
        f"**The interval of the errors left**, promised 95 %: over {result['loops']:,} simulated loops for each of "
        f"{len(told)} settings (rates of errors, how they cluster on images, sizes of the audit) it held them in "
        f"{100 * min(shares):.1f} to {100 * max(shares):.1f} % of the loops, {100 * mean(shares):.1f} % on average; "
        f"{sum(row['met'] for row in told)} settings lie within 92 to 98 %.\n"
    )


def verification(result: Row) -> str:
    """Time and memory of the votes."""
    time, memory = result["time"], result["memory"]
    return (
        f"**Verification**: decoding, cropping, encoding and votes of {time['candidates']:,} candidates "
        f"({time['encoder']}, {time['crop_px']} px) take {time['wall']['ratio']:.2f} × the time of the encoder "
        f"alone on crops in memory (bar 1.1, in turns). {memory['candidates']:,} candidates need "
        f"{memory['beyond_gib']:.2f} GiB beyond the model (bar {memory['bar_gib']:.0f}).\n"
    )


def draw_loop(result: Row, path: Path) -> None:
    """AP against the person's minutes: a line per loop and its last training, a point per labelling by hand."""
    rows = result["rows"]
    figure, panel = plt.subplots(figsize=(6.4, 3.6))
    for colour, (order, title) in zip(("#e4711b", "#4682e6"), ORDERS.items(), strict=True):
        for number, row in enumerate(r for r in rows if r["part"] == "loop" and r["arm"] == order):
            minutes = [r["seconds"] / 60 for r in row["rounds"]]
            panel.plot(
                minutes,
                [100 * r["AP"] for r in row["rounds"]],
                "o-",
                ms=3,
                lw=1,
                color=colour,
                label=None if number else f"loop: {title}",
            )
            last = None if number else "its last labels, trained as long as those by hand"
            panel.plot(minutes[-1], 100 * row["AP"], "D", ms=5, color=colour, label=last)
    own = [row for row in rows if row["part"] == "by-hand"]
    panel.plot(
        [row["seconds"] / 60 for row in own],
        [100 * row["AP"] for row in own],
        "s",
        color="#444444",
        label="every image by hand",
    )
    panel.set_xlabel("minutes of the person")
    panel.set_ylabel("AP, %")
    panel.set_ylim(0, 1.1 * max(100 * row["AP"] for row in rows))
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    result = json.loads((RESULTS / "active.json").read_text(encoding="utf-8"))
    draw_loop(result, DOCS / "labelling_loop.svg")


if __name__ == "__main__":
    main()
