"""A few labelled boxes and a folder of images in, a labelled set and a detector out: label, verify, correct.

    shots -> few-shot detector -> detections -> source -> verify -> correct -> assemble -> detector

Every stage keeps what it found below the run folder and looks for it first, so that the same call goes on where the
last one stopped, and one with another threshold repeats only what depends on it. Nothing that a person labelled is
changed. Source: Kaul et al., Label, Verify, Correct (2022), on a detection transformer, without base classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from simdetr import pipeline
from simdetr.data.annotations import LabelError
from simdetr.data.category_matching import match_categories
from simdetr.data.coco import write_coco
from simdetr.data.images import ImageSource, open_images
from simdetr.data.label_files import write_labels
from simdetr.data.labels import Labels
from simdetr.data.machine import default_device
from simdetr.data.protocols import hash_order
from simdetr.data.storage import write_json
from simdetr.evaluation.coco_metric import coco_metrics
from simdetr.exchange.weights import is_saved, load_detector
from simdetr.labelling.assembly import assemble, classes_without_labels, collapsed_classes, without_duplicates
from simdetr.labelling.candidates import (
    RIGHT_IOU,
    Candidates,
    on_labels,
    read_candidates,
    source,
    stage_rows,
    thresholds,
    without_base,
    worth_a_look,
    write_candidates,
)
from simdetr.labelling.choices import AutolabelSettings
from simdetr.labelling.consensus import consensus
from simdetr.labelling.correction import CorrectorFit, correct_boxes, fit_corrector
from simdetr.labelling.crop_features import CropEncoder, crop_encoder, crop_features
from simdetr.labelling.gallery_page import write_gallery_page
from simdetr.labelling.shots import LabellingInputs, background_boxes, check_shots, renamed
from simdetr.labelling.verification import NEGATIVE, Gallery, verify
from simdetr.mining.encoders import Encoder
from simdetr.recipe import Recipe
from simdetr.training.inference import predict
from simdetr.training.run_folder import RunFolder, detector_folder

LOG = logging.getLogger(__name__)
MOST_LOST = 0.02
"""Drop of AP of the classes known before from which the guard warns."""
LeftOut = Callable[[], tuple[NDArray[np.float32], NDArray[np.bool_]]]
"""Gives scores on left-out shots, and which are right; called by the score rule that needs them alone."""


class NothingToLearnError(ValueError):
    """No candidate became a label, so that training again would learn nothing new."""


@dataclass(frozen=True)
class AutolabelRun:
    """Where a run keeps what it found."""

    path: Path

    @property
    def few_shot(self) -> Path:
        """The training on the shots alone."""
        return self.path / "few_shot"

    @property
    def detections(self) -> Path:
        """What its detector finds in the unlabelled images."""
        return self.path / "detections.parquet"

    def candidates(self, stage: str) -> Path:
        """Candidates after a stage, ``<stage>_why.parquet`` beside them with reasons and evidence."""
        return self.path / f"{stage}.parquet"

    @property
    def labels(self) -> Path:
        """The result for people and tools: COCO JSON of what was kept, of the shots and of what people labelled."""
        return self.path / "labels.json"

    @property
    def training_labels(self) -> Path:
        """The same with the regions to ignore, as the last training reads it."""
        return self.path / "training.parquet"

    @property
    def detector(self) -> Path:
        """The detector that was trained on the result."""
        return self.path / "retrained" / "detector"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.path / "report" / "index.html"

    @property
    def base(self) -> Path:
        """AP of the classes known before, by detector, where base labels were given."""
        return self.path / "base.json"

    @property
    def stages(self) -> Path:
        """Counts and, with truth, quality of every stage, as ``stage_rows`` gives them."""
        return self.path / "stages.json"


def autolabel(
    images: str | Path | ImageSource,
    shots: str | Path,
    out: str | Path,
    config: Sequence[str | Path] = (),
    *,
    init: str | Path,
    shot_images: str | Path | None = None,
    negatives: str | Path | None = None,
    people: str | Path | None = None,
    base: str | Path | None = None,
    truth: str | Path | None = None,
    options: Sequence[str] = (),
    device: str | None = None,
    settings: AutolabelSettings | None = None,
) -> AutolabelRun:
    """Label a set of images from a few boxes per class, and train a detector on the result.

    Args:
        images: The images to label: a folder, list file or COCO JSON, or an ``ImageSource``.
        shots: COCO JSON with a few boxes of every class; what else their images hold need not be labelled.
        out: Folder of this run; an unfinished one is gone on with.
        config: YAML files of the trainings, later ones over earlier ones; a recipe for few labels without any.
        init: Run folder, detector folder or checkpoint of the pretraining.
        shot_images: Folder of the images of the shots, where they are not among ``images``.
        negatives: COCO JSON of boxes on those images that look like a class and are none.
        people: COCO JSON of images among ``images`` that people labelled as a whole; they stay as they are.
        base: COCO JSON of images among ``images`` with boxes of the classes that ``init`` knows and is to keep.
        truth: COCO JSON with boxes for some of ``images``; only to measure by.
        options: ``--section.name=value`` strings for both trainings, over the files.
        device: Torch device; the GPU if there is one.
        settings: How few labels become many.

    Returns:
        The run: ``labels`` and ``detector`` are its results.

    Raises:
        LabelError: Shots that cannot be read, of no class, or of images that are not there.
        NothingToLearnError: No candidate was kept; the report says why each was not.
        RunMismatchError: ``out`` holds a run of other shots, images or trainings.
    """
    settings, run = settings or AutolabelSettings(), AutolabelRun(Path(out))
    inputs = LabellingInputs.read(images, shots, shot_images, negatives, people, base, truth)
    check_shots(inputs.shots, inputs.negatives, inputs.is_base)
    start, device = detector_folder(init), device or default_device()
    encoder = crop_encoder(encoder_for(settings.encoder, init), device)
    own = {
        "images": inputs.images.fingerprint(),
        "shots": inputs.shots.fingerprint(),
        "init": str(start),
        "configs": [*map(str, config)],
    }
    own |= {} if inputs.base is None else {"base": inputs.base.fingerprint()}
    RunFolder(run.path).claim(yaml.safe_dump({"autolabel": {**own, "options": list(options)}}))

    few_shot = few_shot_detector(run, inputs, start, config, options)

    def left_out() -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        return left_out_scores(run, inputs, start, config, options, device)

    candidates, boxes = label(run, inputs, few_shot, encoder, settings, device, left_out)
    made = assemble(candidates, boxes, inputs.labelled(), inputs.people, ignore_above=settings.ignore_above)
    write_labels(made, run.training_labels)
    write_coco(without_ignored(made), run.labels)
    write_gallery_page(run, inputs, candidates, boxes, settings)
    if not len(candidates.kept):
        raise NothingToLearnError(
            f"autolabel: none of {len(candidates.reason):,} detections was kept, so there is nothing new to learn; "
            f"{run.report} says why. Give more shots, or a lower --agreement"
        )
    detector = retrain(run, inputs, made, start if settings.again_from == "init" else few_shot, config, options)
    if inputs.base is not None:
        guard_base(run, inputs, {"init": start, "few_shot": few_shot, "retrained": detector}, device)
    return run


def guard_base(
    run: AutolabelRun, inputs: LabellingInputs, detectors: Mapping[str, Path], device: str
) -> dict[str, float]:
    """AP of the classes known before, of every detector; warns where the last has lost more than ``MOST_LOST``.

    Measured on the images of the base labels that the trainings did not see, or on all where they saw all.
    """
    assert inputs.base is not None
    seen = set(inputs.labelled().image_ids)
    held = [image_id for image_id in inputs.base.image_ids if image_id not in seen] or list(inputs.base.image_ids)
    truth, scores = inputs.base.select(held), {}
    for name, detector in detectors.items():
        found = predict(inputs.images.subset(held), detector, device=device)
        knows = match_categories(found.categories, truth.categories)
        scores[name] = coco_metrics(truth, found)["AP"] if knows else 0.0
    write_json(run.base, scores)
    names = list(detectors)
    if scores[names[-1]] < scores[names[0]] - MOST_LOST:
        LOG.warning(
            "the classes known before have lost: AP %.1f, before %.1f; give more labels of them as --base",
            100 * scores[names[-1]],
            100 * scores[names[0]],
        )
    return scores


def few_shot_detector(
    run: AutolabelRun, inputs: LabellingInputs, init: Path, config: Sequence[str | Path], options: Sequence[str]
) -> Path:
    """The detector that is trained on the shots alone."""
    return train_on(run.few_shot, inputs.images, inputs.labelled(), init, config, options)


def left_out_scores(
    run: AutolabelRun,
    inputs: LabellingInputs,
    init: Path,
    config: Sequence[str | Path],
    options: Sequence[str],
    device: str,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Scores of detections on a fifth of the shots' images, by a detector trained on the others; which are right.

    Detections that touch no shot are left out, for what else the images hold is not labelled.

    Returns:
        Scores [n], and bool [n]: of the shot's class, with an overlap of at least one half.

    Raises:
        LabelError: Fewer than five images have shots.
    """
    shots = inputs.shots
    order = hash_order(shots.image_ids, 0)
    held, rest = order[::5], [image_id for place, image_id in enumerate(order) if place % 5]
    if len(order) < 5:
        raise LabelError(f"score_rule: precision is measured on every fifth image, but {len(order)} have shots")
    detector = train_on(run.path / "left_out", inputs.images, shots.select(rest), init, config, options)
    found = predict(inputs.images.subset(held), detector, min_score=0.02, iou_threshold=0.5, device=device)
    found = found.with_categories(shots.categories)
    touching = found.rows(np.flatnonzero(on_labels(found, shots, iou=0.1)))
    right = on_labels(touching, shots, iou=RIGHT_IOU, by_class=True)
    return touching.scores, right


