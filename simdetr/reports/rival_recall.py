"""Ours beside every rival: proposal stores of one run in; recall, boxes per image and pictures out.

A run keeps its own proposals in ``proposals/`` and those of `simdetr.mining.rivals` in ``rivals/<method>/``. All are
judged on the same images, those that every store holds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.images import ImageSource, UnreadableImageError, open_images, read_image
from simdetr.data.label_files import read_labels
from simdetr.data.labels import Labels
from simdetr.evaluation.recall import proposal_recall
from simdetr.mining.rivals import BASELINES, baseline, mine_rival
from simdetr.mining.store import MANIFEST, Manifest, ProposalStore, best_first
from simdetr.recipe import MiningJob, PipelineSections
from simdetr.reports.drawing import draw_boxes
from simdetr.reports.page import RIVAL_COLUMNS, Sample
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
    """Boxes of ours, if there are any, and of every rival of a run, best first.

    Args:
        run_dir: the run's folder.
        image_ids: only these, and of them only images that all stores hold; at most `MAX_IMAGES`, evenly spaced.

    Returns:
        Labels of one category by name of the method, all of the same images; empty if the run has no rivals.
    """
    found = [method for method in BASELINES if (rival_folder(run_dir, method) / MANIFEST).is_file()]
    if not found:
        return {}
    stores = {method: ProposalStore(rival_folder(run_dir, method)) for method in found}
    if (run_dir / "proposals" / MANIFEST).is_file():
        stores = {OURS: ProposalStore(run_dir / "proposals"), **stores}
    wanted = _evenly(list(image_ids))
    tables = {method: _boxes_of(store, frozenset(wanted)) for method, store in stores.items()}
    shared = [image_id for image_id in wanted if all(image_id in rows for rows in tables.values())]
    category = (Category(1, "object"),)
    return {
        method: Labels.from_images([rows[image_id] for image_id in shared], category, stage=0)
        for method, rows in tables.items()
    }


def rival_rows(labels: Mapping[str, Labels], truth: Labels | None) -> list[dict[str, Any]]:
    """One row per method: ``stage`` (its name), ``images``, ``boxes_per_image`` and, with truth, its recall.

    Args:
        labels: what `rival_labels` gives.
        truth: human labels of all of their images, and maybe of others.
    """
    rows = []
    for method, boxes in labels.items():
        row: dict[str, Any] = {
            "stage": TITLES.get(method, method),
            "images": len(boxes),
            "boxes_per_image": len(boxes.classes) / max(len(boxes), 1),
        }
        if truth is not None and len(boxes):
            row |= proposal_recall(truth.select(boxes.image_ids), boxes, MAX_BOXES)
        rows.append(row)
    return rows


def rival_samples(
    labels: Mapping[str, Labels], source: ImageSource, count: int, rng: np.random.Generator
) -> list[Sample]:
    """Some images at random, each as every method sees it, with its best boxes."""
    samples: list[Sample] = []
    known = next(iter(labels.values())).image_ids if labels else ()
    for index in rng.permutation(len(known)):
        image_id = known[index]
        if len(samples) == count:
            break
        try:
            image = read_image(source.record(image_id))
        except (UnreadableImageError, KeyError):
            continue
        pictures = []
        for method, boxes in labels.items():
            best = boxes.of(image_id).boxes_xyxy
            drawn = draw_boxes(image, best[:MAX_BOXES_DRAWN], min_side_px=PICTURE_PX, max_side_px=PICTURE_PX)
            shown = f"best {MAX_BOXES_DRAWN} of {len(best)}" if len(best) > MAX_BOXES_DRAWN else f"{len(best)}"
            pictures.append((f"{TITLES.get(method, method)}: {shown} {'box' if shown == '1' else 'boxes'}", drawn))
        samples.append(Sample(image_id, pictures))
    return samples


def rival_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows of `rival_rows` as text of at most 79 columns, recall in percent."""
    rows = list(rows)
    columns = {key: heading for key, (heading, _) in RIVAL_COLUMNS.items() if any(key in row for row in rows)}
    table = [["method", "boxes", *columns.values()]]
    for row in rows:
        numbers = [f"{100 * row[key]:.1f}" if key in row and not math.isnan(row[key]) else "–" for key in columns]
        table.append([row["stage"], f"{row['boxes_per_image']:.1f}", *numbers])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [" ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in table]
    return "\n".join(lines)


def _evenly(image_ids: list[str]) -> list[str]:
    if len(image_ids) <= MAX_IMAGES:
        return image_ids
    return [image_ids[row] for row in np.linspace(0, len(image_ids) - 1, MAX_IMAGES).round().astype(int)]


def _boxes_of(store: ProposalStore, wanted: frozenset[str]) -> dict[str, ImageLabels]:
    rows = store.iter_rows(["boxes_xyxy", "score"])
    return {row.image_id: best_first(row) for row in rows if row.image_id in wanted}


def mine_rivals(
    images: str | Path,
    run: str | Path,
    config: Sequence[str | Path] = (),
    *,
    methods: Sequence[str] = (),
    truth: str | Path | None = None,
    device: str | None = None,
    options: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Mine a run's images with other methods too, for comparison only.

    Args:
        images: The run's images.
        run: Run folder with mined proposals; the rivals' go to ``run``/rivals/<method>. The report shows them.
        config: YAML files of the mining; those that the run was started with when left out: those it has kept, or
            the recipe of this machine.
        methods: Names of rivals; all when left out.
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
    _check_same(folder.path, ours, sections, source)
    known = read_labels(Path(truth)) if truth is not None else None
    for method in methods or BASELINES:
        mine_rival(
            method,
            source,
            sections.encoder,
            sections.mining,
            rival_folder(folder.path, method),
            device=job.own_device,
            progress=sys.stderr.isatty(),
        )
    return rival_rows(rival_labels(folder.path, source.ids if known is None else known.image_ids), known)


def _check_same(run: Path, ours: Manifest, sections: PipelineSections, source: ImageSource) -> None:
    """The rivals must get what our mining got."""
    pairs = {
        "images": (ours.source, source.fingerprint()),
        "encoder": (ours.encoder, sections.encoder.fingerprint),
        "image_size": (ours.config["image_size"], sections.mining.image_size),
    }
    differing = [f"{name} is {there!r} there, {here!r} asked" for name, (there, here) in pairs.items() if there != here]
    if differing:
        raise RunMismatchError(
            f"run: the proposals of {run} were mined with other settings ({'; '.join(differing)}). Give the images, "
            "config files and options that they were mined with."
        )
