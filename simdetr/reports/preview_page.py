"""A preview of mining and its record in; a self-contained page, ``preview.json`` and a short table out.

Looks as the report does: same style, charts as SVG, pictures inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from simdetr.boxes import pairwise_iou
from simdetr.data.images import UnreadableImageError, open_images, read_image
from simdetr.data.machine import cores
from simdetr.data.storage import Location, locate, write_whole
from simdetr.mining.miner import Rank
from simdetr.mining.preview import MAX_BOXES, Machine, MiningPreview, preview_mining, preview_record
from simdetr.mining.store import ProposalRow
from simdetr.recipe import MiningJob
from simdetr.reports.charts import INK, LINE_COLOURS, new_figure, style_panel, to_svg
from simdetr.reports.drawing import Colour, draw_boxes
from simdetr.reports.page import format_bytes, format_duration, page_template
from simdetr.training.datamodule import read_training_labels
from simdetr.training.recipe_choice import for_mining

PICTURE_PX = 360  # longer side
MAX_PICTURES = 24
MAX_BOXES_DRAWN = 10
FOUND_IOU = 0.5
BEST: Colour = (255, 120, 20)
OTHER: Colour = (70, 130, 230)
TRUE: Colour = (30, 190, 90)
PARTS = {
    "waiting_for_images": "waiting for images",
    "encoder": "encoder",
    "clustering_and_boxes": "clustering and boxes",
}


def write_preview(preview: MiningPreview, record: Mapping[str, Any], folder: Location) -> Location:
    """Write ``index.html`` and ``preview.json`` in a folder, which is made if absent; returns the page's place.

    Args:
        preview: what was measured.
        record: its `preview_record`.
        folder: local, or on another storage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "preview.json", (json.dumps(record, indent=1) + "\n").encode())
    write_whole(folder / "index.html", render_preview(preview, record).encode())
    return folder / "index.html"


def render_preview(preview: MiningPreview, record: Mapping[str, Any]) -> str:
    """The page as HTML text; arguments as of `write_preview`."""
    return page_template("preview.html.jinja").render(
        record=record,
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        root=str(preview.source.root),
        parts=PARTS,
        charts=_charts(record),
        scores={} if preview.recall is None else preview.recall.scores,
        max_boxes=MAX_BOXES,
        pictures=_pictures(preview),
        drawn=MAX_BOXES_DRAWN,
        ranked=_is_ranked(preview),
        colours={"best": BEST, "other": OTHER, "true": TRUE},
        settings=json.dumps(record["settings"], indent=1),
    )


