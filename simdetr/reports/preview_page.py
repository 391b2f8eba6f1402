"""A preview of mining and its record in; a page that looks as the report does, ``preview.json`` and a table out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from simdetr.boxes import pairwise_iou
from simdetr.data.images import open_images
from simdetr.data.label_files import read_labels
from simdetr.data.machine import cores
from simdetr.data.storage import Location, locate, write_whole
from simdetr.mining.miner import Rank
from simdetr.mining.preview import MAX_BOXES, Machine, MiningPreview, are_ranked, evenly, preview_mining, preview_record
from simdetr.mining.store import ProposalRow, best_first
from simdetr.recipe import MiningJob
from simdetr.reports.charts import INK, LINE_COLOURS, new_figure, style_panel, to_svg
from simdetr.reports.drawing import Colour, draw_boxes, readable
from simdetr.reports.page import SIZES, format_bytes, format_duration, page_template
from simdetr.training.recipe_choice import for_mining

PICTURE_PX = 360  # longer side
MAX_PICTURES = 24
MAX_BOXES_DRAWN = 10
FOUND_IOU = 0.5
BEST: Colour = (255, 120, 20)
OTHER: Colour = (70, 130, 230)
TRUE: Colour = (30, 190, 90)
PARTS = {name.replace(" ", "_"): name for name in ("waiting for images", "encoder", "clustering and boxes")}


def write_preview(preview: MiningPreview, record: Mapping[str, Any], folder: Location) -> Location:
    """Write a preview and its `preview_record` as ``index.html`` and ``preview.json``; returns the page's place.

    The folder is local or on another storage, and made if absent.
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
        ranked=are_ranked(preview.rows),
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
        lines["  AR@100 by size"] = ", ".join(f"{size} {scores[f'AR@100{size[0]}']}" for size in SIZES)
    width = max(map(len, lines)) + 2
    table = [name.ljust(width) + text for name, text in lines.items()]
    return "\n".join(table + [f"! {warning}" for warning in record["warnings"]])


def _median(distribution: Mapping[str, Any], form: str) -> str:
    return "–" if distribution["median"] is None else "median " + form.format(distribution["median"])


def _charts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(Title, SVG) of boxes per image, their sizes and their aspects; those of true objects as a line."""
    boxes, truth = record["boxes"], record["truth"]
    figure = new_figure(1)
    axes = figure.subplots()
    counts = boxes["per_image"]["images"]
    axes.bar(range(len(counts)), counts, width=0.9, color=LINE_COLOURS[0])
    style_panel(axes, "images", "boxes per image")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    charts = [("Boxes per image", to_svg(figure, "per image"))]
    drawn = [(boxes, "mined boxes", LINE_COLOURS[0]), (truth, "true objects", LINE_COLOURS[1])]
    for key, title, label in (
        ("size", "Sizes", "√(area of the box / area of the image)"),
        ("aspect", "Aspects", "width / height"),
    ):
        figure = new_figure(1)
        axes = figure.subplots()
        for found, name, colour in drawn:
            if found is not None:
                counts = np.asarray(found[key]["counts"], np.float64)
                shares, edges = counts / max(counts.sum(), 1), found[key]["edges"]
                axes.stairs(shares, edges, label=name, color=colour, fill=found is boxes, linewidth=1.8)
        style_panel(axes, "share of the boxes", label)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if key == "size":
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        else:
            axes.set_xscale("log", base=2)
            labels = [f"{2**power}:1" if power > 0 else f"1:{2**-power}" for power in range(-4, 5)]
            axes.set_xticks([2.0**power for power in range(-4, 5)], labels)
            axes.xaxis.set_minor_locator(NullLocator())
        if truth is not None:
            axes.legend(fontsize=8, frameon=False, labelcolor=INK)
        charts.append((title, to_svg(figure, key)))
    return charts


def _pictures(preview: MiningPreview) -> list[tuple[str, str, Image.Image]]:
    """(Image id, caption, picture with boxes) of some evenly spaced previewed images."""
    rows, truth, pictures = evenly(preview.rows, MAX_PICTURES), preview.truth, []
    for place, image in readable(preview.source, [row.image_id for row in rows]):  # some may be gone since
        row = rows[place]
        objects = truth.of(row.image_id) if truth is not None and row.image_id in truth else None
        true = np.zeros((0, 4), np.float32) if objects is None else objects.boxes_xyxy[~objects.crowd]
        caption = f"{len(row.regions)} box{'' if len(row.regions) == 1 else 'es'}"
        if objects is not None:
            caption += f", {_found(row.regions.boxes_xyxy, true)} of {len(true)} objects found"
        pictures.append((row.image_id, caption, _picture(image, row, true, are_ranked(preview.rows))))
    return pictures


def _picture(image: Tensor, row: ProposalRow, true: NDArray[np.float32], ranked: bool) -> Image.Image:
    """Mined boxes, over them the true ones, over them the best one."""
    picture = draw_boxes(image, np.zeros((0, 4), np.float32), min_side_px=PICTURE_PX, max_side_px=PICTURE_PX)
    scale = np.array([picture.width / row.width, picture.height / row.height] * 2, np.float32)
    mined = best_first(row).boxes_xyxy
    first, last = (1, MAX_BOXES_DRAWN) if ranked else (0, len(mined))
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
    chosen = for_mining(config, images)
    job = MiningJob(str(images), "", chosen.configs, (*chosen.options, *options), device)
    sections, source = job.sections(), open_images(images)
    known = None if truth is None else read_labels(truth, images=source)
    found = preview_mining(source, sections.encoder, sections.mining, count, truth=known, device=job.own_device)
    record = preview_record(found, Machine(cores(), torch.cuda.device_count()), num_ranks)
    write_preview(found, record, locate(out) / "preview")
    return record
