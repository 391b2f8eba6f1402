"""The rows of benchmarks/real_sets.py in; paired differences and the tables of README and docs out."""

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
    """Quality of the labels of every stage, and of what each stage's detector finds alone."""
    lines = ["| set | labels of | boxes per image | AR@1 | AR@10 | AR@100 | AP50 | AP |", "|---|---|" + "--:|" * 6]
    order = {name: place for place, name in enumerate(TITLES)}
    for row in sorted(part(rows, "labels"), key=lambda row: (order[row["set"]], row["stage"], row["what"])):
        alone = ", detector alone" if row["what"] != "labels" else ""
        what = f"stage {row['stage']}{alone}" if row["stage"] else "mining"
        numbers = [f"{100 * row[key]:.1f}" for key in ("AR@1", "AR@10", "AR@100", "AP50", "AP")]
        lines.append(f"| {TITLES[row['set']]} | {what} | {row['boxes_per_image']:.1f} | {' | '.join(numbers)} |")
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
    """What pretraining is worth: fine-tunings from few labels."""
    rows = result["rows"]
    return (
        "COCO's AP in percent on validation images after fine-tuning on few labels, with equal labels, steps, "
        "rates and architecture; mean ± deviation over seeds. *Backbone only* is an EfficientNet-Lite0 with "
        "ImageNet weights and a new transformer, what a user has without simdetr; the *stages* were pretrained "
        f"from it without labels, on {_pretrained_on(rows)}. The difference is paired by seed, with its 95 % "
        "interval.\n\n" + finetuning_table(rows)
    )


def stage_labels(result: dict[str, Any]) -> str:
    """The labels of every stage, and its detector alone."""
    rows = result["rows"]
    return (
        "**The labels of every stage**, class-agnostic, in percent, on validation images that no stage saw "
        f"(pretrained on {_pretrained_on(rows)}):\n\n" + label_table(rows)
    )


def _pretrained_on(rows: Sequence[Row]) -> str:
    images = ", ".join(f"{row['images']:,} images of {TITLES[row['set']]}" for row in part(rows, "pretrain"))
    return f"{images}, as `benchmarks/real_sets.yaml` says"
