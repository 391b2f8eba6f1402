"""The one contract of detectors: what training, relabelling and evaluation need of any of them, and nothing else.

Images and padding mask in, predictions out; images, mask and targets in, losses out. Deformable DETR, ViDT and the
adapters to other libraries keep it, so the pipeline does not know which it has.
Heads read what a detector computes on its way to boxes: feature maps, and the queries of every layer.
Letters: B images, Q queries, K classes, T objects of one image, C channels of a map, D those of a query, L predictions
of the decoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from simdetr.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from simdetr.detectors.matcher import Target


class Prediction(TypedDict):
    """Classes and boxes of one layer."""

    pred_logits: Tensor
    """[B, Q, K]; each class on its own (sigmoid), there is no class for background. A row of -inf is no detection."""
    pred_boxes: Tensor
    """[B, Q, 4] cxcywh, fractions of the valid (unpadded) image."""
    pred_objectness: NotRequired[Tensor]
    """Logit of there being any object [B, Q, 1], of detectors that learn it apart from the classes."""
    pred_ious: NotRequired[Tensor]
    """Logit of the box's IoU with its object [B, Q, 1], of detectors that estimate it."""
    pred_vectors: NotRequired[Tensor]
    """Coefficients of the object's mask [B, Q, D], of detectors that draw masks."""


class DetectorOutput(Prediction):
    """What a detector returns: the last layer's prediction and those that only training needs."""

    aux_outputs: NotRequired[list[Prediction]]
    """Predictions of the decoder's earlier layers, first to last."""
    enc_outputs: NotRequired[Prediction]
    """Two-stage only: one prediction per cell of the encoder's output, Q = S; of K classes, or of objectness, K = 1."""
    pred_points: NotRequired[Tensor]
    """Reference points (x, y), fractions of the valid image [B, Q, 2], of landmark heads."""
    point_logits: NotRequired[Tensor]
    """Class logits [B, Q, K] of landmark heads that classify on their own; they then give a detection's class."""
    point_cells: NotRequired[Tensor]
    """Width and height of a subregion [B, 2], fractions of the valid image, of landmark heads that read a grid."""
    score_maps: NotRequired[Tensor]
    """What a localisation head reads its boxes off [B, 1, h, w], in [0, 1] over the valid image; evaluation mode."""
    enc_tokens: NotRequired[list[Tensor]]
    """Token labelling only, in training: class logits [B, h, w, K] of the cells of every map."""