def label(
    run: AutolabelRun,
    inputs: LabellingInputs,
    detector: Path,
    encoder: CropEncoder,
    settings: AutolabelSettings,
    device: str,
    left_out: LeftOut,
) -> tuple[Candidates, NDArray[np.float32]]:
    """Detections of the pool, sourced, verified and corrected: the candidates, and their boxes [M, 4]."""
    after: dict[str, Any] = {"detector": fingerprint_of(detector), "images": inputs.images.fingerprint()}
    after["pool"] = inputs.images.subset(inputs.pool).fingerprint()

    def detected() -> Candidates:
        boxes = predict(inputs.images, detector, min_score=0.02, iou_threshold=0.5, device=device)
        found = source(boxes.with_categories(inputs.shots.categories), inputs.shots, inputs.people)
        outside = ~np.isin(boxes.image_ids, inputs.pool)
        return without_base(found.reject(outside[boxes.owners], "elsewhere"), inputs.is_base, inputs.base)

    for name in ("people", "base"):
        if (given := getattr(inputs, name)) is not None:
            after[name] = given.fingerprint()
    found = _stage(run, "source", after, detected)

    after |= {"encoder": encoder.fingerprint, "settings": _of(settings, "source", "verify")}
    after |= {"negatives": None if inputs.negatives is None else inputs.negatives.fingerprint()}
    found = _stage(run, "verify", after, lambda: verified(run, inputs, found, encoder, settings, device, left_out))

    after |= {"correct": _of(settings, "correct")}
    found = _stage(run, "correct", after, lambda: corrected(run, inputs, found, detector, settings, device))
    write_json(run.stages, stage_rows(found, inputs.truth))
    collapsed = collapsed_classes(found, settings.max_ratio)
    if collapsed:
        LOG.warning("far more labels than of the other classes, a sign of a collapse: %s", collapsed)
    if empty := classes_without_labels(found, inputs.shots):
        LOG.warning("classes with shots of which no candidate was kept: %s", ", ".join(empty))
    return found, found.evidence["corrected_xyxy"]


