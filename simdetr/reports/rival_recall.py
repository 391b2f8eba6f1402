"""Ours beside every rival: proposal stores of one run in; recall, boxes per image and pictures out.

A run keeps its own proposals in ``proposals/`` and those of `simdetr.mining.rivals` in ``rivals/<method>/``. All are
judged on the same images, those that every store holds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.images import ImageSource, open_images
from simdetr.data.label_files import read_labels
from simdetr.data.labels import Labels
from simdetr.evaluation.recall import proposal_recall
from simdetr.mining.preview import evenly
from simdetr.mining.rivals import BASELINES, MOST_BOXES, baseline, mine_rival
from simdetr.mining.store import MANIFEST, ProposalStore, best_first
from simdetr.recipe import MiningJob
from simdetr.reports.drawing import Colour, draw_boxes, readable
from simdetr.reports.page import RIVAL_COLUMNS, Sample, columns_of
from simdetr.training.recipe_choice import for_mining
from simdetr.training.run_folder import RunFolder, RunMismatchError

OURS = "ours"
TITLES = {
    "selective_search": "Selective Search",
    "lost": "LOST",
    "token_cut": "TokenCut",
    "mask_cut": "MaskCut",
    "random": "random boxes",
}
FOLDER = "rivals"  # within a run
MAX_BOXES = (1, 10, 25, 30, 100)
MAX_IMAGES = 2000  # beyond it the recall of a part is within a percent of the whole
MAX_BOXES_DRAWN = 25
PICTURE_PX = 420  # longer side of a picture


def rival_folder(run_dir: Path, method: str) -> Path:
    """Where a run keeps the proposals of a rival."""
    return run_dir / FOLDER / method


def rival_labels(run_dir: Path, image_ids: Iterable[str]) -> dict[str, Labels]:
    """Boxes of ours, if there are any, and of every rival of a run, best first, as labels of one category by method.

    All are of the same images: at most `MAX_IMAGES` of the given ids, evenly spaced, and of them those that all stores
    hold. Empty if the run has no rivals.
    """
    found = [method for method in BASELINES if (rival_folder(run_dir, method) / MANIFEST).is_file()]
    if not found:
        return {}
    stores = {method: ProposalStore(rival_folder(run_dir, method)) for method in found}
    if (run_dir / "proposals" / MANIFEST).is_file():
        stores = {OURS: ProposalStore(run_dir / "proposals"), **stores}
    wanted = evenly(list(image_ids), MAX_IMAGES)
    known = frozenset(wanted)
    tables = {
        method: {row.image_id: best_first(row) for row in store.iter_rows(["boxes_xyxy"]) if row.image_id in known}
        for method, store in stores.items()
    }
    shared = [image_id for image_id in wanted if all(image_id in rows for rows in tables.values())]
    category = (Category(1, "object"),)
    return {
        method: Labels.from_images([rows[image_id] for image_id in shared], category, stage=0)
        for method, rows in tables.items()
    }


def rival_rows(labels: Mapping[str, Labels], truth: Labels | None) -> list[dict[str, Any]]:
    """A `recall_row` per method of `rival_labels`; ``truth`` has human labels of all their images, maybe of others."""
    return [recall_row(TITLES.get(method, method), boxes, truth, MAX_BOXES) for method, boxes in labels.items()]


def recall_row(
    stage: str, boxes: Labels, truth: Labels | None, max_boxes: Sequence[int] = (1, 10, 25, 100)
) -> dict[str, Any]:
    """``stage`` (a name), ``images``, ``boxes_per_image`` and, with truth, the recall of some boxes."""
    per_image = len(boxes.classes) / max(len(boxes), 1)
    row: dict[str, Any] = {"stage": stage, "images": len(boxes), "boxes_per_image": per_image}
    if truth is not None and len(boxes):
        row |= proposal_recall(truth.select(boxes.image_ids), boxes, max_boxes)
    return row


def rival_samples(
    labels: Mapping[str, Labels], source: ImageSource, count: int, rng: np.random.Generator
) -> list[Sample]:
    """Some images at random, each as every method sees it, with its best boxes."""
    columns = {TITLES.get(method, method): boxes for method, boxes in labels.items()}
    return side_by_side(source, columns, count, rng, MAX_BOXES_DRAWN, f"best {MAX_BOXES_DRAWN}")


def side_by_side(
    source: ImageSource,
    columns: Mapping[str, Labels],
    count: int,
    rng: np.random.Generator,
    max_boxes: int,
    shown: str,
    colours_of: Callable[[ImageLabels, NDArray[np.intp]], list[Colour]] | None = None,
) -> list[Sample]:
    """Some images of the first column at random, each as every column (labels by title) has it, with its best boxes.

    ``shown`` is what a caption calls them where there are more; ``colours_of`` gives the colours of some of an image's
    boxes, which are those of classes 0, 1, 2 and so on if left out.
    """
    ids = next(iter(columns.values())).image_ids if columns else ()
    chosen = [ids[index] for index in rng.permutation(len(ids)) if ids[index] in source]
    samples = []
    for place, image in islice(readable(source, chosen), count):
        pictures = []
        for title, labels in columns.items():
            if chosen[place] not in labels:
                continue
            own = labels.of(chosen[place])
            best = np.argsort(-own.scores, kind="stable")[:max_boxes]
            colours = None if colours_of is None else colours_of(own, best)
            boxes = own.boxes_xyxy[best]
            number = f"{shown} of {len(own)}" if len(own) > max_boxes else f"{len(own)}"
            caption = f"{title}: {number} {'box' if len(own) == 1 else 'boxes'}"
            drawn = draw_boxes(image, boxes, None, colours, min_side_px=PICTURE_PX, max_side_px=PICTURE_PX)
            pictures.append((caption, drawn))
        samples.append(Sample(chosen[place], pictures))
    return samples


def rival_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows of `rival_rows` as text of at most 79 columns, recall in percent."""
    rows = list(rows)
    columns = columns_of(rows, RIVAL_COLUMNS)
    table = [["method", "boxes", *(heading for heading, _ in columns.values())]]
    for row in rows:
        numbers = [f"{100 * row[key]:.1f}" if key in row and not math.isnan(row[key]) else "–" for key in columns]
        table.append([row["stage"], f"{row['boxes_per_image']:.1f}", *numbers])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [" ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in table]
    return "\n".join(lines)


def mine_rivals(
    images: str | Path,
    run: str | Path,
    config: Sequence[str | Path] = (),
    *,
    methods: Sequence[str] = (),
    max_boxes: int = MOST_BOXES,
    truth: str | Path | None = None,
    device: str | None = None,
    options: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Mine a run's images with other methods too, for comparison or to be pretrained on.

    Args:
        images: The run's images.
        run: Run folder with mined proposals; the rivals' go to ``run``/rivals/<method>. The report shows them.
        config: YAML files of the mining; those that the run was started with when left out: those it has kept, or
            the recipe of this machine.
        methods: Names of rivals; all when left out.
        max_boxes: Boxes per image that are kept, the best; the document trains on 30 of Selective Search.
        truth: COCO JSON with boxes for some of these images, for recall.
        device: Torch device; the GPU if there is one.
        options: ``--section.name=value`` strings, over the files.

    Returns:
        One row per method that the run has proposals of, ours first: ``stage`` (the method), ``images``,
        ``boxes_per_image`` and, with truth, the recall of `simdetr.evaluation.recall`.

    Raises:
        StoreError: The run has no mined proposals, or a rival's are of other settings.
        RunMismatchError: They were mined with other settings or images than these.
    """
    for method in methods:
        baseline(method)
    folder, source = RunFolder(Path(run)), open_images(images)
    ours = ProposalStore(folder.proposals).manifest
    kept = [folder.config] if folder.config.is_file() and not config else []
    chosen = for_mining((*config, *kept), images)
    job = MiningJob(str(images), str(folder.proposals), chosen.configs, (*chosen.options, *options), device)
    sections = job.sections()
    pairs = {
        "images": (ours.source, source.fingerprint()),
        "encoder": (ours.encoder, sections.encoder.fingerprint),
        "image_size": (ours.config["image_size"], sections.mining.image_size),
    }
    differing = [f"{name} is {there!r} there, {here!r} asked" for name, (there, here) in pairs.items() if there != here]
    if differing:
        raise RunMismatchError(
            f"run: the proposals of {folder.path} were mined with other settings ({'; '.join(differing)}). Give the "
            "images, config files and options that they were mined with."
        )
    known = read_labels(truth, images=source) if truth is not None else None
    for method in methods or BASELINES:
        out, shown = rival_folder(folder.path, method), sys.stderr.isatty()
        mine_rival(
            method,
            source,
            sections.encoder,
            sections.mining,
            out,
            max_boxes=max_boxes,
            device=job.own_device,
            progress=shown,
        )
    return rival_rows(rival_labels(folder.path, source.ids if known is None else known.image_ids), known)
