"""A detector with a head: both read the same features, train in the same step, and predict together.

In and out as any ``Detector``. A landmark head leaves the detector's predictions as they are and puts its own beside
them; what a localisation head finds in the whole image takes their place.
Source: specs/heads.md section 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from simdetr.detectors.detector import Detector, DetectorOutput
from simdetr.detectors.features import Features, FeatureSizes, QueryDetector
from simdetr.detectors.matcher import Target
from simdetr.heads.building import described, factory, part_class
from simdetr.heads.head import Head, check_images, check_needs, prefixed


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

    @classmethod
    def from_init_args(cls, init_args: Mapping[str, Any]) -> HeadedDetector:
        """Build it anew; the parts may be described as ``init_args`` does."""
        arguments = dict(init_args)
        head, detector = factory(arguments.pop("head"), Head), factory(arguments.pop("detector"), QueryDetector)
        return cls(head=head, detector=detector, **arguments)

    @classmethod
    def thawed(cls, init_args: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments with which the whole backbone of the detector learns."""
        part = init_args["detector"]
        inner = cast(type[QueryDetector], part_class(part["class_path"], QueryDetector))
        thawed = inner.thawed(part.get("init_args") or {})
        return {**init_args, "detector": {**part, "init_args": thawed}}

    @property
    def core(self) -> Detector:
        """The detector without the head."""
        return self.detector

    def forward(self, images: Tensor, mask: Tensor | None = None) -> DetectorOutput:
        """The detector's predictions, and the head's beside them; arguments as in ``Detector``."""
        outputs, features = self._decoded(images, mask)
        return cast(DetectorOutput, {**outputs, **self.head.predictions(self.head(features), features)})

    def read(self, images: Tensor, mask: Tensor | None = None) -> tuple[Any, Features]:
        """The head's raw outputs, and what they were made of."""
        features = self._decoded(images, mask)[1]
        return self.head(features), features

    def losses(self, images: Tensor, mask: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The detector's losses and, under its name, the head's."""
        outputs, features = self._decoded(images, mask)
        found = self.head.losses(self.head(features), features, targets)
        if self.detector_weight == 0:
            # without its loss what it predicts would have no gradient, which several processes do not forgive
            watched = 0.0 * torch.stack([values.sum() for values in _tensors_in(outputs)]).sum()
            return {"loss": found.total + watched, **prefixed(self.head.name, found)}
        losses = self.detector.losses_of(outputs, images, [boxed(target) for target in targets])
        losses["loss"] = self.detector_weight * losses["loss"] + found.total
        return losses | prefixed(self.head.name, found)

    def _decoded(self, images: Tensor, mask: Tensor | None) -> tuple[DetectorOutput, Features]:
        check_images(images, mask, self)
        return self.detector.decoded(images, mask, self.head.pass_level if self.head.is_neck else None)


def _tensors_in(part: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """All tensors of a detector's output, which has dictionaries and lists in it."""
    if isinstance(part, Tensor):
        yield part
    else:
        for inner in part.values() if isinstance(part, Mapping) else part:
            yield from _tensors_in(inner)


def boxed(target: Target) -> Target:
    """The objects of a target that have a box: landmarks of which only the point is known have none."""
    if "points" not in target:
        return target
    kept = (target["boxes"][:, 2:] > 0).all(dim=1)
    return {name: target[name][kept] for name in ("labels", "boxes", "masks") if name in target}
