"""What each kind of run may be told; everything has a default, and unknown names are errors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError

from simdetr.app.box_life import SHOWN_SCORE
from simdetr.app.refusals import FieldRefusal
from simdetr.app.schemas import Asked, Id, ModelId, Score
from simdetr.app.tables import RunKind

_TRAINER = (
    "max_steps|max_epochs|accumulate_grad_batches|gradient_clip_val|precision|accelerator|devices|val_check_interval"
    "|check_val_every_n_epoch"
)
_TUNABLE = (
    r"model\.(lr|backbone_lr|new_lr|weight_decay|schedule|warmup_steps|channels_last)",
    r"data\.(batch_size|num_workers|short_sides|max_side|crop|flip|colour|mosaic|rotation|noise|brightness|num_queries|min_score|score_power|seed)",
    rf"trainer\.({_TRAINER})",
    r"self_training\.checkpoint_every_steps",
)
Option = Annotated[str, StringConstraints(pattern=rf"^--({'|'.join(_TUNABLE)})=[\w.,\[\] -]+$")]
"""Numbers, switches and words; nothing that names code or files."""
DeviceName = Annotated[str, StringConstraints(pattern=r"^(cpu|cuda(:[0-9]{1,2})?)$")]
Steps = Annotated[int, Field(ge=1, le=10_000_000)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class OnDevice(Asked):
    """Work that a device is chosen for.

    Attributes:
        device: Torch's name of it; that of the app if left out.
    """

    device: DeviceName | None = None


class TrainParameters(OnDevice):
    """A training on the images that people inspected.

    Attributes:
        init: the detector to start from; the active one if left out, the recipe's random weights if null.
        max_steps: of the optimiser; by the number of images if left out.
        batch_size: images per step.
        lr: learning rate.
        seed: of order, augmentation and new weights.
        colour: strength of the colour augmentation.
        flip: mirror half of the images.
        crop: crop half of the images.
        mosaic: part of the samples that are made of four images.
        rotation: largest angle in degrees by which images are rotated.
        noise: largest deviation of added noise, as a part of the range of the values.
        brightness: largest part by which images become brighter or darker.
        with_proposed: proposals of inspected and proposed images count as objects too.
        min_score: of these, from this score on.
        validate_on: part of the inspected images that the detector is measured on and does not see; none where this is
            fewer than five.
        options: ``--section.name=value`` strings for the training.
    """

    init: ModelId | Literal["active"] | None = "active"
    max_steps: Steps | None = None
    batch_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    lr: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Seed = 0
    colour: Literal["none", "light", "strong"] = "light"
    flip: bool = True
    crop: bool = False
    mosaic: Score = 0.0
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    noise: Score = 0.0
    brightness: Score = 0.0
    with_proposed: bool = False
    min_score: Score = 0.5
    validate_on: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    options: Annotated[list[Option], Field(max_length=100)] = Field(default_factory=list)


class DetectParameters(OnDevice):
    """A detection on images that nobody has inspected, or on some.

    Attributes:
        model: the detector; the active one if left out.
        min_score: boxes of lower scores are not proposed; people are shown those from ``shown_score`` on.
        max_boxes: most boxes per image.
        iou_threshold: of two boxes that overlap more the less certain goes.
        image_ids: the images; all that are new, proposed or open if left out.
        propose: what is found becomes proposals; else it can only be looked at, in the run.
        shown_score: people are shown proposals from this score on; where nothing reaches it, better proposals stay.
        first: the first proposals of a project, which nobody asked for: they also come on an image that is open while
            it has no box, let other runs through, and end once a detector is trained.
    """

    model: ModelId | None = None
    min_score: Score = 0.05
    max_boxes: Annotated[int, Field(ge=1, le=1000)] = 100
    iou_threshold: Score = 0.5
    image_ids: Annotated[list[Id], Field(max_length=100_000)] = Field(default_factory=list)
    propose: bool = True
    shown_score: Score = SHOWN_SCORE
    first: bool = False


class OrderParameters(OnDevice):
    """An order in which images are to be seen, from what a detector finds in them.

    Attributes:
        model: the detector; the active one if left out.
        strategy: as of ``simdetr label-order``.
        encoder: what tells whether images are alike; that of the pretraining's mining if left out.
        budget: images until the next order.
        seed: of draws.
    """

    model: ModelId | None = None
    strategy: (
        Literal["cluster", "interleave", "box_size", "cluster_size", "entropy", "k_center", "mixed", "random"] | None
    ) = None
    encoder: Annotated[str, StringConstraints(max_length=200, pattern=r"^[\w./-]+$")] | None = None
    budget: Annotated[int, Field(ge=1, le=100_000)] = 20
    seed: Seed = 0


class EmbedParameters(OnDevice):
    """Features of all images, which orders read.

    Attributes:
        model: as for an order.
        encoder: as for an order.
    """

    model: ModelId | None = None
    encoder: Annotated[str, StringConstraints(max_length=200, pattern=r"^[\w./-]+$")] | None = None


class AutolabelParameters(OnDevice):
    """Few labels to many; all but ``init``, ``max_steps`` and ``options`` are those of ``simdetr autolabel``."""

    init: ModelId | None = None
    score_rule: Literal["agreement", "absolute", "precision", "per_class_top"] = "agreement"
    agreement: Score = 0.5
    min_score: Score = 0.8
    precision: Score = 0.8
    per_shot: Annotated[int, Field(ge=1, le=10_000)] = 20
    encoder: Annotated[str, StringConstraints(max_length=200, pattern=r"^[\w./-]+$")] | None = None
    looks_per_image: Annotated[float, Field(gt=0, le=1000)] = 5.0
    neighbours: Annotated[int, Field(ge=1, le=1000)] | None = None
    background_shots: Annotated[int, Field(ge=0, le=1000)] = 6
    min_margin: Annotated[float, Field(ge=0, le=1)] | None = None
    corrector: Literal["views", "cascade", "queries", "none"] = "views"
    seen_again: Annotated[int, Field(ge=0, le=3)] = 1
    corrector_steps: Annotated[int, Field(ge=1, le=100_000)] = 150
    ignore_above: Score = 0.1
    max_ratio: Annotated[float, Field(gt=0, le=1e6)] = 10.0
    again_from: Literal["shots", "init"] = "shots"
    seed: Seed = 0
    max_steps: Steps | None = None
    options: Annotated[list[Option], Field(max_length=100)] = Field(default_factory=list)


class MineParameters(OnDevice):
    """Proposals from the images alone, before there is a detector.

    Attributes:
        max_boxes: most boxes per image.
        max_images: of the queue, from its head on; more than people see before there is a detector is of no use.
        image_ids: the images, in place of those of the queue.
    """

    max_boxes: Annotated[int, Field(ge=1, le=100)] = 10
    max_images: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    image_ids: Annotated[list[Id], Field(max_length=100_000)] = Field(default_factory=list)


OF_KIND: dict[RunKind, type[Asked]] = {
    RunKind.TRAIN: TrainParameters,
    RunKind.DETECT: DetectParameters,
    RunKind.ORDER: OrderParameters,
    RunKind.EMBED: EmbedParameters,
    RunKind.AUTOLABEL: AutolabelParameters,
    RunKind.MINE: MineParameters,
}


def checked(kind: RunKind, given: dict[str, object]) -> Asked:
    """The parameters of a run.

    Raises:
        FieldRefusal: one of them is unknown or out of range.
    """
    try:
        return OF_KIND[kind].model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise FieldRefusal(("body", "parameters", *first["loc"]), first["msg"]) from error
