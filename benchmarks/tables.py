"""Results in benchmarks/results/*.json in; the table of the README and those of docs/results.md out.

python -m benchmarks.tables
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.app_tables import labelling_app
from benchmarks.detector_tables import (
    coco_evaluation,
    deformable_attention,
    detector_families,
    inference_speed,
    matcher,
    start_up,
    training_step,
)
from benchmarks.environment import RESULTS
from benchmarks.head_tables import head_overhead, landmark_query, landmark_study, localisation_study
from benchmarks.labelling_tables import active, autolabel, stopping, verification
from benchmarks.proposal_tables import end_to_end, ranking, rivals, scale, sweep
from benchmarks.real_set_tables import real_sets, stage_labels
from benchmarks.study_tables import ablations, draw_label_curves, label_curves, saved_labels, stages

README, DOCS = (Path(__file__).parents[1] / name for name in ("README.md", "docs/results.md"))
FIRST = "real_sets"
"""The result that says whether it is worth it, and stands in the README."""
BEGIN, END = "<!-- tables:begin (python -m benchmarks.tables) -->", "<!-- tables:end -->"
SETS = ("fod", "coco256", "bccd")


def source(environment: dict[str, Any]) -> str:
    """Hardware, versions, date and command in one small line."""
    return (
        f"<sub>{environment['processor']}, {environment['cores']} cores, torch {environment['versions']['torch']}, "
        f"{environment['date']}: `{environment['command']}`</sub>\n"
    )


def sourced(result: dict[str, Any]) -> str:
    """Where a result comes from."""
    return source(result["environment"])


def recall(result: dict[str, Any]) -> str:
    chosen = [
        row for row in result["rows"] if row["config"] == ("kernel" if "colour-t" in row["encoder"] else "default")
    ]
    lines = [
        (
            "**Encoders without weights, on the grid of 16 px**, validation sets, 60 images each at 448 px: "
            "recall at IoU 0.5 / average recall (0.5:0.95), of all boxes and of the at most 25 that "
            "the document's filters keep."
        ),
        "",
        "| encoder | " + " | ".join(f"{name}, all | {name}, ≤ 25" for name in SETS) + " |",
        "|---|" + "--:|" * (2 * len(SETS)),
    ]
    for encoder in dict.fromkeys(row["encoder"] for row in chosen):
        cells = [
            f"{100 * row[part]['recall50']:.1f} / {100 * row[part]['AR']:.1f}"
            for name in SETS
            for row in chosen
            if row["encoder"] == encoder and row["set"] == name
            for part in ("all", "kept")
        ]
        lines.append(f"| {encoder} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def photographs(result: dict[str, Any]) -> str:
    lines = [
        (
            f"**Self-training on photographs**: {result['unlabelled_images']:,} images (coco256/train and "
            "imagenet1k), no labels, no weights, two stages of two epochs; class-agnostic recall on "
            f"{result['val_images']} images of coco256/val, in percent. So little training does not reach "
            "what mining finds. Mined before level sets, trained before certainty and fusion."
        ),
        "",
        "| boxes of | per image | AR@10 | AR@25 | AR@100 | recall at IoU 0.5 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        name = "mining" if row["stage"] == 0 else f"detector of stage {row['stage']}"
        numbers = [100 * row[key] for key in ("AR@10", "AR@25", "AR@100", "recall50@100")]
        lines.append(f"| {name} | {row['boxes_per_image']:.1f} | " + " | ".join(f"{n:.1f}" for n in numbers) + " |")
    return "\n".join(lines) + "\n\n" + source(result["environment"])


def memory(result: dict[str, Any]) -> str:
    first, last = result["runs"][0], result["runs"][-1]
    return (
        "**Memory of mining** does not grow with the set: "
        f"{first['peak_rss_mb']:.0f} MB for {first['images']:,} images, "
        f"{last['peak_rss_mb']:.0f} MB for {last['images']:,} ({100 * result['difference']:.1f} % more).\n\n"
        + source(result["environment"])
    )


def speed(result: dict[str, Any]) -> str:
    lines = [
        (
            "**Mining against scikit-learn's SpectralClustering × 5 + scipy's label, image by image** (64 images of "
            "coco256 at 448 px, ResNet-50 features, without the encoder; at least as good a normalised cut; bar 10 ×):"
        ),
        "",
        "| affinity | image by image, 1 thread | simdetr, 2 threads | ratio | our cut / theirs |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, run in (("exp (default)", result), *result["affinity"].items()):
        times = run["ms_per_image"]
        lines.append(
            f"| {name} | {times['plain']:.0f} ms | {times['ours']:.0f} ms | {run['speedup']['median']:.1f} × | "
            f"{run['cut_ratio']:.2f} |"
        )
    return (
        "\n".join(lines)
        + "\n\nThe image-by-image pipeline runs on one thread, its best: a second makes it slower.\n\n"
        + source(result["environment"])
    )


def kmeans(result: dict[str, Any]) -> str:
    lines = [
        (
            "**Global clustering against faiss-cpu**, one iteration of k-means (assignment, sums, new centroids), "
            f"{result['what']}; medians of iterations in turns:"
        ),
        "",
        "| rows | threads | faiss | simdetr | simdetr / faiss, time | CPU time |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for run in result["speed"]:
        wall, cpu = run["wall"], run["cpu"]
        lines.append(
            f"| {run['rows']:,} | {run['threads']} | {wall['faiss_s']:.1f} s | {wall['ours_s']:.1f} s | "
            f"{wall['ratio']:.2f} | {cpu['ratio']:.2f} |"
        )
    ranks, same, (few, many) = result["ranks"], result["agreement"], result["memory"]["runs"]
    text = (
        f"One rank takes {ranks['one_rank_s']:.1f} s for {ranks['rows']:,} rows, two take {ranks['two_ranks_s']:.1f} s "
        f"(one thread each; efficiency {100 * ranks['efficiency']:.0f} %, by CPU time "
        f"{100 * ranks['efficiency_by_cpu_time']:.0f} %). From the same starts, {same['iterations']} iterations of "
        f"faiss end with {same['faiss_alone']:.4f} of our inertia. Streamed from disk, {few['regions']:,} regions take "
        f"{few['peak_rss_mb']:.0f} MB, {many['regions']:,} take {many['peak_rss_mb']:.0f} MB."
    )
    return "\n".join(lines) + f"\n\n{text}\n\n" + source(result["environment"])


SECTIONS: dict[str, dict[str, Callable[[dict[str, Any]], str]]] = {
    "What pretraining gives": {
        "label_curves": lambda result: f"{label_curves(result)}\n{saved_labels(result)}\n{sourced(result)}",
        "real_sets": lambda result: f"{stage_labels(result)}\n{sourced(result)}",
        "ablations": lambda result: f"{ablations(result)}\n{sourced(result)}",
        "stages": lambda result: f"{stages(result)}\n{sourced(result)}",
        "photographs": photographs,
        "detector_families": lambda result: f"{detector_families(result)}\n{sourced(result)}",
    },
    "What mining finds": {
        "rivals": lambda result: f"{rivals(result)}\n{sourced(result)}",
        "sweep": lambda result: f"{sweep(result)}\n{sourced(result)}",
        "proposal_ranking": lambda result: f"{ranking(result)}\n{source(result)}",
        "proposal_recall": recall,
    },
    "A few labels to many": {
        "autolabel": lambda result: f"{autolabel(result)}\n{sourced(result)}",
        "active": lambda result: f"{active(result)}\n{sourced(result)}",
        "stopping": stopping,
        "labelling_app": labelling_app,
        "verification": lambda result: f"{verification(result)}\n{sourced(result)}",
    },
    "Points, and places from classes": {
        "landmark_study": lambda result: f"{landmark_study(result)}\n{sourced(result)}",
        "landmark_query": lambda result: f"{landmark_query(result)}\n{sourced(result)}",
        "localisation_study": lambda result: f"{localisation_study(result)}\n{sourced(result)}",
        "head_overhead": lambda result: f"{head_overhead(result)}\n{sourced(result)}",
    },
    "Speed and memory": {
        "mining_speed": speed,
        "mining_end_to_end": lambda result: f"{end_to_end(result)}\n{sourced(result)}",
        "mining_scale": lambda result: f"{scale(result)}\n{sourced(result)}",
        "mining_memory": memory,
        "kmeans": kmeans,
        "deformable_attention": lambda result: f"{deformable_attention(result)}\n{sourced(result)}",
        "training_step": lambda result: f"{training_step(result)}\n{sourced(result)}",
        "inference_speed": lambda result: f"{inference_speed(result)}\n{sourced(result)}",
        "coco_evaluation": lambda result: f"{coco_evaluation(result)}\n{sourced(result)}",
        "matcher": lambda result: f"{matcher(result)}\n{sourced(result)}",
        "start_up": lambda result: f"{start_up(result)}\n{sourced(result)}",
    },
}
"""Headings of docs/results.md, and the results below each."""


def main() -> None:
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    first = results.get(FIRST)
    put(README, [] if first is None else [f"{real_sets(first)}\n{sourced(first)}"])
    if "label_curves" in results:
        draw_label_curves(results["label_curves"])
    parts: list[str] = []
    for heading, tables in SECTIONS.items():
        found = [table(results[name]) for name, table in tables.items() if name in results]
        parts += [f"## {heading}\n", *found] if found else []
    put(DOCS, parts)


def put(page: Path, tables: list[str]) -> None:
    """Replace what stands between the marks of a page."""
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    between = "\n".join(["", *tables]) if tables else ""
    page.write_text(f"{head}{BEGIN}\n{between}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