def verified(
    run: AutolabelRun,
    inputs: LabellingInputs,
    candidates: Candidates,
    encoder: CropEncoder,
    settings: AutolabelSettings,
    device: str,
    left_out: LeftOut,
) -> Candidates:
    """The candidates with the votes of the nearest shots, and rejected where these or the scores speak against them."""
    most = settings.per_shot * int(np.bincount(inputs.shots.classes).max())
    rows = np.flatnonzero(worth_a_look(candidates, settings.looks_per_image, most))
    cache = run.path / "features"
    background = background_boxes(inputs.shots, candidates.labels, settings.background_shots)
    gallery = gallery_of(inputs, background, encoder, cache, device)
    looked_at = candidates.labels.rows(rows)
    features = crop_features(inputs.images, looked_at, encoder, device=device, cache=cache)
    votes = verify(features, looked_at.classes, gallery, k=settings.neighbours, min_margin=settings.min_margin)
    agreeing = np.zeros(len(candidates.reason), bool)
    agreeing[rows] = votes.vote == looked_at.classes
    above = thresholds(
        candidates.labels.rows(candidates.kept),
        settings.score_rule,
        agreeing=agreeing[candidates.kept],
        agreement=settings.agreement,
        min_score=settings.min_score,
        most_per_class=most,
        left_out=left_out() if settings.score_rule == "precision" else None,
        precision=settings.precision,
    )
    low = candidates.labels.scores <= above[candidates.labels.classes]
    unseen = np.ones(len(low), bool)
    unseen[rows] = False
    found = candidates.reject(low | unseen, "low_score").reasons(votes.reason.astype(object), rows)
    # in rows of all shots, also where the gallery lacks some that cannot be read; -1 stays
    nearest = np.array([*(int(name.rpartition("#")[2]) for name in gallery.ids), -1])[votes.nearest]
    width = nearest.shape[1]
    columns: dict[str, tuple[NDArray[Any], float]] = {"vote": (votes.vote, -2), "margin": (votes.margin, np.nan)}
    columns |= {f"nearest_{i}": (nearest[:, i], -1) for i in range(width)}
    columns |= {f"similarity_{i}": (votes.similarity[:, i], np.nan) for i in range(width)}
    return found.with_evidence(
        **{name: _spread(values, rows, len(low), gap) for name, (values, gap) in columns.items()}
    )


