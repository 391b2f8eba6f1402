"""A detector or a backbone with a head: images in, predictions or losses out, as of any ``Detector``.

Detector and head read the same features, train in the same step, and predict together. A landmark head leaves the
detector's predictions as they are and puts its own beside them; what a localisation head finds in the whole image takes
their place. On a backbone alone, without transformer or decoder, the head's predictions are all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from simdetr.data.class_paths import class_of
from simdetr.detectors.backbone import Backbone, pad_to_multiple, resize_mask
from simdetr.detectors.detector import Detector, DetectorOutput, Features, FeatureSizes, Level, QueryDetector
from simdetr.detectors.matcher import Target
from simdetr.heads.head import Head, check_images, check_needs, described, factory, is_labelled, prefixed


class HeadedDetector(Detector):
    """A Deformable DETR or ViDT with a head on it.

    Args:
        num_classes: K.
        head: the head, made for the detector's sizes; in a config its class and options.
        detector: the detector, made for K classes; in a config its class and options.
        detector_weight: weight of the detector's own loss; 0 where the targets have no boxes to learn.

    Raises:
        ValueError: the head reads something that the detector lacks, or a negative weight.
    """

    def __init__(
        self,
        num_classes: int,
        head: Callable[[FeatureSizes], Head],
        detector: Callable[[int], QueryDetector],
        detector_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if detector_weight < 0:
            raise ValueError(f"detector_weight must be at least 0, got {detector_weight}")
        self.num_classes, self.detector_weight = num_classes, detector_weight
        self.detector = detector(num_classes)
        self.head = head(self.detector.feature_sizes)
        check_needs(self.head, self.detector.feature_sizes)
        inner = described(self.detector)
        del inner["init_args"]["num_classes"]
        self.init_args = {
            "num_classes": num_classes,
            "head": described(self.head),
            "detector": inner,
            "detector_weight": detector_weight,
        }
        self.backbone_name = f"detector.{self.detector.backbone_name}"
        self.body_name = f"detector.{self.detector.body_name}"
        self.slow_names = self.detector.slow_names
        self.decays_backbone_vectors = self.detector.decays_backbone_vectors
        self.undecayed_names = (*self.detector.undecayed_names, *(f"head.{name}" for name in self.head.undecayed_names))
        self.takes_unlabelled = self.head.takes_unlabelled

    @classmethod
    def from_init_args(cls, init_args: Mapping[str, Any]) -> HeadedDetector:
        """Build it anew; the parts may be described as ``init_args`` does."""
        parts = {"head": factory(init_args["head"], Head), "detector": factory(init_args["detector"], QueryDetector)}
        return cls(**{**init_args, **parts})

    @classmethod
    def thawed(cls, init_args: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments with which the whole backbone of the detector learns."""
        part = init_args["detector"]
        thawed = class_of(part["class_path"], QueryDetector).thawed(part.get("init_args") or {})
        return {**init_args, "detector": {**part, "init_args": thawed}}

    @property
    def core(self) -> Detector:
        """The detector without the head."""
        return self.detector

    @property
    def deployed(self) -> Detector:
        """The detector with what of the head predicts, which may be nothing."""
        head = self.head.deployed
        if head is None or head is self.head:
            return self.detector if head is None else self
        kept = head  # known not to be None
        return HeadedDetector(self.num_classes, lambda _: kept, lambda _: self.detector, self.detector_weight)

    def set_progress(self, progress: float) -> None:
        """Tell the head."""
        self.head.set_progress(progress)

    def alarms(self, epochs: Sequence[Mapping[str, float]]) -> list[str]:
        """Ask the head."""
        return self.head.alarms(epochs, f"{self.head.name}_")

    def forward(self, images: Tensor, mask: Tensor | None = None) -> DetectorOutput:
        """The detector's predictions, and the head's beside them; arguments as in ``Detector``."""
        outputs, features = self._decoded(images, mask)
        return cast(DetectorOutput, {**outputs, **self.head.predictions(self.head(features), features)})

    def read(self, images: Tensor, mask: Tensor | None = None) -> tuple[Any, Features]:
        """The head's raw outputs, and what they were made of."""
        features = self._decoded(images, mask)[1]
        return self.head(features), features

    def losses(self, images: Tensor, mask: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The detector's losses, of the labelled images, and, under its name, the head's."""
        outputs, features = self._decoded(images, mask, targets)
        found = self.head.losses(self.head(features), features, targets)
        labelled = [index for index, target in enumerate(targets) if is_labelled(target)]
        if self.detector_weight == 0 or not labelled:
            # without its loss what it predicts would have no gradient, which several processes do not forgive
            watched = 0.0 * torch.stack([values.sum() for values in _tensors_in(outputs)]).sum()
            return {"loss": found.total + watched, **prefixed(self.head.name, found)}
        if len(labelled) < len(targets):
            rows = torch.tensor(labelled, device=images.device)
            outputs, images, targets = _rows_of(outputs, rows), images[rows], [targets[index] for index in labelled]
        losses = self.detector.losses_of(outputs, images, [boxed(target) for target in targets])
        losses["loss"] = self.detector_weight * losses["loss"] + found.total
        return losses | prefixed(self.head.name, found)

    def _decoded(
        self, images: Tensor, mask: Tensor | None, targets: Sequence[Target] | None = None
    ) -> tuple[DetectorOutput, Features]:
        check_images(images, mask, self)
        return self.detector.decoded(images, mask, self.head.neck(targets) if self.head.is_neck else None)


def _tensors_in(part: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """All tensors of a detector's output, which has dictionaries and lists in it."""
    if isinstance(part, Tensor):
        yield part
    else:
        for inner in part.values() if isinstance(part, Mapping) else part:
            yield from _tensors_in(inner)


def _rows_of(part: Any, rows: Tensor) -> Any:  # noqa: ANN401
    """Of all tensors of a detector's output, which has dictionaries and lists in it, the rows of some images."""
    if isinstance(part, Tensor):
        return part[rows]
    if isinstance(part, Mapping):
        return {name: _rows_of(inner, rows) for name, inner in part.items()}
    return [_rows_of(inner, rows) for inner in part]


def boxed(target: Target) -> Target:
    """The objects of a target that have a box: landmarks of which only the point is known have none."""
    if "points" not in target:
        return target
    kept = (target["boxes"][:, 2:] > 0).all(dim=1)
    return {name: target[name][kept] for name in ("labels", "boxes", "masks") if name in target}


class HeadedBackbone(Detector):
    """A timm backbone with a head on its maps: the smallest detector of this package.

    A head that changes features (``is_neck``) sees each stage's before the next one.

    Args:
        num_classes: K.
        head: the head, made for the backbone's sizes; in a config its class and options.
        backbone: timm name of the feature network.
        pretrained_backbone: load timm's pretrained weights into it.
        output_stride: pixels per cell of the last map; 16 or 8 keep later stages at that stride.
        frozen_batch_norm: fix batch norm; set False to train a batch-norm backbone from random weights.
        freeze_stem: fix the backbone before its stage of stride 8.

    Raises:
        ValueError: the head reads something that a backbone lacks, or an unsuitable backbone.
    """

    takes_backbones = True

    def __init__(
        self,
        num_classes: int,
        head: Callable[[FeatureSizes], Head],
        backbone: str = "resnet50",
        pretrained_backbone: bool = False,
        output_stride: Literal[8, 16, 32] = 32,
        frozen_batch_norm: bool = True,
        freeze_stem: bool = True,
    ) -> None:
        own = {name: value for name, value in locals().items() if name not in ("self", "__class__", "head")}
        super().__init__()
        self.num_classes = num_classes
        self.backbone = Backbone(
            backbone,
            output_stride=output_stride,
            frozen_batch_norm=frozen_batch_norm,
            freeze_stem=freeze_stem,
            pretrained=pretrained_backbone,
        )
        sizes = FeatureSizes(num_classes, tuple(self.backbone.channels), tuple(self.backbone.strides))
        self.head = head(sizes)
        check_needs(self.head, sizes)
        self.init_args = {**own, "head": described(self.head)}
        self.undecayed_names = tuple(f"head.{name}" for name in self.head.undecayed_names)

    @classmethod
    def from_init_args(cls, init_args: Mapping[str, Any]) -> HeadedBackbone:
        """Build it anew; the head may be described as ``init_args`` does."""
        return cls(**{**init_args, "head": factory(init_args["head"], Head)})

    def forward(self, images: Tensor, mask: Tensor | None = None) -> DetectorOutput:
        """What the head predicts; arguments as in ``Detector``."""
        outputs, features = self.read(images, mask)
        return cast(DetectorOutput, self.head.predictions(outputs, features))

    def read(self, images: Tensor, mask: Tensor | None = None) -> tuple[Any, Features]:
        """The head's raw outputs, and what they were made of."""
        features = self.features(images, mask)
        return self.head(features), features

    def losses(self, images: Tensor, mask: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The head's losses under its name."""
        features = self.features(images, mask, targets)
        outputs = self.head(features)
        found = self.head.losses(outputs, features, targets)
        # stages that the head does not read must have a gradient too, if only for several processes
        unread = 0.0 * sum(level.features.sum() for level in features.levels)
        return {"loss": found.total + unread, **prefixed(self.head.name, found)}

    def features(self, images: Tensor, mask: Tensor | None = None, targets: Sequence[Target] | None = None) -> Features:
        """The backbone's maps, seen by the head on their way if it is a neck; arguments as in ``losses``."""
        check_images(images, mask, self)
        neck = self.head.neck(targets)
        images, mask = pad_to_multiple(images, mask, self.backbone.pad_multiple)
        mask = mask.expand(images.shape[0], -1, -1)
        taps: list[Any] = []

        def level(index: int, found: Tensor) -> Level:
            return Level(found, self.backbone.strides[index], resize_mask(mask, (found.shape[2], found.shape[3])))

        def between(index: int, found: Tensor) -> Tensor:
            changed, tap = neck(index, level(index, found))
            taps.append(tap)
            return changed

        maps = self.backbone(images, between if self.head.is_neck else None)
        return Features([level(index, found) for index, found in enumerate(maps)], None, taps)
