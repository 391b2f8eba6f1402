"""The rows of benchmarks/real_sets.py in, paired differences and the two tables of the README out."""

import math
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from scipy import stats

from simdetr.evaluation.compare import format_mean

TITLES = {"fod": "FOD-A", "aquarium": "Aquarium", "neu_det": "NEU-DET"}
PAIRS = (("stage2", "backbone"), ("stage1", "backbone"), ("stage2", "random"))
ARMS = {"random": "random", "backbone": "backbone only", "stage1": "stage 1", "stage2": "stage 2"}
Row = dict[str, Any]


def part(rows: Iterable[Row], name: str) -> list[Row]:
    """Rows of a part of the study, in the order of the sets."""
    found = [row for row in rows if row["part"] == name]
    return sorted(found, key=lambda row: list(TITLES).index(row["set"]))


def budgets(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Sets and budgets of the fine-tunings, the fewest labels of a set first."""
    images = {(row["set"], row["budget"]): row["train_images"] for row in rows}
    return sorted(images, key=lambda key: (list(TITLES).index(key[0]), images[key]))


def aps(rows: Iterable[Row], name: str, budget: str, arm: str) -> dict[int, float]:
    """AP in percent by seed."""
    return {r["seed"]: 100 * r["AP"] for r in rows if (r["set"], r["budget"], r["arm"]) == (name, budget, arm)}


def paired_differences(rows: Iterable[Row], confidence: float = 0.95) -> list[Row]:
    """Mean differences in AP points between arms of equal seeds, with Student's interval, per set and budget."""
    finetunings = part(rows, "finetune")
    found = []
    for name, budget in budgets(finetunings):
        for arm, baseline in PAIRS:
            ours, theirs = (aps(finetunings, name, budget, one) for one in (arm, baseline))
            seeds = sorted(ours.keys() & theirs.keys())
            if len(seeds) < 2:
                continue
            test = stats.ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
            low, high = test.confidence_interval(confidence)
            difference = mean(ours[seed] - theirs[seed] for seed in seeds)
            row = {"set": name, "budget": budget, "arm": arm, "baseline": baseline, "pairs": len(seeds)}
            found.append(row | {"difference": difference, "low": float(low), "high": float(high)})
    return found


def label_table(rows: Iterable[Row]) -> str:
    """Quality of the labels of every stage; a detector alone has a row where the labels hold more than it finds."""
    lines = [
        "| set | labels of | boxes per image | AR@1 | AR@10 | AR@100 | AP50 | AP |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    of_stage: dict[tuple[str, int], list[Row]] = {}
    for row in part(rows, "labels"):
        of_stage.setdefault((row["set"], row["stage"]), []).append(row)
    for (name, stage), own in sorted(of_stage.items(), key=lambda item: (list(TITLES).index(item[0][0]), item[0][1])):
        labels = next(row for row in own if row["what"] == "labels")
        for row in own:
            if row["what"] != "labels" and row["AP"] == labels["AP"] and row["AR@100"] == labels["AR@100"]:
                continue
            what = "mining" if stage == 0 else f"stage {stage}" + (", detector alone" if row is not labels else "")
            numbers = [f"{100 * row[key]:.1f}" for key in ("AR@1", "AR@10", "AR@100", "AP50", "AP")]
            lines.append(f"| {TITLES[name]} | {what} | {row['boxes_per_image']:.1f} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def finetuning_table(rows: Sequence[Row]) -> str:
    """AP of every arm by set and budget, and what stage 2 gains over the backbone alone, paired by seed."""
    finetunings, paired = part(rows, "finetune"), paired_differences(rows)
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in finetunings)]
    lines = [
        "| set | labels | images | seeds | " + " | ".join(ARMS[arm] for arm in arms) + " | stage 2 − backbone only |",
        "|---|---|--:|--:|" + "--:|" * (len(arms) + 1),
    ]
    for name, budget in budgets(finetunings):
        own = [row for row in finetunings if (row["set"], row["budget"]) == (name, budget)]
        cells = [TITLES[name], budget, f"{mean(row['train_images'] for row in own):.0f}"]
        cells.append(str(len({row["seed"] for row in own})))
        for arm in arms:
            values = list(aps(own, name, budget, arm).values())
            cells.append(format_mean(mean(values) if values else math.nan, stdev(values) if values[1:] else math.nan))
        key = {"set": name, "budget": budget, "arm": "stage2", "baseline": "backbone"}
        gain = next((row for row in paired if key.items() <= row.items()), None)
        cells.append("" if gain is None else f"{gain['difference']:+.1f} ({gain['low']:+.1f} to {gain['high']:+.1f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def real_sets(result: dict[str, Any]) -> str:
    """Both tables under a heading each."""
    rows, parts = result["rows"], []
    if part(rows, "finetune"):
        parts.append(
            "**Is pretraining worth it?** COCO's AP in percent on validation images after fine-tuning on few labels, "
            "with equal labels, steps and architecture; mean ± deviation over seeds. *Backbone only* is the ImageNet "
            "EfficientNet-Lite0 with a new transformer, what a user has without simdetr; *stage 1* and *stage 2* were "
            "pretrained from it on the training images without labels. The difference is paired by seed, with its 95 % "
            "interval.\n\n" + finetuning_table(rows)
        )
    if part(rows, "labels"):
        pretrained = {row["set"]: row["images"] for row in part(rows, "pretrain")}
        images = ", ".join(f"{count:,} images of {TITLES[name]}" for name, count in pretrained.items())
        parts.append(
            f"**The labels of every stage** (pretrained on {images}), class-agnostic, in percent, on validation images "
            "that no stage saw:\n\n" + label_table(rows)
        )
    return "\n".join(parts)