def gallery_of(inputs: LabellingInputs, background: Labels, encoder: CropEncoder, cache: Path, device: str) -> Gallery:
    """The shots, the negative ones and the background, in this order; ids end with ``#`` and the row of all."""
    negatives = [background] if inputs.negatives is None else [inputs.negatives, background]
    parts = [(inputs.shots, inputs.shots.classes)]
    parts += [(own, np.full_like(own.classes, NEGATIVE)) for own in negatives]
    features = [crop_features(inputs.images, own, encoder, device=device, cache=cache).values for own, _ in parts]
    images = [own.image_ids[image] for own, _ in parts for image in own.owners]
    ids = [f"{image_id}#{row}" for row, image_id in enumerate(images)]
    return Gallery.of(np.concatenate(features), np.concatenate([classes for _, classes in parts]), ids)


def corrected(
    run: AutolabelRun,
    inputs: LabellingInputs,
    candidates: Candidates,
    detector: Path,
    settings: AutolabelSettings,
    device: str,
) -> Candidates:
    """The candidates with corrected boxes; of two on one object the less sure is rejected."""
    labels, boxes = candidates.labels, candidates.labels.boxes_xyxy.copy()
    shift = np.ones(len(boxes), np.float32)
    rows = candidates.kept
    if settings.corrector == "views" and len(rows):
        found = consensus(load_detector(detector), inputs.images, labels.rows(rows), device=device)
        boxes[rows], shift[rows] = found.boxes_xyxy, found.shift_iou
        seen = _spread(found.seen_again, rows, len(boxes), -1)
        candidates = candidates.with_evidence(seen_again=seen)
        candidates = candidates.reject((seen >= 0) & (seen < settings.seen_again), "not_seen_again")
    elif settings.corrector in ("cascade", "queries") and len(rows):
        loaded = load_detector(detector)
        fit = CorrectorFit(kind=settings.corrector, steps=settings.corrector_steps, seed=settings.seed)
        corrector = fit_corrector(loaded, inputs.images, inputs.shots, run.path / "corrector", fit, device=device)
        moved = correct_boxes(corrector, inputs.images, labels.rows(rows), device=device)
        boxes[rows], shift[rows] = moved.boxes_xyxy, moved.shift_iou
    return without_duplicates(candidates, boxes).with_evidence(corrected_xyxy=boxes, shift=shift)


