"""Tables of the training step, the matcher and inference for the README, and of the profile for docs/training_speed.md.

``tables.py`` calls the former; the latter goes into the page by

python -m benchmarks.detector_tables
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "training_speed.md"
BEGIN, END = "<!-- profile:begin (python -m benchmarks.detector_tables) -->", "<!-- profile:end -->"
_NO_GPU = {"not measured": "\nNot measured on a GPU: there was none.\n", "measured": ""}


def _device(row: dict[str, Any]) -> str:
    name = row["device"].upper() if row["device"] in ("cpu", "cuda") else row["device"]
    return f"{name}, {row['side']} px, batch {row['batch']}, {row['precision']}" if "side" in row else name


def deformable_attention(result: dict[str, Any]) -> str:
    """Our implementations against the one in transformers."""
    lines = [
        (
            "**Deformable attention**, levels of an 800 × 1066 image (17,821 cells), 8 heads of 32 channels, 4 "
            "points, float32, forward and backward; how many times as fast as transformers' implementation, medians of "
            "turns, and peak memory beyond the inputs (bar on CPUs: 1.2 ×):"
        ),
        "",
        "| | transformers | grid_sample | rows (default on CPUs) | peak memory: transformers / grid_sample / rows |",
        "|---|--:|--:|--:|--:|",
    ]
    for case, found in result["cpu"].items():
        cells = [
            f"{found[name]['forward_and_backward']['ms']:,.0f} ms"
            + (
                f" ({found[name]['forward_and_backward']['times_as_fast_as_transformers']:.1f} ×)"
                if name != "transformers"
                else ""
            )
            for name in ("transformers", "grid_sample", "rows")
        ]
        memory = " / ".join(f"{found[name]['peak_mb']:,.0f}" for name in ("transformers", "grid_sample", "rows"))
        lines.append(f"| {case.removesuffix(', float32')} | " + " | ".join(cells) + f" | {memory} MB |")
    gpu = "" if isinstance(result["cuda"], dict) else "\nTriton on a GPU: not measured, there was none.\n"
    return "\n".join(lines) + "\n" + gpu


def detector_families(result: dict[str, Any]) -> str:
    """One pipeline, several detectors."""
    lines = [
        (
            f"**Any detector, only the YAML changes**: coco256, {result['train_images']} images without labels, two "
            f"stages of {result['epochs_per_stage']} epochs from random weights, then {result['finetune_steps']} steps "
            f"with labels; on {result['val_images']} validation images. Far too short to rank them: the rows show that "
            "all steps run."
        ),
        "",
        "| detector | config | parameters | AR@100 of stage 1 / 2 | AR@100 after fine-tuning |",
        "|---|---|--:|--:|--:|",
    ]
    for row in result["rows"]:
        recall = " / ".join(f"{100 * found['AR@100']:.1f}" for found in row["recall"].values())
        lines.append(
            f"| {row['detector']} | `{row['config']}` | {row['parameters'] / 1e6:.1f} M | {recall} | "
            f"{100 * row['AR@100']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def training_step(result: dict[str, Any]) -> str:
    """Step time and peak memory against transformers."""
    lines = [
        (
            "**A training step against transformers' Deformable DETR** (R50; same weights, batch, precision, clipping "
            "and fused AdamW; forward, losses, backward, optimiser; medians of steps in turns):"
        ),
        "",
        "| | transformers | simdetr | ratio | bar | peak memory, theirs / ours |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        wall, memory = row["wall"], row["peak_mb"]
        peak = f"{memory['theirs']:,.0f} / {memory['ours']:,.0f} MB" if memory["ours"] is not None else ""
        layout = ", channels last" if row["channels_last"] else ""
        lines.append(
            f"| {_device(row)}{layout} | {wall['theirs_ms']:,.0f} ms | {wall['ours_ms']:,.0f} ms | "
            f"{wall['ratio']:.2f} × | {row['bar']} × | {peak} |"
        )
    return "\n".join(lines) + "\n" + _NO_GPU[result["gpu"]]


def matcher(result: dict[str, Any]) -> str:
    """Matching against layer by layer and image by image."""
    lines = [
        f"**Matching all layers and images at once** against one by one ({result['what']}; equal assignments):",
        "",
        "| | classes | one by one | simdetr | ratio | bar |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        wall = row["wall"]
        lines.append(
            f"| {_device(row)} | {row['num_classes']:,} | {wall['theirs_ms']:.1f} ms | {wall['ours_ms']:.1f} ms | "
            f"{wall['ratio']:.1f} × | {row['bar']:.0f} × |"
        )
    return "\n".join(lines) + "\n" + _NO_GPU[result["gpu"]]


def coco_evaluation(result: dict[str, Any]) -> str:
    """COCO's numbers from labels in memory, and pycocotools from files."""
    versions, equal = result["environment"]["versions"], "equal bit for bit" if result["equal"] else "NOT equal"
    data = f"{result['boxes']:,} boxes, {result['objects']:,} objects of {result['classes']} classes"
    lines = [
        (
            f"**COCO's numbers** of {result['images']:,} images with {data}: hotcoco {versions['hotcoco']} "
            f"from our labels (tables {equal} to those of pycocotools {versions['pycocotools']}); medians in turns:"
        ),
        "",
        "| pycocotools | pycocotools | simdetr | ratio | by CPU time | bar |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for key, name in (("labels", "from our labels"), ("files", "from two JSON files")):
        wall, cpu = result[key]["wall"], result[key]["cpu"]
        lines.append(
            f"| {name} | {wall['theirs_ms'] / 1000:.1f} s | {wall['ours_ms'] / 1000:.2f} s | {wall['ratio']:.0f} × | "
            f"{cpu['ratio']:.0f} × | {result['bar']:.0f} × |"
        )
    return "\n".join(lines) + "\n"


def inference_speed(result: dict[str, Any]) -> str:
    """Latency and throughput against transformers."""
    lines = [
        "**Detection against transformers' Deformable DETR** (R50, same weights, forward pass; medians in turns):",
        "",
        "| | transformers | simdetr | ratio | images/s, theirs / ours |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        wall, rate = row["wall"], row["images_per_s"]
        lines.append(
            f"| {_device(row)} | {wall['theirs_ms']:,.0f} ms | {wall['ours_ms']:,.0f} ms | {wall['ratio']:.2f} × | "
            f"{rate['theirs']:.1f} / {rate['ours']:.1f} |"
        )
    return "\n".join(lines) + "\n" + _NO_GPU[result["gpu"]]


def start_up(result: dict[str, Any]) -> str:
    """How long commands take to begin."""
    lines = [
        "**Start of commands** (whole processes, medians in turns with the state of before"
        + (f", `{result['before']}`" if result["before"] else "")
        + "; user-CPU time, which other work on the machine hardly changes, and wall clock):",
        "",
        "| | CPU, before | CPU, now | wall, before | wall, now | bar, idle machine |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        old, new = row["before"], row["now"]
        bar = "" if row["bar_s"] is None else f"{row['bar_s']:.1f} s"
        lines.append(
            f"| `{row['command']}` | {old['cpu_s']:.2f} s | {new['cpu_s']:.2f} s | {old['wall_s']:.2f} s | "
            f"{new['wall_s']:.2f} s | {bar} |"
        )
    load = result["environment"]["load_at_start"]
    return (
        "\n".join(lines)
        + f"\n\nLoad of the machine at the start: {load:.1f} on {result['environment']['cores']} cores.\n"
    )


def training_profile(result: dict[str, Any]) -> str:
    """Parts of a step and its longest operators, for the page."""
    blocks = []
    for row in result["rows"]:
        lines = [f"**{_device(row)}**", "", "| part | time | share |", "|---|--:|--:|"]
        lines += [f"| {part['part']} | {part['ms']:,.0f} ms | {100 * part['share']:.1f} % |" for part in row["parts"]]
        lines += ["", "| operator | calls | own time | share |", "|---|--:|--:|--:|"]
        lines += [
            f"| `{operator['operator']}` | {operator['calls']:,} | {operator['ms']:,.1f} ms | "
            f"{100 * operator['share']:.1f} % |"
            for operator in row["operators"]
        ]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks) + _NO_GPU[result["gpu"]]


def main() -> None:
    """Put the profile of ``results/training_profile.json`` into the page."""
    result = json.loads((RESULTS / "training_profile.json").read_text(encoding="utf-8"))
    made = result["environment"]
    source = (
        f"<sub>{made['processor']}, {made['cores']} cores, torch {made['versions']['torch']}, {made['date']}: "
        f"`{made['command']}`</sub>"
    )
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    text = f"{head}{BEGIN}\n\n{training_profile(result)}\n{source}\n\n{END}{rest.partition(END)[2]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
