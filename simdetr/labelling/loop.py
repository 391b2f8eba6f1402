"""Active labelling: a detector and unlabelled images in, which image a person should see next out, round after round.

A round: propose boxes, order the images, let a person inspect the first ones, train on what people left, estimate the
errors among the rest, decide whether to stop. In a study the person is simulated from truth, so that whole loops run
unattended and give the same every time. Source: the labelling apparatus' loop of proposals, order, feedback and
training; its steps may be left out.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from simdetr import pipeline
from simdetr.data.annotations import ImageLabels
from simdetr.data.category_matching import match_categories
from simdetr.data.images import ImageSource, open_images
from simdetr.data.label_files import read_labels, write_labels
from simdetr.data.labels import Labels
from simdetr.data.machine import default_device
from simdetr.data.storage import atomic_path, check_writable, write_json, write_scores
from simdetr.exchange.weights import load_detector
from simdetr.labelling.annotator import SimulatedAnnotator
from simdetr.labelling.autolabel import encoder_for, train_on
from simdetr.labelling.choices import LoopSettings, SelectionSettings
from simdetr.labelling.consensus import consensus
from simdetr.labelling.crop_features import CropEncoder, crop_encoder, crop_features
from simdetr.labelling.image_selection import (
    Order,
    Pool,
    check_strategy,
    entropy,
    image_vectors,
    label_conflicts,
    order_images,
)
from simdetr.labelling.stopping import Audit, Decision, ErrorBound, ErrorEstimate, Round, draw_audit, errors_left
from simdetr.recipe import SEEDS
from simdetr.training.inference import predict
from simdetr.training.run_folder import RunFolder, detector_folder

LOG = logging.getLogger(__name__)
LEAST_SCORE = 0.02
"""Detections below it say nothing about an image."""
SHOWN_IOU = 0.5
"""Of two proposals that overlap more one is shown."""
SURE_SCORE = 0.5
"""Above it a detection may contradict a person."""


def label_order(
    images: str | Path | ImageSource,
    out: str | Path,
    *,
    init: str | Path,
    people: str | Path | None = None,
    strategy: str | None = None,
    encoder: str | None = None,
    device: str | None = None,
    settings: SelectionSettings | None = None,
) -> Order:
    """Order images for a person to label, with a reason for each.

    Args:
        images: The images: a folder, list file or COCO JSON, or an ``ImageSource``.
        out: CSV file to write: place, image, priority, reason and flags. The features lie in a folder beside it.
        init: Run folder, detector folder or checkpoint whose boxes are looked at.
        people: COCO JSON of images that people labelled already; they are not ordered again, unless the detector, if
            it knows people's classes, is sure of another class at an object.
        strategy: cluster, interleave, box_size, cluster_size, entropy, k_center, mixed or random; interleave while
            nothing is labelled, then mixed, when left out.
        encoder: What tells whether images are alike, as for ``autolabel``.
        device: Torch device; the GPU if there is one.
        settings: How images are ordered.

    Raises:
        ValueError: An unknown strategy or encoder.
        OSError: There is no detector in ``init``, or ``out`` cannot be written.
    """
    source = images if isinstance(images, ImageSource) else open_images(images)
    device, out = device or default_device(), Path(out)
    check_strategy(strategy)
    check_writable(out)
    start = detector_folder(init)
    network = crop_encoder(encoder_for(encoder, init), device)
    known = None if people is None else read_labels(people, images=source)
    labelled = frozenset(() if known is None else (image_id for image_id in known.image_ids if image_id in source))
    found = predict(source, start, min_score=LEAST_SCORE, one_class=True, device=device)
    conflicts = frozenset() if known is None else contradicted(known, found)
    cache = out.with_suffix(".features")
    pool = pool_of(source, found, network, labelled, cache=cache, device=device, conflicts=conflicts)
    order = order_images(pool, strategy, settings)
    write_order(order, out)
    return order


def contradicted(known: Labels, found: Labels) -> frozenset[str]:
    """Images that people labelled and where a detection is sure of another class; none if it does not know theirs."""
    if match_categories(found.categories, known.categories).missing:
        return frozenset()
    sure = found.rows(np.flatnonzero(found.scores > SURE_SCORE))
    return frozenset(label_conflicts(known, sure.with_categories(known.categories)))


def write_order(order: Order, path: Path) -> None:
    """Write an order as CSV, an image per row, the first to be seen first."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("place", "image", "priority", "reason", "flags"))
        rows = zip(order.image_ids, order.priorities, order.reasons, order.flags, strict=True)
        for place, (image_id, priority, reason, flags) in enumerate(rows, start=1):
            writer.writerow((place, image_id, f"{priority:.6g}", reason, " ".join(sorted(flags))))


