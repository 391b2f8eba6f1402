"""Rows of the studies of pretraining in; tables, with the document's numbers beside ours, and the figure of docs out.

The document (US 2025/0265826 A1) pretrains on 1.3 M images of ImageNet or 118 k of COCO for ten epochs or more, and
fine-tunes on COCO; these studies take hundreds of images and minutes. Heights cannot be compared, only what is ahead of
what.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from simdetr.evaluation.compare import budget_text, format_mean
from simdetr.reports.charts import INK, LINE_COLOURS, style_panel, to_svg

TITLES = {
    "fod": "FOD-A",
    "neu_det": "NEU-DET",
    "bccd": "BCCD",
    "aquarium": "Aquarium",
    "traffic_lights": "Traffic lights",
}
ARMS = {
    "random": "random",
    "backbone": "backbone only",
    "stage1": "stage 1",
    "stage2": "stage 2",
    "detreg": "DETReg's objective",
    "selective-search": "on Selective Search",
}
FIGURE = Path(__file__).parents[1] / "docs" / "label_curves.svg"
Row = dict[str, Any]


# ----------------------------------------------------------------------------------------------------------------------
# AP by labels.


def by_budget(found: Mapping[str, Any]) -> dict[str, dict[str, list[Row]]]:
    """Rows of a set: budget -> arm -> one per seed, the fewest labels first."""
    rows = sorted(found["rows"], key=lambda row: row["labels"])
    table: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        table.setdefault(budget_text(row["label_budget"]), {}).setdefault(row["initialisation"], []).append(row)
    return table


def label_curves(result: Mapping[str, Any]) -> str:
    """Every arm by set and budget, and what stage 2 gains."""
    sets = {name: result["sets"][name] for name in TITLES if name in result["sets"]}
    arms = [arm for arm in ARMS if any(row["initialisation"] == arm for one in sets.values() for row in one["rows"])]
    heads = ["set", "labels", "boxes", "seeds", *(ARMS[arm] for arm in arms), "stage 2 − backbone only"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "--:|" * (len(heads) - 2)]
    for name, found in sets.items():
        for budget, rows in by_budget(found).items():
            own = [row for those in rows.values() for row in those]
            cells = [TITLES[name], budget, f"{mean(row['labels'] for row in own):,.0f}"]
            cells += [str(len({row["seed"] for row in own})), *(ap_cell(rows.get(arm, [])) for arm in arms)]
            lines.append("| " + " | ".join([*cells, gain_cell(found, budget)]) + " |")
    return (
        "COCO's AP in percent on validation images after fine-tuning with equal labels, steps, rates and architecture "
        "(but DETReg's, which has its own); mean ± deviation over seeds. *Backbone only* is an EfficientNet-Lite0 with "
        "ImageNet weights and a new transformer: what a user has without simdetr. The *stages* were pretrained from it "
        "on the training images without labels, by `simdetr pretrain` without a config. The difference is paired by "
        "seed; its 95 % interval covers seeds and validation images.\n\n" + "\n".join(lines) + "\n"
    )


def ap_cell(rows: Sequence[Row]) -> str:
    values = [100 * row["AP"] for row in rows]
    return "" if not values else format_mean(mean(values), stdev(values) if values[1:] else float("nan"))


def gain_cell(found: Mapping[str, Any], budget: str, arm: str = "stage2") -> str:
    for one in found["differences"]:
        if (one["label_budget"], one["initialisation"], one["metric"]) == (budget, arm, "AP"):
            interval = one["both"] or one["seeds"]
            return f"{one['mean']:+.1f}" + (f" ({interval['low']:+.1f} to {interval['high']:+.1f})" if interval else "")
    return ""


def saved_labels(result: Mapping[str, Any]) -> str:
    """How many labels the backbone alone needs for stage 2's AP with the fewest."""
    said = []
    for name, title in TITLES.items():
        saved = [one for one in result["sets"].get(name, {}).get("saved", []) if one["initialisation"] == "stage2"]
        budgets = list(by_budget(result["sets"][name])) if saved else []
        for one in saved:
            if one["label_budget"] == budgets[0]:
                unknown = one["bound"] and round(one["needed"] / one["labels"], 1) == 1
                times = f"{one['bound']} {one['needed'] / one['labels']:.1f}".strip()
                said.append(f"{title} more than were measured" if unknown else f"{title} {times}")
    if not said:
        return ""
    return (
        "**Labels saved**: for the AP that stage 2 has with the fewest labels, the backbone alone needs so many times "
        f"as many: {', '.join(said)}.\n"
    )


