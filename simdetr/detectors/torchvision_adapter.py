"""Detectors of torchvision behind this package's contract: Faster R-CNN, FCOS and RetinaNet on any ResNet with an FPN.

They find boxes by anchors and suppression instead of queries: each detection becomes a row with one finite logit, and
rows without a detection are -inf. Source: torchvision.models.detection.
Letters: B images, Q most detections of one image, K classes, T objects of one image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights, list_models
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from simdetr.boxes import denormalise, has_area, normalise
from simdetr.detectors.backbone import batch_mask
from simdetr.detectors.detector import Detector, DetectorOutput
from simdetr.detectors.losses import in_graph, likely_objects, valid_sizes
from simdetr.detectors.matcher import Target

Architecture = Literal["fasterrcnn_resnet50_fpn", "fcos_resnet50_fpn", "retinanet_resnet50_fpn"]


@dataclass(frozen=True)
class _Family:
    """What the architectures differ in."""

    model: Callable[..., nn.Module]
    first_label: int
    """Label of class 0; Faster R-CNN keeps 0 for background."""
    maps: tuple[int, ...]
    """Stages of the ResNet that the FPN takes."""
    anchors: str = "anchor_generator"
    """Name of the argument for anchors; those for scores and numbers of detections follow."""
    threshold: str = "score_thresh"
    most: str = "detections_per_img"


_FAMILIES = {
    "fasterrcnn_resnet50_fpn": _Family(
        FasterRCNN, 1, (1, 2, 3, 4), "rpn_anchor_generator", "box_score_thresh", "box_detections_per_img"
    ),
    "fcos_resnet50_fpn": _Family(FCOS, 0, (2, 3, 4)),
    "retinanet_resnet50_fpn": _Family(RetinaNet, 0, (2, 3, 4)),
}


class TorchvisionDetector(Detector):
    """Faster R-CNN, FCOS or RetinaNet of torchvision.

    Nothing is cut off by its score, as self-training wants. Faster R-CNN then looks at all pairs of region and class:
    with thousands of classes set ``rpn_post_nms_top_n_test`` to a few hundred, or ``box_score_thresh``, in ``options``.

    Args:
        num_classes: K. Classes are numbered from 0; background is added where the architecture needs it.
        architecture: torchvision's name; the ResNet in it gives way to ``backbone``.
        backbone: any ResNet, ResNeXt or wide ResNet of torchvision, under its FPN.
        pretrained_backbone: load torchvision's ImageNet weights into the ResNet.
        trainable_layers: stages of the ResNet that learn, counted from the last; 5 for random weights.
        frozen_batch_norm: fix the ResNet's batch norm; set it to False to train from random weights.
        anchor_sizes: sizes of anchors in pixels, one list per map of the FPN; None = torchvision's. FCOS has one
            size per map, its stride.
        aspect_ratios: height by width of anchors of all sizes; FCOS has none but 1.
        options: further numbers that torchvision's class takes, such as ``box_detections_per_img``.

    Attributes:
        model: torchvision's model.

    Raises:
        ValueError: an unknown architecture, backbone or option.
    """

    backbone_name = "model.backbone.body"
    body_name = "model.backbone.body"

    def __init__(
        self,
        num_classes: int,
        architecture: Architecture = "fasterrcnn_resnet50_fpn",
        backbone: str = "resnet50",
        pretrained_backbone: bool = False,
        trainable_layers: int = 3,
        frozen_batch_norm: bool = True,
        anchor_sizes: list[list[int]] | None = None,
        aspect_ratios: list[float] | None = None,
        options: dict[str, int | float] | None = None,
    ) -> None:
        # what rebuilds this detector; kept beside its weights
        self.init_args = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if architecture not in _FAMILIES:
            raise ValueError(f"architecture must be one of {', '.join(_FAMILIES)}, got {architecture!r}")
        self.num_classes = num_classes
        self.family = _FAMILIES[architecture]
        _check_options(self.family, options or {})
        anchors = _anchors(anchor_sizes, aspect_ratios, architecture)
        settings = {self.family.threshold: 0.0, self.family.anchors: anchors, **(options or {})}
        body = _backbone(backbone, self.family, pretrained_backbone, trainable_layers, frozen_batch_norm)
        self.model = self.family.model(body, num_classes + self.family.first_label, **settings)
        self.model.transform = _AsTheyAre()
        default = signature(self.family.model).parameters[self.family.most].default
        self.most_detections = int(settings.get(self.family.most, default))

    @classmethod
    def thawed(cls, init_args: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments with which the whole ResNet learns."""
        return {**super().thawed(init_args), "trainable_layers": 5}

    def forward(self, images: Tensor, mask: Tensor | None = None) -> DetectorOutput:
        """Detect, in evaluation mode; in training mode these detectors have losses, but no detections."""
        if self.training:
            raise RuntimeError(
                "detectors of torchvision detect in evaluation mode only and learn by their own losses; call eval(), "
                "and give the task no criterion."
            )
        crops = _crops(images, mask)
        return self.as_output(self.model(crops), [(crop.shape[1], crop.shape[2]) for crop in crops])

    def as_output(self, found: Sequence[dict[str, Tensor]], sizes_hw: Sequence[tuple[int, int]]) -> DetectorOutput:
        """Detections of torchvision as the contract wants them: corner ``boxes`` [N, 4] in pixels, N at most Q."""
        shape = (len(found), self.most_detections)
        logits = found[0]["boxes"].new_full((*shape, self.num_classes), -torch.inf, dtype=torch.float32)
        boxes = logits.new_zeros(*shape, 4)
        for image, (detections, size_hw) in enumerate(zip(found, sizes_hw, strict=True)):
            rows = torch.arange(len(detections["scores"]), device=logits.device)
            # a score that rounds to 1 would have an infinite logit
            scores = detections["scores"].float().clamp(max=1.0 - torch.finfo(torch.float32).eps)
            logits[image, rows, detections["labels"] - self.family.first_label] = scores.logit()
            boxes[image, rows] = normalise(detections["boxes"].float(), size_hw)
        return {"pred_logits": logits, "pred_boxes": boxes}

    def losses(self, images: Tensor, mask: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Losses of a batch, torchvision's terms and their sum; in evaluation mode these detectors have none."""
        if not self.training:
            raise RuntimeError("detectors of torchvision have losses in training mode only; call train()")
        crops = _crops(images, mask)
        terms: dict[str, Tensor] = self.model(crops, [self._pixels(*pair) for pair in zip(targets, crops, strict=True)])
        total = torch.stack(list(terms.values())).sum()
        named = {name: value.detach() for name, value in terms.items()}
        return {"loss": in_graph(total, self.parameters()), **named}

    def _pixels(self, target: Target, crop: Tensor) -> dict[str, Tensor]:
        """A target as torchvision wants it: corner pixels and its own numbers of classes; boxes without area go."""
        target = likely_objects(target)
        boxes = denormalise(target["boxes"].to(crop), (crop.shape[1], crop.shape[2]))
        real = has_area(boxes)
        return {"boxes": boxes[real], "labels": target["labels"].to(crop.device)[real] + self.family.first_label}


class _AsTheyAre(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Stacks images without resizing or normalising them, as both are done."""

    def __init__(self) -> None:
        super().__init__(min_size=1, max_size=1, image_mean=[0.0], image_std=[1.0])

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:  # noqa: ANN401
        return image, target


def _crops(images: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Images [3, h, w] without their padding."""
    if mask is None:
        return list(images)
    sizes = valid_sizes(batch_mask(images, mask).expand(len(images), -1, -1)).tolist()
    return [image[:, :height, :width] for image, (height, width) in zip(images, sizes, strict=True)]


def _backbone(
    name: str, family: _Family, pretrained: bool, trainable_layers: int, frozen_batch_norm: bool
) -> nn.Module:
    """A ResNet under an FPN."""
    known = list_models(include=("resnet*", "resnext*", "wide_resnet*"))
    if name not in known:
        raise ValueError(f"backbone must be one of {', '.join(known)}, got {name!r}")
    if not 0 <= trainable_layers <= 5:
        raise ValueError(f"trainable_layers must be 0 to 5, got {trainable_layers}")
    built: nn.Module = resnet_fpn_backbone(
        backbone_name=name,
        weights=get_model_weights(name)["IMAGENET1K_V1"] if pretrained else None,
        norm_layer=FrozenBatchNorm2d if frozen_batch_norm else nn.BatchNorm2d,
        trainable_layers=trainable_layers,
        returned_layers=list(family.maps),
        extra_blocks=None if 1 in family.maps else LastLevelP6P7(256, 256),
    )
    return built


def _anchors(sizes: list[list[int]] | None, ratios: list[float] | None, architecture: str) -> AnchorGenerator | None:
    """Anchors of the given sizes, None for torchvision's own."""
    if sizes is None and ratios is None:
        return None
    if sizes is None or len(sizes) != 5:
        raise ValueError(
            f"anchor_sizes must be 5 lists, one for each map of {architecture}'s FPN, also where only aspect_ratios "
            f"change; got {sizes}"
        )
    shapes = tuple(ratios or ([1.0] if architecture.startswith("fcos") else [0.5, 1.0, 2.0]))
    return AnchorGenerator(tuple(tuple(level) for level in sizes), (shapes,) * len(sizes))


def _check_options(family: _Family, options: dict[str, int | float]) -> None:
    """Raise for options that are no numbers of torchvision's class."""
    known = [
        name
        for name, parameter in signature(family.model).parameters.items()
        if isinstance(parameter.default, int | float) and name not in ("min_size", "max_size")
    ]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"options: {', '.join(unknown)} cannot be set; there are {', '.join(known)}")