def pool_of(
    source: ImageSource,
    found: Labels,
    encoder: CropEncoder,
    labelled: frozenset[str],
    *,
    cache: Path,
    device: str,
    boxes_per_image: int = 5,
    conflicts: frozenset[str] = frozenset(),
) -> Pool:
    """What orders are made of: detections, their uncertainty, and a vector per image.

    Args:
        source: The images.
        found: Detections with scores, one class per box; images that are not in it cannot be read.
        encoder: Of the crops of the best boxes; an image without boxes is one crop.
        labelled: Ids of images that people labelled.
        cache: Folder of the features.
        device: Torch device.
        boxes_per_image: So many of the best boxes make an image's vector.
        conflicts: Ids of those among ``labelled`` that are to be seen again.
    """
    best = found.rows(np.sort(np.concatenate([np.zeros(0, np.int64), *_best_rows(found, boxes_per_image)])))
    whole = Labels.from_images(
        [
            ImageLabels.build(image.image_id, image.size_hw, [[0, 0, image.size_hw[1], image.size_hw[0]]], [0])
            for image in map(found.image, range(len(found)))
        ],
        found.categories,
    )
    of_boxes, of_images = (crop_features(source, own, encoder, device=device, cache=cache) for own in (best, whole))
    vectors = image_vectors(of_boxes.values, best.scores, best.offsets, of_images.values)
    unreadable = frozenset(image_id for image_id in source.ids if image_id not in found)
    uncertainty = entropy(found.scores[:, None].astype(np.float64))
    return Pool(found, vectors, uncertainty, labelled & set(found.image_ids), conflicts, unreadable)


