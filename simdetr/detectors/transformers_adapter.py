"""Any DETR of transformers behind this package's contract: its config in, predictions and its own losses out.

What ``AutoModelForObjectDetection`` builds and answers with ``logits`` and ``pred_boxes`` serves: Deformable DETR,
Conditional DETR, DETR, DAB-DETR, RT-DETR, RT-DETRv2, D-FINE, YOLOS and their kin.
Source: transformers; specs/detectors.md part 1 and 5.
Letters: B images, Q queries, K classes, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from simdetr.detectors.adapters import in_graph, likely_objects, valid_sizes
from simdetr.detectors.detector import Detector, DetectorOutput, Prediction
from simdetr.detectors.losses import DetectionLoss
from simdetr.detectors.matcher import Target
from simdetr.detectors.transformers_models import (
    BoxesOf,
    backbone_names,
    boxes_are_of,
    build_model,
    resolve_config,
    sides_multiple,
)


class TransformersDetector(Detector):
    """A DETR of transformers (``pip install simdetr[transformers]``).

    What is frozen follows the family: RT-DETR and D-FINE fix the backbone's batch norm unless the config says
    ``freeze_backbone_batch_norms: false``, which random weights need; the others fix it always, and want a backbone
    with weights or without batch norm. Set ``auxiliary_loss: true`` where it is not the default.

    Args:
        num_classes: K. Classes are numbered from 0; what the config says of classes is not read.
        config: settings with ``model_type``, or a folder or hub id to read them from.
        pretrained: folder or hub id of weights to start from; class heads of another size are new.
        boxes_of: what the model's boxes are fractions of: the ``valid`` image without padding (models that look at the
            mask) or the padded ``canvas``; ``auto`` knows which.
        loss: ``own`` is the loss that transformers has for the family, with its denoising and weights; ``simdetr`` is
            ``DetectionLoss`` of all layers, for families with one logit per class.
        pad_multiple: image sides are padded to multiples of this many pixels; None = what the config asks for.

    Attributes:
        model: transformers' model.

    Raises:
        ImportError: transformers is missing.
        ValueError: a config that is none, is of no detector, or has settings that its family does not know.
    """

    def __init__(
        self,
        num_classes: int,
        config: dict[str, Any] | str,
        pretrained: str | None = None,
        boxes_of: BoxesOf = "auto",
        loss: Literal["own", "simdetr"] = "own",
        pad_multiple: int | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        settings = resolve_config(config)
        # with all settings written out, neither folder nor hub is needed to rebuild it
        self.init_args = {
            "num_classes": num_classes,
            "config": settings,
            "pretrained": pretrained,
            "boxes_of": boxes_of,
            "loss": loss,
            "pad_multiple": pad_multiple,
        }
        self.num_classes = num_classes
        self.model = build_model(settings, num_classes, pretrained)
        self.backbone_name, self.body_name = (f"model.{name}" for name in backbone_names(self.model))
        self.pad_multiple = sides_multiple(settings) if pad_multiple is None else pad_multiple
        self.boxes_of = boxes_are_of(self.model, boxes_of)
        self.own_loss: Callable[..., Any] = self.model.loss_function
        # the encoder of Deformable DETR proposes by the logit of class 0, those of others by the best class
        class_aware = settings["model_type"] != "deformable_detr"
        self.criterion = DetectionLoss(class_aware_encoder=class_aware) if loss == "simdetr" else None

    @classmethod
    def thawed(cls, init_args: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments with which the backbone's batch norm learns, in families that let it."""
        config, name = init_args["config"], "freeze_backbone_batch_norms"
        if isinstance(config, str) or name not in config:
            return dict(init_args)
        return {**init_args, "config": {**config, name: False}}

    def forward(self, images: Tensor, mask: Tensor | None = None) -> DetectorOutput:
        """Detect; in training mode with the predictions of earlier layers, where ``auxiliary_loss`` is on.

        Args:
            images: normalised images [B, 3, H, W], zero-padded at the bottom and right.
            mask: bool [B, H, W], True = padding; None if no image is padded.
        """
        images, mask = self._pad(images, mask)
        to_valid = 1.0 / self._box_scale(mask)[:, None]
        if self.training:
            # models predict by their earlier layers for a loss only; without objects no query is there for denoising
            nothing = {"class_labels": mask.new_zeros(0, dtype=torch.int64), "boxes": images.new_zeros(0, 4)}
            found = self._run(images, mask, [nothing] * len(images), _layers_instead_of_loss)
        else:
            found = self._run(images, mask)
        last = self._prediction(found, to_valid)
        result: DetectorOutput = {"pred_logits": last["pred_logits"], "pred_boxes": last["pred_boxes"]}
        if self.training:
            result["aux_outputs"] = [self._prediction(layer, to_valid) for layer in found["auxiliary_outputs"]]
            if (proposed := self._proposals(found)) is not None:
                result["enc_outputs"] = self._prediction(proposed, to_valid)
        return result

    def losses(self, images: Tensor, mask: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Losses of a batch: the total, and what it is made of in the family's own words.

        Raises:
            ValueError: ``loss="simdetr"`` for a family whose classes compete in a softmax.
        """
        terms = self._own_losses(images, mask, targets)
        return {**terms, "loss": in_graph(terms["loss"], self.parameters())}

    def _own_losses(self, images: Tensor, mask: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        if self.criterion is not None:
            terms: dict[str, Tensor] = self.criterion(self(images, mask), targets)
            return terms
        images, mask = self._pad(images, mask)
        labels = [
            {"class_labels": target["labels"].to(images.device), "boxes": target["boxes"].to(scale) * scale}
            for target, scale in zip(map(likely_objects, targets), self._box_scale(mask), strict=True)
        ]
        found = self._run(images, mask, labels, self._own_loss_or_nan)
        return {"loss": found["loss"], **{name: value.detach() for name, value in found["loss_dict"].items()}}

    def _run(
        self,
        images: Tensor,
        mask: Tensor,
        labels: list[dict[str, Tensor]] | None = None,
        loss: Callable[..., Any] | None = None,
    ) -> Mapping[str, Any]:
        """Call the model on padded images; ``loss`` is what it computes from labels."""
        if loss is not None:
            self.model.loss_function = loss
        inputs = {"pixel_values": images, "labels": labels}
        if self.boxes_of == "valid":
            inputs["pixel_mask"] = (~mask).long()  # transformers marks the image, not the padding
        try:
            found: Mapping[str, Any] = self.model(**inputs)
        except RuntimeError as error:
            if "selected index k out of range" not in str(error):
                raise
            height, width = images.shape[-2:]
            raise ValueError(
                f"images of {height} x {width} px have fewer cells than the encoder is to choose queries from; lower "
                "the number of queries in config or use larger images."
            ) from error
        return found

    def _own_loss_or_nan(
        self,
        logits: Tensor,
        labels: Any,  # noqa: ANN401
        device: Any,  # noqa: ANN401
        pred_boxes: Tensor,
        *rest: Any,  # noqa: ANN401
        **more: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """The family's loss; NaN where it would raise, so that the caller can stop and keep the batch."""
        if torch.isfinite(logits).all() and torch.isfinite(pred_boxes).all():
            return self.own_loss(logits, labels, device, pred_boxes, *rest, **more)
        return (logits.sum() + pred_boxes.sum()) * torch.nan, {}, None

    def _prediction(self, layer: Mapping[str, Any], to_valid: Tensor) -> Prediction:
        """A layer's answer in this package's terms; ``to_valid`` [B, 1, 4] makes its boxes fractions of the image."""
        logits = layer["logits"]
        if logits.shape[-1] == self.num_classes + 1:
            if self.criterion is not None:
                raise ValueError(
                    f"loss: classes of {self.model.config.model_type} compete in a softmax, which simdetr's loss is "
                    "not for; choose own."
                )
            logits = per_class(logits)
        return {"pred_logits": logits, "pred_boxes": layer["pred_boxes"] * to_valid}

    def _proposals(self, found: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """What the encoder of a two-stage model proposes."""
        if found.get("enc_topk_logits") is not None:
            return {"logits": found["enc_topk_logits"], "pred_boxes": found["enc_topk_bboxes"]}
        if self.model.config.model_type == "deformable_detr" and self.model.config.two_stage:
            boxes = found["enc_outputs_coord_logits"].sigmoid()
            return {"logits": found["enc_outputs_class"], "pred_boxes": boxes}
        return None

    def _pad(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Zero-pad to the sides that the model needs."""
        height, width = images.shape[-2:]
        if mask is None:
            mask = torch.zeros(len(images), height, width, dtype=torch.bool, device=images.device)
        elif mask.shape != (len(images), height, width):
            raise ValueError(f"mask must be [B, H, W] = {[len(images), height, width]}, got {list(mask.shape)}")
        extra = (0, -width % self.pad_multiple, 0, -height % self.pad_multiple)
        return (F.pad(images, extra), F.pad(mask, extra, value=True)) if any(extra) else (images, mask)

    def _box_scale(self, mask: Tensor) -> Tensor:
        """What turns fractions of the valid image into the model's, float [B, 4], from a mask [B, H, W]."""
        if self.boxes_of == "valid":
            return torch.ones(len(mask), 4, device=mask.device)
        height, width = mask.shape[-2:]
        return valid_sizes(mask)[:, [1, 0, 1, 0]] / torch.tensor([width, height] * 2, device=mask.device)


def per_class(logits: Tensor) -> Tensor:
    """Logits [..., K] of classes on their own from those of a softmax [..., K + 1], the last for no object.

    Their sigmoid is the softmax's probability.
    """
    log_probability = logits.float().log_softmax(dim=-1)[..., :-1]
    # a probability that rounds to 1 would have an infinite logit
    log_probability = log_probability.clamp(max=-torch.finfo(torch.float32).eps)
    return log_probability - torch.log(-torch.expm1(log_probability))


def _layers_instead_of_loss(
    logits: Tensor,
    labels: Any,  # noqa: ANN401
    device: Any,  # noqa: ANN401
    pred_boxes: Tensor,
    config: Any,  # noqa: ANN401
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    *rest: Any,  # noqa: ANN401
    **more: Any,  # noqa: ANN401
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]]]:
    """In place of a model's loss, with the same arguments: no loss, and the predictions of its earlier layers."""
    layers: list[dict[str, Tensor]] = []
    if outputs_class is not None and outputs_coord is not None:
        # some families stack layers first [L, B, Q, K], others images first [B, L, Q, K]
        if outputs_class.shape[1] != len(logits) or not torch.equal(outputs_class[-1], logits):
            outputs_class, outputs_coord = outputs_class.transpose(0, 1), outputs_coord.transpose(0, 1)
        pairs = zip(outputs_class[:-1], outputs_coord[:-1], strict=True)
        layers = [{"logits": classes, "pred_boxes": boxes} for classes, boxes in pairs]
    return logits.new_zeros(()), {}, layers