def preview_table(record: Mapping[str, Any]) -> str:
    """The numbers for a terminal, one line each."""
    images, speed, run, boxes = record["images"], record["speed"], record["full_run"], record["boxes"]
    ms = speed["ms_per_image"]
    counts = boxes["per_image"]
    found = f"{images['readable']} of {images['total']:,} mined"
    found += f", {len(images['unreadable'])} unreadable" if images["unreadable"] else ""
    found += f", {len(images['duplicates'])} duplicates" if images["duplicates"] else ""
    lines = {
        "images": found,
        "speed": f"{speed['images_per_s']:.1f} images/s on {record['settings']['device']}",
        "ms per image": ", ".join(f"{name} {ms[key]:.0f}" for key, name in PARTS.items()),
        "  beside the rest": f"decoding {ms['decoding_beside_it']:.0f}",
        "full run": f"{format_duration(run['seconds'])}, {format_bytes(run['disk_bytes'])} on disk, "
        f"{format_bytes(run['memory_bytes'])} memory",
    }
    if run["num_ranks"] > 1:
        lines[f"{run['num_ranks']} processes"] = (
            f"about {format_duration(run['seconds_of_ranks'])}, an estimate: {run['speedup']:.1f} times as fast"
        )
    lines |= {
        "boxes per image": f"{counts['min']} to {counts['max']}, median {counts['median']:g}",
        "side of a box": _median(boxes["size"], "{:.2f} of the image's (square roots of areas)"),
        "width / height": _median(boxes["aspect"], "{:.2f}"),
        "near-copies": f"{boxes['copied']:.1%} of the boxes",
        "at the border": f"{boxes['at_border']:.1%} of the boxes",
    }
    if record["recall"] is not None:
        values = record["recall"]["scores"]
        scores = {name: "–" if value is None else f"{100 * value:.1f}" for name, value in values.items()}
        lines["recall in %"] = f"on {record['recall']['images']} images with {record['recall']['objects']} objects"
        if record["recall"]["max_boxes"] > counts["max"]:
            lines["  boxes for it"] = f"the best {MAX_BOXES[-1]}; a run keeps {counts['max']}"
        lines["  AR@" + " ".join(map(str, MAX_BOXES))] = " ".join(scores[f"AR@{k}"] for k in MAX_BOXES)
        lines["  at IoU 0.5"] = f"{scores['recall50@25']} by 25 boxes, {scores['recall50@100']} by 100"
        lines["  AR@100 by size"] = ", ".join(
            f"{name} {scores[f'AR@100{letter}']}" for name, letter in (("small", "s"), ("medium", "m"), ("large", "l"))
        )
    width = max(map(len, lines)) + 2
    table = [name.ljust(width) + text for name, text in lines.items()]
    return "\n".join(table + [f"! {warning}" for warning in record["warnings"]])


def _median(distribution: Mapping[str, Any], form: str) -> str:
    return "–" if distribution["median"] is None else "median " + form.format(distribution["median"])


def _is_ranked(preview: MiningPreview) -> bool:
    return any(len(np.unique(row.regions.score)) > 1 for row in preview.rows)


def _charts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(Title, SVG) of boxes per image, their sizes and their aspects; those of true objects as a line."""
    boxes, truth = record["boxes"], record["truth"]
    charts = []
    figure = new_figure(1)
    axes = figure.subplots()
    counts = boxes["per_image"]["images"]
    axes.bar(range(len(counts)), counts, width=0.9, color=LINE_COLOURS[0])
    style_panel(axes, "images", "boxes per image")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    charts.append(("Boxes per image", to_svg(figure, "per image")))
    for key, title, label in (
        ("size", "Sizes", "√(area of the box / area of the image)"),
        ("aspect", "Aspects", "width / height"),
    ):
        figure = new_figure(1)
        axes = figure.subplots()
        _draw_shares(axes, boxes[key], "mined boxes", filled=True)
        if truth is not None:
            _draw_shares(axes, truth[key], "true objects", filled=False)
        style_panel(axes, "share of the boxes", label)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _mark(axes, key)
        if truth is not None:
            axes.legend(fontsize=8, frameon=False, labelcolor=INK)
        charts.append((title, to_svg(figure, key)))
    return charts


def _draw_shares(axes: Axes, distribution: Mapping[str, Any], name: str, *, filled: bool) -> None:
    counts = np.asarray(distribution["counts"], np.float64)
    shares = counts / max(counts.sum(), 1)
    colour = LINE_COLOURS[0 if filled else 1]
    axes.stairs(shares, distribution["edges"], label=name, color=colour, fill=filled, linewidth=1.8)


def _mark(axes: Axes, key: str) -> None:
    """Ticks of a histogram's x axis, which are no whole numbers."""
    if key == "size":
        ticks = [0, 0.25, 0.5, 0.75, 1]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        return
    axes.set_xscale("log", base=2)
    powers = range(-4, 5)
    labels = [f"{2**power}:1" if power > 0 else f"1:{2**-power}" for power in powers]
    axes.set_xticks([2.0**power for power in powers], labels)
    axes.xaxis.set_minor_locator(NullLocator())