def _best_rows(found: Labels, count: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Rows of the best-scored boxes of every image."""
    rows = []
    for start, stop in zip(found.offsets[:-1].tolist(), found.offsets[1:].tolist(), strict=True):
        rows.append(start + np.argsort(-found.scores[start:stop], kind="stable")[:count])
    return rows


def simulate_labelling(
    images: str | Path | ImageSource,
    truth: str | Path,
    val_images: str | Path,
    val_labels: str | Path,
    out: str | Path,
    config: Sequence[str | Path] = (),
    *,
    init: str | Path,
    encoder: str | None = None,
    options: Sequence[str] = (),
    device: str | None = None,
    settings: LoopSettings | None = None,
    annotator: SimulatedAnnotator | None = None,
) -> list[dict[str, Any]]:
    """Run the loop with a person who is simulated from truth; a stopped one goes on after its last round.

    Args:
        images: The images to label.
        truth: COCO JSON with all of their boxes, which the person knows.
        val_images: Images to evaluate on.
        val_labels: Their boxes.
        out: Folder of the loop; ``rounds.json`` grows with every round.
        config: YAML files of the trainings; a recipe for few labels without any.
        init: Run folder, detector folder or checkpoint of the pretraining.
        encoder: As for ``autolabel``.
        options: ``--section.name=value`` strings for the trainings, over the files.
        device: Torch device; the GPU if there is one.
        settings: Of the loop.
        annotator: Of the person; without errors when left out.

    Returns:
        A row per round: images, boxes and seconds of the person so far, what became of the proposals, the metrics of
        the detector, the errors left with their interval, and what is really left.

    Raises:
        RunMismatchError: ``out`` holds a loop with other settings.
    """
    settings, annotator = settings or LoopSettings(), annotator or SimulatedAnnotator()
    source = images if isinstance(images, ImageSource) else open_images(images)
    device, out = device or default_device(), Path(out)
    check_strategy(settings.strategy)
    detector = detector_folder(init)
    network = crop_encoder(encoder_for(encoder, init), device)
    known = read_labels(truth, images=source).select(source.ids)
    facts = {"loop": asdict(settings), "person": asdict(annotator), "truth": known.fingerprint(), "init": str(init)}
    facts |= {"config": [*map(str, config)], "options": [*options]}
    RunFolder(out).claim(yaml.safe_dump({"labelling": json.loads(json.dumps(facts))}))
    trainings = (*options, *(f"--{name}={settings.seed}" for name in SEEDS))
    rows: list[dict[str, Any]] = []
    labels = None
    for number in range(settings.rounds):
        folder = out / f"round{number}"
        if not (folder / "labels.parquet").is_file():
            found = predict(
                source, detector, min_score=LEAST_SCORE, iou_threshold=SHOWN_IOU, one_class=True, device=device
            )
            pool = pool_of(source, found, network, _seen(labels), cache=out / "features", device=device)
            shown = None  # before the first training no class is known
            if number:
                shown = proposals(source, pool, detector, settings.show_above, device=device)
            labels, row = inspect(pool, shown, known, labels, number, settings, annotator)
            row["seconds"] += rows[-1]["seconds"] if rows else 0.0
            write_json(folder / "person.json", row)
            write_labels(labels, folder / "labels.parquet")
        labels, row = read_labels(folder / "labels.parquet"), _read_json(folder / "person.json")
        detector = train_on(folder / "training", source, labels, detector_folder(init), config, trainings)
        if not (folder / "scores.json").is_file():
            write_scores(pipeline.evaluate(val_images, val_labels, detector, device=device), folder / "scores.json")
        rows.append(row | _read_json(folder / "scores.json"))
        decision = _decision(rows, settings)
        rows[-1]["stop"] = decision.reason
        write_json(out / "rounds.json", rows)
        if decision.stop:
            LOG.info("stopped after %d rounds: %s", number + 1, decision.reason)
            break
        if len(labels) == len(known):
            LOG.info("every image is labelled after %d rounds", number + 1)
            break
    return rows


def proposals(source: ImageSource, pool: Pool, detector: Path, above: float, *, device: str) -> Labels:
    """What a person is shown of the images that nobody has seen, so that little is to be rejected or drawn anew.

    Detections above a score that other views of the image show too, with the mean of their boxes: see
    `simdetr.labelling.consensus`.

    Args:
        source: The images.
        pool: Their detections, no two on one object.
        detector: That made them.
        above: Detections of a higher score are shown.
        device: Torch device.
    """
    found = pool.labels
    new = np.array([image_id not in pool.labelled for image_id in found.image_ids], bool)
    found = found.rows(np.flatnonzero(new[found.owners] & (found.scores > above)))
    views = consensus(load_detector(detector), source, found, device=device)
    found = replace(found, boxes_xyxy=views.boxes_xyxy)
    return found.rows(np.flatnonzero(views.seen_again > 0))


def inspect(
    pool: Pool,
    shown: Labels | None,
    truth: Labels,
    before: Labels | None,
    number: int,
    settings: LoopSettings,
    annotator: SimulatedAnnotator,
) -> tuple[Labels, dict[str, Any]]:
    """The person's part of a round.

    Args:
        pool: What is known before it.
        shown: The proposals that the person is shown, of every image of the pool; none in the first round.
        truth: What the person knows of every image of the pool.
        before: What the person left in the rounds before; None in the first.
        number: Of the round, from 0.
        settings: Of the loop.
        annotator: The person.

    Returns:
        All that the person has left so far, and the numbers of the round; ``seconds`` are this round's.
    """
    choice = SelectionSettings(budget=settings.images_per_round, seed=settings.seed + number)
    nothing = replace(pool.labels.rows(np.zeros(0, np.int64)), categories=truth.categories)
    audits = shown is not None
    shown = nothing if shown is None else shown.with_categories(truth.categories)
    order = order_images(pool, settings.strategy, choice)
    chosen = order.image_ids[: settings.images_per_round]
    others = order.image_ids[settings.images_per_round :]
    audited = draw_audit(others, settings.audited_per_round, settings.seed + number)
    inspections = [annotator.inspect(truth.of(image_id), shown.of(image_id)) for image_id in (*chosen, *audited)]
    kept = [] if before is None else [before.image(row) for row in range(len(before))]
    labels = Labels.from_images([*kept, *(inspection.labels for inspection in inspections)], truth.categories)
    summary = Round.of(inspections)
    row: dict[str, Any] = {
        "round": number,
        "strategy": order.strategy,
        "images": len(labels),
        "boxes": int((~labels.crowd).sum()),
        "seconds": summary.seconds,
        **{name: getattr(summary, name) for name in ("accepted", "corrected", "rejected", "drawn")},
        "classes": len(np.unique(labels.classes)),
    }
    if audits and len(audited) >= 2:
        left = shown.select(image_id for image_id in others if image_id not in set(audited))
        estimate = errors_left(Audit.of(shown, inspections[len(chosen) :]), left)
        row["errors_left"] = asdict(estimate)
        faultless = replace(annotator, accepts_wrong=0.0, rejects_right=0.0, misses=0.0)
        exact = Round.of([faultless.inspect(truth.of(i), left.of(i)) for i in left.image_ids])
        row["really_left"] = exact.corrected + exact.rejected + exact.drawn
    return labels, row


def _decision(rows: Sequence[Mapping[str, Any]], settings: LoopSettings) -> Decision:
    """Whether the loop is to stop after its last round."""
    if settings.stop_share is None:
        return Decision(False, "no rule was given")
    names = ("images", "seconds", "accepted", "corrected", "rejected", "drawn")
    history = [
        Round(
            **{name: row[name] for name in names},
            estimate=ErrorEstimate(**row["errors_left"]) if "errors_left" in row else None,
        )
        for row in rows
    ]
    return ErrorBound(share=settings.stop_share).stop(history)


def loop_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rounds as a Markdown table: what the person did so far, AP, and the errors left with their interval."""
    lines = [
        "| round | images | boxes | minutes | accepted / corrected / rejected / drawn | AP | errors left |",
        "|--:|--:|--:|--:|:-:|--:|--:|",
    ]
    for row in rows:
        did = " / ".join(str(row[name]) for name in ("accepted", "corrected", "rejected", "drawn"))
        left = "–"
        if "errors_left" in row:
            estimate = row["errors_left"]
            left = f"{estimate['total']:.0f} ({estimate['low']:.0f} to {estimate['high']:.0f})"
        numbers = f"{row['images']} | {row['boxes']} | {row['seconds'] / 60:.1f}"
        lines.append(f"| {row['round']} | {numbers} | {did} | {100 * row['AP']:.1f} | {left} |")
    return "\n".join(lines)


def by_hand(truth: Labels, annotator: SimulatedAnnotator | None = None) -> float:
    """Seconds that a person takes to draw every box of every image without any proposal."""
    person, nothing = annotator or SimulatedAnnotator(), truth.rows(np.zeros(0, np.int64))
    return sum(person.inspect(truth.image(row), nothing.image(row)).seconds for row in range(len(truth)))


def _seen(labels: Labels | None) -> frozenset[str]:
    return frozenset() if labels is None else frozenset(labels.image_ids)


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