def retrain(
    run: AutolabelRun,
    inputs: LabellingInputs,
    labels: Labels,
    init: Path,
    config: Sequence[str | Path],
    options: Sequence[str],
) -> Path:
    """The detector that is trained on the result; anew where other labels were made since."""
    folder, mark = run.path / "retrained", run.path / "retrained.json"
    own = {"labels": labels.fingerprint(), "init": str(init)}
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) != own:
        LOG.info("other labels than those of %s: it is trained anew", folder)
        shutil.rmtree(folder, ignore_errors=True)
    write_json(mark, own)
    return train_on(folder, inputs.images, labels, init, config, options)


def without_ignored(labels: Labels) -> Labels:
    """The objects alone."""
    return labels.rows(np.flatnonzero(~labels.crowd))


def fingerprint_of(detector: Path) -> str:
    """Hash of a detector's weights."""
    path = detector / "model.safetensors" if detector.is_dir() else detector
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def train_on(
    folder: Path,
    images: ImageSource,
    labels: Labels,
    init: Path,
    config: Sequence[str | Path],
    options: Sequence[str],
) -> Path:
    """Train on labels whose images lie in several folders: a list of paths stands for one."""
    if is_saved(folder / "detector"):
        return folder / "detector"
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "images.txt"
    listed.write_text("".join(f"{Path(str(images.path_of(i))).absolute()}\n" for i in labels.image_ids), "utf-8")
    names = dict(zip(labels.image_ids, open_images(listed).ids, strict=True))
    write_labels(renamed(labels, names), folder / "labels.parquet")
    return pipeline.finetune(listed, folder / "labels.parquet", folder, config, init=init, options=options)


def _stage(run: AutolabelRun, name: str, after: Mapping[str, Any], make: Callable[[], Candidates]) -> Candidates:
    """What a stage found, read where it was found after the same before."""
    path, mark = run.candidates(name), run.path / f"{name}.json"
    key = hashlib.blake2b(json.dumps(after, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
    if path.is_file() and mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == {"after": key}:
        return read_candidates(path)
    mark.unlink(missing_ok=True)  # a kill between the two files must not leave the mark of others
    found = make()
    write_candidates(found, path)
    write_json(mark, {"after": key})
    LOG.info("%s: %s", name, ", ".join(f"{count:,} {reason}" for reason, count in found.counts().items()))
    return found


_OF_STAGE = {
    "source": ("score_rule", "agreement", "min_score", "precision", "per_shot", "looks_per_image"),
    "verify": ("neighbours", "background_shots", "min_margin"),
    "correct": ("corrector", "seen_again", "corrector_steps", "seed"),
}


def _of(settings: AutolabelSettings, *stages: str) -> dict[str, Any]:
    """The settings that some stages depend on."""
    values = asdict(settings)
    return {name: values[name] for stage in stages for name in _OF_STAGE[stage]}


def _spread(values: NDArray[Any], rows: NDArray[np.int64], count: int, gap: float) -> NDArray[Any]:
    """Values of some rows in a column of all, the others ``gap``."""
    column = np.full(count, gap, values.dtype)
    column[rows] = values
    return column


def encoder_for(name: str | None, init: str | Path) -> str | Encoder:
    """The encoder of a name, or what the pretraining mined with where there is none: a run, or a detector in one.

    Raises:
        ValueError: Neither is known.
    """
    if name is not None:
        return name
    inner = Path(init).resolve()
    for folder in (inner, *inner.parents[:2]):  # RUN, RUN/stage1/detector
        config = folder / "config.yaml"
        kept = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
        if isinstance(kept, dict) and "encoder" in kept:
            break
    else:
        raise ValueError(
            f"encoder: {init} does not say what it was mined with; name one, such as "
            "--encoder=vit_small_patch8_224.dino"
        )
    part = kept["encoder"]
    if part["class_path"].endswith(".TimmEncoder") and part["init_args"].get("pretrained"):
        return str(part["init_args"]["model"])  # its pooled features, not those of the cells
    return Recipe((str(config),)).sections().encoder