def _pictures(preview: MiningPreview) -> list[tuple[str, str, Image.Image]]:
    """(Image id, caption, picture with boxes) of some evenly spaced previewed images."""
    rows, pictures = preview.rows, []
    step = max(1.0, len(rows) / MAX_PICTURES)
    for index in range(min(len(rows), MAX_PICTURES)):
        row = rows[int((index + 0.5) * step)] if step > 1 else rows[index]
        truth = preview.truth
        known = truth is not None and row.image_id in truth
        objects = truth.of(row.image_id) if truth is not None and known else None
        true = np.zeros((0, 4), np.float32) if objects is None else objects.boxes_xyxy[~objects.crowd]
        try:
            picture = _picture(preview, row, true)
        except UnreadableImageError:  # gone since it was mined
            continue
        caption = f"{len(row.regions)} box{'' if len(row.regions) == 1 else 'es'}"
        if known:
            caption += f", {_found(row.regions.boxes_xyxy, true)} of {len(true)} objects found"
        pictures.append((row.image_id, caption, picture))
    return pictures


def _picture(preview: MiningPreview, row: ProposalRow, true: NDArray[np.float32]) -> Image.Image:
    """Mined boxes, over them the true ones, over them the best one."""
    image = read_image(preview.source.record(row.image_id))
    picture = draw_boxes(image, np.zeros((0, 4), np.float32), min_side_px=PICTURE_PX, max_side_px=PICTURE_PX)
    scale = np.array([picture.width / row.width, picture.height / row.height] * 2, np.float32)
    ranked = _is_ranked(preview)
    order = np.argsort(-row.regions.score, kind="stable")
    mined = row.regions.boxes_xyxy[order]
    first = 1 if ranked else 0
    last = MAX_BOXES_DRAWN if ranked else len(mined)
    for boxes, colour in ((mined[first:last], OTHER), (true, TRUE), (mined[:first], BEST)):
        if len(boxes):
            picture = draw_boxes(pil_to_tensor(picture), boxes * scale, colours=[colour] * len(boxes))
    return picture


def _found(mined: NDArray[np.float32], true: NDArray[np.float32]) -> int:
    """Objects that some box covers with an IoU of at least `FOUND_IOU`."""
    if not len(mined) or not len(true):
        return 0
    overlaps = pairwise_iou(torch.as_tensor(true), torch.as_tensor(mined))
    return int((overlaps.amax(dim=1) >= FOUND_IOU).sum())


def preview(
    images: str | Path,
    out: str | Path,
    config: Sequence[str | Path] = (),
    *,
    count: int = 50,
    truth: str | Path | None = None,
    device: str | None = None,
    options: Sequence[str] = (),
    num_ranks: int = 1,
) -> dict[str, Any]:
    """What mining would give and cost, from a few images mined in memory; ``out``/proposals is not touched.

    Args:
        images: As for ``pretrain``.
        out: Run folder or URL; ``out``/preview/ gets ``index.html`` and ``preview.json``.
        config: YAML files, later ones over earlier ones.
        count: Images to mine, evenly spaced.
        truth: COCO JSON with boxes for some of these images, for recall; those images are taken first.
        device: Torch device; the GPU if there is one.
        options: ``--section.name=value`` strings, over the files.
        num_ranks: Processes of the full run, for the estimate of its time.

    Returns:
        The content of ``preview.json``.
    """
    if num_ranks < 1 or Rank.from_environment().count > 1:
        raise ValueError("num_ranks: expected at least 1, and a preview in one process; leave torchrun or srun out")
    known = None if truth is None else read_training_labels(Path(truth))
    chosen = for_mining(config, images)
    job = MiningJob(str(images), "", chosen.configs, (*chosen.options, *options), device)
    sections, source = job.sections(), open_images(images)
    found = preview_mining(source, sections.encoder, sections.mining, count, truth=known, device=job.own_device)
    record = preview_record(found, Machine(cores(), torch.cuda.device_count()), num_ranks)
    write_preview(found, record, locate(out) / "preview")
    return record