class Detector(nn.Module, ABC):
    """A detection network with its own loss.

    Attributes:
        init_args: arguments that rebuild it, plain JSON types, ``num_classes`` among them; kept beside its weights.
        num_classes: K.
        backbone_name: dotted name of the submodule that learns with the backbone's learning rate.
        body_name: dotted name of the feature network that encoder checkpoints fit.
        slow_names: parameters whose name holds one of these learn ten times slower, as published for Deformable DETR.
        decays_backbone_vectors: whether weight decay also holds for the backbone's biases, norms and tokens.
        takes_backbones: whether a checkpoint that fits its backbone alone is enough to start from.
        undecayed_names: parameters whose name holds one of these learn without weight decay.
        takes_unlabelled: whether images that nobody has labelled may be in a training batch; their targets say so.
    """

    init_args: dict[str, Any]
    num_classes: int
    backbone_name: str = "backbone"
    body_name: str = "backbone.body"
    slow_names: tuple[str, ...] = ("reference_points", "sampling_offsets")
    decays_backbone_vectors: bool = True
    takes_backbones: bool = False
    undecayed_names: tuple[str, ...] = ()
    takes_unlabelled: bool = False

    @abstractmethod
    def forward(self, images: Tensor, mask: Tensor | None = None) -> DetectorOutput:
        """Detect.

        Args:
            images: normalised images [B, 3, H, W], zero-padded at the bottom and right.
            mask: bool [B, H, W], True = padding; None if no image is padded.
        """

    @abstractmethod
    def losses(self, images: Tensor, mask: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Losses of a batch in training mode.

        Args:
            images: as in ``forward``.
            mask: as in ``forward``.
            targets: ``labels`` and ``boxes`` of each image, and ``scores``, how sure each is (1 where there are none);
                images, or all of them, may be empty.

        Returns:
            ``loss``, the total to minimise, which every trainable parameter takes part in, and its terms.
        """

    @classmethod
    def from_init_args(cls, init_args: Mapping[str, Any]) -> Detector:
        """Build it anew from ``init_args``, or from the arguments that a config file has."""
        return cls(**init_args)

    @property
    def normalisation(self) -> dict[str, tuple[float, ...]]:
        """``mean`` and ``std`` of the colours 0..1 of its images: its backbone's, or ImageNet's if that has none."""
        backbone: Any = self.get_submodule(self.backbone_name)
        return {
            "mean": getattr(backbone, "colour_mean", IMAGENET_MEAN),
            "std": getattr(backbone, "colour_std", IMAGENET_STD),
        }

    @property
    def core(self) -> Detector:
        """The detector that checkpoints of plain detectors fit: this one, unless it wraps another."""
        return self

    @property
    def deployed(self) -> Detector:
        """The detector that predicts: this one, unless parts of it serve training alone."""
        return self

    def set_progress(self, progress: float) -> None:
        """Told before every training step which share of the training is done, 0 to 1, for schedules of its parts."""

    def alarms(self, epochs: Sequence[Mapping[str, float]]) -> list[str]:
        """What its parts find wrong with a training, in sentences; asked after every epoch.

        Args:
            epochs: means of what ``losses`` gave in each epoch so far, by name.
        """
        return []

    @classmethod
    def thawed(cls, init_args: Mapping[str, Any]) -> dict[str, Any]:
        """This detector's arguments, changed so that the whole backbone learns, as random weights need it."""
        frozen = ("frozen_batch_norm", "freeze_stem", "freeze_backbone")
        own = signature(cls.__init__).parameters
        return {**init_args, **{name: False for name in frozen if name in own}}

    @classmethod
    def finetuned_as(cls, init_args: Mapping[str, Any]) -> tuple[type[Detector], dict[str, Any]]:
        """Class and arguments of what fine-tuning makes of a detector of these arguments.

        The same, unless it serves pretraining only.
        """
        return cls, dict(init_args)


# ----------------------------------------------------------------------------------------------------------------------
# What a detector computes on its way to boxes, for heads to read.


class Level(NamedTuple):
    """One feature map."""

    features: Tensor
    """[B, C, h, w]."""
    stride: int
    """Pixels of the input per cell."""
    mask: Tensor
    """bool [B, h, w], True = padding."""


class Queries(NamedTuple):
    """The decoder's queries after each of its L predictions, first to last."""

    states: list[Tensor]
    """[B, Q, D]."""
    references: list[Tensor]
    """Point (x, y) that the prediction starts from, fractions of the valid image [B, Q, 2]."""
    logits: list[Tensor]
    """Class logits [B, Q, K], each class on its own (sigmoid)."""
    boxes: list[Tensor]
    """cxcywh, fractions of the valid image [B, Q, 4]."""


class Features(NamedTuple):
    """What a head reads."""

    levels: list[Level]
    """Fine to coarse."""
    queries: Queries | None
    """None where there is no decoder."""
    taps: list[Any]
    """What a neck noted at each level, one per level; empty without a neck."""


Neck = Callable[[int, Level], tuple[Tensor, Any]]
"""Sees level i while the features are computed; gives the features [B, C, h, w] to go on with, and what to note."""


@dataclass(frozen=True)
class FeatureSizes:
    """What a head is built for.

    Attributes:
        num_classes: K.
        level_channels: C of each level, fine to coarse.
        level_strides: Input pixels per cell of each level.
        query_channels: D; None where there is no decoder.
        num_predictions: L; 0 where there is no decoder.
    """

    num_classes: int
    level_channels: tuple[int, ...]
    level_strides: tuple[int, ...]
    query_channels: int | None = None
    num_predictions: int = 0


class QueryDetector(Detector):
    """A detector whose feature maps and queries heads may read."""

    @property
    @abstractmethod
    def feature_sizes(self) -> FeatureSizes:
        """Sizes of what ``decoded`` gives."""

    @abstractmethod
    def decoded(
        self, images: Tensor, mask: Tensor | None = None, neck: Neck | None = None
    ) -> tuple[DetectorOutput, Features]:
        """Detect as ``forward`` does, and keep what it was read from.

        Args:
            images: as in ``forward``.
            mask: as in ``forward``.
            neck: sees, and may change, the projected feature maps before the transformer reads them.
        """

    @abstractmethod
    def losses_of(self, outputs: DetectorOutput, images: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """``losses`` of outputs that are there already."""

    def losses(self, images: Tensor, mask: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Losses of all layers."""
        return self.losses_of(self(images, mask), images, targets)


def levels_of(
    maps: Sequence[Tensor], masks: Sequence[Tensor], strides: Sequence[int], neck: Neck | None
) -> tuple[list[Level], list[Any]]:
    """Feature maps [B, C, h, w] as levels, changed by the neck, which sees them one after the other; and what it noted.

    Masks are bool, True = padding: [B, h, w] each, or [1, h, w] and all False if no image is padded.
    """
    levels, taps = [], []
    for index, (features, mask, stride) in enumerate(zip(maps, masks, strides, strict=True)):
        level = Level(features, stride, mask.expand(features.shape[0], -1, -1))
        if neck is not None:
            changed, tap = neck(index, level)
            level = level._replace(features=changed)
            taps.append(tap)
        levels.append(level)
    return levels, taps


def queries_of(
    states: Sequence[Tensor], boxes: Sequence[Tensor], logits: Sequence[Tensor], start: Tensor, refine: bool
) -> Queries:
    """Queries of a decoder, from what it gives after each prediction; shapes as in ``Queries``.

    The first prediction starts from ``start``, points or boxes [B, Q, 2 or 4]; later ones from the box of the one
    before if the decoder refines, else all from ``start``.
    """
    later = [found.detach() for found in boxes[:-1]] if refine else [start] * (len(boxes) - 1)
    return Queries(list(states), [place[..., :2] for place in (start, *later)], list(logits), list(boxes))


def softmax_log_odds(logits: Tensor) -> Tensor:
    """Logits [..., K] of classes on their own, whose sigmoid is the softmax probability of each class.

    Made of softmax logits [..., K + 1], the last for "no object"; float32, finite also where a probability rounds to 1.
    """
    log_probability = logits.float().log_softmax(dim=-1)[..., :-1]
    rest = -torch.expm1(log_probability)
    return log_probability - rest.clamp(min=torch.finfo(torch.float32).eps).log()