def draw_label_curves(result: Mapping[str, Any]) -> None:
    """AP against labels, a panel per set, with bands of one deviation."""
    sets = {name: result["sets"][name] for name in TITLES if name in result["sets"]}
    figure = Figure(figsize=(1 + 2.9 * len(sets), 2.9), layout="constrained")
    figure.patch.set_alpha(0)
    colours = dict(
        zip(("backbone", "stage2", "stage1", "random", "detreg", "selective-search"), LINE_COLOURS, strict=True)
    )
    shown: dict[str, Any] = {}
    for axes, (name, found) in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets.items(), strict=True):
        style_panel(axes, TITLES[name], "labelled boxes")
        axes.set_xscale("log")
        counts = [mean(row["labels"] for row in rows[next(iter(rows))]) for rows in by_budget(found).values()]
        axes.set_xticks(counts, [f"{count:,.0f}" for count in counts])
        axes.minorticks_off()
        for arm, colour in colours.items():
            table = [rows[arm] for rows in by_budget(found).values() if arm in rows]
            if not table:
                continue
            labels = [mean(row["labels"] for row in rows) for rows in table]
            values = [[100 * row["AP"] for row in rows] for rows in table]
            means = np.array([mean(one) for one in values])
            spread = np.array([stdev(one) if one[1:] else 0.0 for one in values])
            (shown[ARMS[arm]],) = axes.plot(labels, means, color=colour, marker="o", markersize=4, linewidth=1.8)
            if len(labels) > 1:
                axes.fill_between(labels, means - spread, means + spread, color=colour, alpha=0.18, linewidth=0)
            else:
                axes.errorbar(labels, means, spread, color=colour, linewidth=1.4)
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("AP, %", color=INK, fontsize=9)
    figure.legend(
        shown.values(),
        shown,
        loc="outside lower center",
        ncols=3 * len(sets),
        fontsize=9,
        frameon=False,
        labelcolor=INK,
    )
    FIGURE.write_text(to_svg(figure, "label_curves") + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# One thing changed.


DOCUMENT = {
    7: "Table 7, AR@100 on COCO: Selective Search 10.9, its own proposals 13.4, after stages 1 and 2 25.9 and 27.1",
    8: "Table 8, AP: baseline 48.3; Selective Search 48.7 and 48.6 after stages 1 and 2, its own boxes 48.9 and 49.6",
    9: "Table 9, ACC / AR / AP: 1 class – / 25.2 / 41.2; 256 80.0 / 23.9 / 43.8; 512 75.1 / 24.0 / 43.9; 2,048 53.8 / "
    "23.9 / 44.1",
    10: "Table 10, AP and proposals per image: stage 1 48.9, 36.5; stage 2 49.6, 54.5; stage 3 49.6, 71.7",
    11: "Table 11, AP: 10 epochs 48.9 and 49.6 after stages 1 and 2, 25 epochs 49.2 and 49.7",
}


def ablations(result: Mapping[str, Any]) -> str:
    """Everything but one thing as chosen."""
    plan, rows = result["plan"], result["rows"]
    scores: dict[tuple[str, int], list[Row]] = {}
    looks = {(row["variant"], row["stage"]): row for row in rows if "seed" not in row}
    for row in rows:
        if "seed" in row:
            scores.setdefault((row["variant"], row["stage"]), []).append(row)
    chosen = {stage: {row["seed"]: row["AP"] for row in scores.get(("chosen", stage), [])} for stage in (1, 2, 3)}
    heads = ["", "stage", "AP", "− as chosen", "AP50", "AR@100 before labels", "ACC", "boxes per image"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for name, variant in plan["variants"].items():
        for stage in variant.get("stages", [1]) or [0]:
            own, look = scores.get((name, stage), []), looks.get((name, stage))
            if not own:
                continue
            against = chosen[max(stage, 1) if name != "chosen" else 1]
            pairs = [100 * (row["AP"] - against[row["seed"]]) for row in own if row["seed"] in against]
            lines.append("| " + " | ".join([variant["title"], *_ablation_cells(name, stage, own, pairs, look)]) + " |")
    said = "; ".join(text for table, text in DOCUMENT.items() if table != 7)  # that of the stages' recall
    return (
        f"**One thing changed**: {plan['images']:,} images of {TITLES[plan['set']]} without labels, "
        f"{100 * plan['fraction']:g} % of the labelled ones for a fine-tuning, {len(plan['seeds'])} seeds, mean ± "
        "deviation and paired difference (in stages above 1 the chosen row's of the same stage; the chosen row's own "
        "are against its stage 1). Small and short; every row but those that say so has one stage. *ACC*: of the boxes "
        "that the detector finds again, those whose pseudo-class it tells.\n\n"
        + "\n".join(lines)
        + "\n\nThe document's, on ImageNet and COCO with hundreds of times the images and steps, so not to be "
        f"compared by height: {said}.\n"
    )


def _ablation_cells(name: str, stage: int, own: Sequence[Row], pairs: Sequence[float], look: Row | None) -> list[str]:
    cells = [str(stage) if stage else "", ap_cell(own)]
    itself = name == "chosen" and stage == 1
    cells.append("" if itself or not pairs else format_mean(mean(pairs), stdev(pairs) if pairs[1:] else float("nan")))
    cells.append(f"{mean(100 * row['AP50'] for row in own):.1f}")
    if look is None:
        return [*cells, "", "", ""]
    agreement = look["agreement"]
    accuracy = agreement["agreeing"] / agreement["found"] if agreement["classes"] > 1 and agreement["found"] else None
    cells += [f"{100 * look['AR@100']:.1f}", "" if accuracy is None else f"{100 * accuracy:.1f}"]
    return [*cells, f"{agreement['boxes'] / agreement['images']:.1f}"]


# ----------------------------------------------------------------------------------------------------------------------
# Before anybody labels.


def stages(result: Mapping[str, Any]) -> str:
    """Recall of every stage's boxes, and what the backbone is worth for classes of images."""
    numbers = ("AR@1", "AR@10", "AR@25", "AR@100", "AP50", "AP")
    lines = [
        f"| set | labels of | boxes per image | {' | '.join(numbers)} |",
        "|---|---|" + "--:|" * (1 + len(numbers)),
    ]
    for row in result["rows"]:
        alone = ", detector alone" if row["what"] != "labels" else ""
        what = f"stage {row['stage']}{alone}" if row["stage"] else "mining"
        values = " | ".join(f"{100 * row[name]:.1f}" for name in numbers)
        lines.append(f"| {TITLES[row['set']]} | {what} | {row['boxes_per_image']:.1f} | {values} |")
    probes = ["| set | classes | chance | before | stage 1 | stage 2 |", "|---|--:|--:|--:|--:|--:|"]
    for name in dict.fromkeys(row["set"] for row in result["probes"]):
        own = {row["backbone"]: row for row in result["probes"] if row["set"] == name}
        first = own["before"]
        cells = [TITLES[name], str(first["classes"]), f"{100 * first['chance']:.1f}"]
        cells += [_accuracy(own[one]) if one in own else "" for one in ("before", "stage 1", "stage 2")]
        probes.append("| " + " | ".join(cells) + " |")
    return (
        "**The labels of every stage**, class-agnostic, in percent, on validation images that no stage saw:\n\n"
        + "\n".join(lines)
        + f"\n\nThe document's {DOCUMENT[7]}.\n\n"
        "**Linear probe**: accuracy in percent (95 % interval) of a linear classifier of images on the frozen "
        "backbone, which began with ImageNet's classes (the document's Table 6: a backbone pretrained on COCO from "
        "random weights, 56.4 % on ImageNet):\n\n" + "\n".join(probes) + "\n"
    )


def _accuracy(row: Row) -> str:
    return f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
