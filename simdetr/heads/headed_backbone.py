"""A head on a backbone alone, without transformer or decoder: images in, what the head predicts out.

The smallest detector of this package; a head that changes features (``is_neck``) sees each stage's before the next one.
Source: specs/heads.md section 0 ("standalone").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from torch import Tensor

from simdetr.detectors.backbone import Backbone
from simdetr.detectors.detector import Detector, DetectorOutput
from simdetr.detectors.features import Features, FeatureSizes, Level
from simdetr.detectors.matcher import Target
from simdetr.detectors.padding_mask import pad_to_multiple, resize_mask
from simdetr.heads.building import described, factory
from simdetr.heads.head import Head, check_images, check_needs, prefixed


class HeadedBackbone(Detector):
    """A timm backbone with a head on its maps.

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

    @classmethod
    def from_init_args(cls, init_args: Mapping[str, Any]) -> HeadedBackbone:
        """Build it anew; the head may be described as ``init_args`` does."""
        arguments = dict(init_args)
        return cls(head=factory(arguments.pop("head"), Head), **arguments)

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
        outputs, features = self.read(images, mask)
        found = self.head.losses(outputs, features, targets)
        # stages that the head does not read must have a gradient too, if only for several processes
        unread = 0.0 * sum(level.features.sum() for level in features.levels)
        return {"loss": found.total + unread, **prefixed(self.head.name, found)}

    def features(self, images: Tensor, mask: Tensor | None = None) -> Features:
        """The backbone's maps, seen by the head on their way if it is a neck; arguments as in ``forward``."""
        check_images(images, mask, self)
        images, mask = pad_to_multiple(images, mask, self.backbone.pad_multiple)
        mask = mask.expand(images.shape[0], -1, -1)
        taps: list[Any] = []

        def between(index: int, features: Tensor) -> Tensor:
            size = (features.shape[2], features.shape[3])
            changed, tap = self.head.pass_level(index, Level(features, strides[index], resize_mask(mask, size)))
            taps.append(tap)
            return changed

        strides = self.backbone.strides
        maps = self.backbone(images, between if self.head.is_neck else None)
        sized = zip(maps, strides, strict=True)
        levels = [Level(found, stride, resize_mask(mask, (found.shape[2], found.shape[3]))) for found, stride in sized]
        return Features(levels, None, taps)
