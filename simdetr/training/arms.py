"""What a comparison compares: the name of an arm in, what its fine-tuning starts from out.

    random           nothing: every weight is new
    backbone         the weights that the pretraining's backbone started from, and a new detector on it
    stage1, stage2   the detector of a stage of the run
    pretrained       the last detector of what --init names
    checkpoint       any detector file: `checkpoint=coco.pth`

and pretrainings that differ from the run in one thing each, ``VARIANTS``. An arm's name may be followed by where its
detector is, `class-unaware=runs/other`; a variant without is pretrained, with as many steps as the run.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simdetr.training.run_folder import RunFolder, detector_folder

RANDOM, BACKBONE, PRETRAINED, CHECKPOINT = "random", "backbone", "pretrained", "checkpoint"
STAGE = "stage"
EARLIER = {"scratch": RANDOM, "backbone only": BACKBONE}
"""Names that comparisons of earlier versions gave to arms."""


@dataclass(frozen=True)
class Variant:
    """A pretraining like the run's but for one thing.

    Attributes:
        says: What differs.
        options: ``--section.name=value`` strings over the run's configuration.
        random: All weights are new, those of the backbone too.
        detector: Class path of another detector on the same backbone.
        rival: Method of ``simdetr rivals`` whose boxes are taken instead of the mined ones.
        needs_weights: Makes no sense on a backbone of random weights, which it would freeze.
    """

    says: str
    options: tuple[str, ...] = ()
    random: bool = False
    detector: str | None = None
    rival: str | None = None
    needs_weights: bool = False


VARIANTS = {
    "class-unaware": Variant("all mined boxes of one class", ("--clustering.num_classes=1",)),
    "frozen-backbone": Variant("the backbone stays as it was", ("--model.backbone_lr=0.0",), needs_weights=True),
    "detreg": Variant(
        "DETReg's objective: boxes without classes and the backbone's own embeddings of them, on a frozen backbone; "
        "its detector neither refines boxes nor chooses queries in a first stage",
        ("--clustering.num_classes=1", "--model.backbone_lr=0.0", "--self_training.stages=1"),
        detector="simdetr.detectors.DETReg",
        needs_weights=True,
    ),
    "selective-search": Variant("boxes of Selective Search in place of the mined ones", rival="selective_search"),
    "from-scratch": Variant("from random weights, those of the backbone too", random=True),
}
NAMES = (RANDOM, BACKBONE, PRETRAINED, CHECKPOINT, *VARIANTS)


class ArmError(ValueError):
    """An arm that is not known, or that cannot be had here; the message says which there are."""


@dataclass(frozen=True)
class Arm:
    """One thing that is fine-tuned.

    Attributes:
        name: As given.
        says: What it starts from.
        detector: The detector that it starts from; None where there is none, or none yet.
        run: Where it was pretrained, as far as that is known: for what it cost.
        variant: The pretraining that is made for it first; None if none is.
    """

    name: str
    says: str
    detector: Path | None = None
    run: Path | None = None
    variant: Variant | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether it is what a user has without any pretraining on these images."""
        return self.name in (RANDOM, BACKBONE, CHECKPOINT)


def default_arms(init: Path, *, with_weights: bool) -> tuple[str, ...]:
    """What a user has today, and the last stage of a run (or the one detector that there is)."""
    trained = _stages(init)
    return (BACKBONE if with_weights else RANDOM, f"{STAGE}{trained[-1]}" if trained else PRETRAINED)


def read_arms(words: Sequence[str], init: Path, out: Path, *, with_weights: bool) -> tuple[Arm, ...]:
    """The arms that some words name.

    Args:
        words: Names, each maybe followed by ``=`` and a run folder, detector folder or checkpoint.
        init: Run folder or detector of the pretraining.
        out: Folder of the comparison, below which variants are pretrained.
        with_weights: Whether the pretraining's backbone started from weights.

    Raises:
        ArmError: An unknown or repeated name, fewer than two, or an arm that this run cannot have.
        FileNotFoundError: A place without a detector.
    """
    names = [word.partition("=")[0].strip() for word in words]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ArmError(f"arms: expected each once, got {', '.join(repeated)} more than once")
    if len(names) < 2:
        raise ArmError(f"arms: expected at least two to compare, got {', '.join(names) or 'none'}")
    return tuple(_read(word, init, out, with_weights) for word in words)


def _read(word: str, init: Path, out: Path, with_weights: bool) -> Arm:
    name, _, place = (part.strip() for part in word.partition("="))
    staged = name.startswith(STAGE) and name[len(STAGE) :].isdigit()
    if name not in NAMES and not staged:
        near = difflib.get_close_matches(name, [*NAMES, "stage1", "stage2"], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ArmError(f"arms: expected some of {', '.join(NAMES)}, stage1, stage2, got {name!r}{hint}")
    if place:
        if name in (RANDOM, BACKBONE):
            raise ArmError(f"arms: {name} starts from no detector, got {place}; give a detector as checkpoint={place}")
        return Arm(name, f"the detector in {place}", detector_folder(place), _run_of(Path(place)))
    if name == RANDOM:
        return Arm(name, "random weights, all of them learn")
    if name == BACKBONE:
        if not with_weights:
            raise ArmError(f"arms: the backbone of {init} started from random weights; take random in place of {name}")
        return Arm(name, "the weights that the pretraining's backbone started from, and a new detector on it")
    if name == CHECKPOINT:
        raise ArmError("arms: expected checkpoint=FILE, a detector file or folder, got no file")
    if name == PRETRAINED:
        return Arm(name, f"the detector of {init}", detector_folder(init), _run_of(init))
    if staged:
        stage, trained = int(name[len(STAGE) :]), _stages(init)
        if stage not in trained:
            there = ", ".join(f"{STAGE}{number}" for number in trained) or "no stages"
            raise ArmError(f"arms: {init} has {there}, got {name}; give a run folder that has it, or leave it out")
        return Arm(name, f"the detector of stage {stage} of {init}", RunFolder(init).detector(stage), init)
    return _variant(name, init, out, with_weights)


def _variant(name: str, init: Path, out: Path, with_weights: bool) -> Arm:
    """An arm that is pretrained first, like the run of ``init`` but for one thing."""
    variant, run = VARIANTS[name], RunFolder(init)
    if not run.config.is_file() or not run.proposals.is_dir():
        raise ArmError(
            f"arms: {name} is pretrained as the run of --init was, but {init} is no run folder with proposals; give "
            f"one, or {name}=FOLDER with a detector pretrained so"
        )
    if variant.needs_weights and not with_weights:
        raise ArmError(
            f"arms: {name} keeps the backbone as it is, and that of {init} started from random weights; leave it out"
        )
    if variant.rival is not None and not (init / "rivals" / variant.rival).is_dir():
        raise ArmError(
            f"arms: {name} takes the boxes of `simdetr rivals --run {init} --methods [{variant.rival}] --max_boxes "
            "30`, which has not been run"
        )
    folder = pretraining_folder(out, name)
    return Arm(name, f"pretrained as {init}, but: {variant.says}", None, folder, variant)


def pretraining_folder(out: Path, name: str) -> Path:
    """Where a comparison pretrains a variant."""
    return out / "pretraining" / name


def _stages(init: Path) -> list[int]:
    run = RunFolder(init)
    return [stage for stage in run.stages() if run.has_detector(stage)]


def _run_of(place: Path) -> Path | None:
    """The run folder that a detector lies in, if it does."""
    return next((folder for folder in (place, *place.parents[:2]) if (folder / "steps.jsonl").is_file()), None)


def run_settings(init: Path) -> dict[str, Any]:
    """The configuration of a run; empty of a detector that lies in none."""
    run = RunFolder(init)
    settings: dict[str, Any] = yaml.safe_load(run.config.read_text(encoding="utf-8")) if run.config.is_file() else {}
    return settings


def detreg_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a DETReg detector on the backbone of a run's configuration; its own ones are left to it."""
    given = settings["model"]["detector"].get("init_args") or {}
    left = ("num_classes", "num_queries", "with_box_refine", "two_stage", "objectness", "freeze_backbone")
    return {name: value for name, value in given.items() if name not in left}


def subject_of(arms: Sequence[Arm]) -> Arm:
    """The arm that stands for the pretraining: the last stage, or else the first that a user has not without it."""
    others = [arm for arm in arms if arm != baseline_of(arms)]
    stages = [arm for arm in others if arm.name.startswith(STAGE)]
    if stages:
        return max(stages, key=lambda arm: int(arm.name.removeprefix(STAGE)))
    return next((arm for arm in others if not arm.is_baseline), others[0])


def baseline_of(arms: Sequence[Arm]) -> Arm:
    """The arm that gains are measured against: what a user has today, a backbone with weights before anything else."""
    by_name = {arm.name: arm for arm in arms}
    found = [by_name[name] for name in (BACKBONE, RANDOM, CHECKPOINT) if name in by_name]
    return (found or list(arms))[0]
