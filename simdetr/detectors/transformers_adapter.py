"""Any DETR of transformers behind this package's contract: its config in, predictions and its own losses out.

What ``AutoModelForObjectDetection`` builds and answers with ``logits`` and ``pred_boxes`` serves: Deformable DETR,
Conditional DETR, DETR, DAB-DETR, RT-DETR, RT-DETRv2, D-FINE, LW-DETR, RF-DETR, YOLOS and their kin. The second part
holds all that depends on transformers' families. Nothing is downloaded unless a hub id is given.

LW-DETR and RF-DETR train G groups of Q queries, each matched with all objects, and detect by the first (Group DETR,
Chen et al. 2023): ``forward`` gives the first in training too, the losses are of all.
Source: transformers (Apache-2.0).
Letters: B images, Q queries, K classes, L decoder layers, G groups of queries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from simdetr.detectors.backbone import pad_to_multiple
from simdetr.detectors.detector import Detector, DetectorOutput, Prediction, softmax_log_odds
from simdetr.detectors.losses import DetectionLoss, in_graph, likely_objects, valid_sizes
from simdetr.detectors.matcher import Target


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
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        settings = resolve_config(config)
        # with all settings written out, neither folder nor hub is needed to rebuild it
        self.init_args = {**given, "config": settings}
        self.num_classes = num_classes
        self.model = build_model(settings, num_classes, pretrained)
        self.backbone_name, self.body_name = (f"model.{name}" for name in backbone_names(self.model))
        self.pad_multiple = sides_multiple(settings) if pad_multiple is None else pad_multiple
        self.pad_square = wants_squares(settings)
        self.num_groups = int(settings.get("group_detr") or 1)
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
        """Detect; in training mode with the predictions of earlier layers, where ``auxiliary_loss`` is on."""
        found = self._detect(images, mask)
        if not self.training or self.num_groups == 1:
            return found
        return cast(
            DetectorOutput, _of_all_layers(found, lambda values: values[:, : values.shape[1] // self.num_groups])
        )

    def _detect(self, images: Tensor, mask: Tensor | None) -> DetectorOutput:
        """What ``forward`` gives, but of all G Q queries in training mode."""
        images, mask = self._pad(images, mask)
        to_valid = 1.0 / self._box_scale(mask)[:, None]
        if self.training:
            # models predict by their earlier layers for a loss only; without objects no query is there for denoising
            nothing = {"class_labels": mask.new_zeros(0, dtype=torch.int64), "boxes": images.new_zeros(0, 4)}
            found = self._run(images, mask, [nothing] * len(images), _layers_instead_of_loss)
        else:
            found = self._run(images, mask)
        result = cast(DetectorOutput, self._prediction(found, to_valid))
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
        if self.criterion is not None:
            # a group of queries is matched as if it were alone: each is an image of its own to the criterion
            outputs, groups = self._detect(images, mask), self.num_groups
            folded = _of_all_layers(outputs, lambda values: rearrange(values, "b (g q) c -> (b g) q c", g=groups))
            repeated = [target for target in targets for _ in range(groups)]
            terms: dict[str, Tensor] = self.criterion(folded, repeated)
        else:
            images, mask = self._pad(images, mask)
            labels = [
                {"class_labels": target["labels"].to(images.device), "boxes": target["boxes"].to(scale) * scale}
                for target, scale in zip(map(likely_objects, targets), self._box_scale(mask), strict=True)
            ]
            found = self._run(images, mask, labels, self._own_loss_or_nan)
            terms = {"loss": found["loss"], **{name: value.detach() for name, value in found["loss_dict"].items()}}
        return {**terms, "loss": in_graph(terms["loss"], self.parameters())}

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
        self, logits: Tensor, labels: object, device: object, pred_boxes: Tensor, *rest: object, **more: object
    ) -> object:
        """The family's loss; NaN where it would raise, so that the caller can stop and keep the batch.

        Computed in single precision whatever the network's: LW-DETR's takes the logarithm of one minus a probability,
        which half precision rounds to zero.
        """
        if torch.isfinite(logits).all() and torch.isfinite(pred_boxes).all():
            return self.own_loss(_single(logits), labels, device, _single(pred_boxes), *map(_single, rest), **more)
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
            logits = softmax_log_odds(logits)
        return {"pred_logits": logits, "pred_boxes": layer["pred_boxes"] * to_valid}

    def _proposals(self, found: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """What the encoder of a two-stage model proposes."""
        if found.get("enc_topk_logits") is not None:
            return {"logits": found["enc_topk_logits"], "pred_boxes": found["enc_topk_bboxes"]}
        if self.num_groups > 1:  # boxes, whatever their name says
            return {"logits": found["enc_outputs_class"], "pred_boxes": found["enc_outputs_coord_logits"]}
        if self.model.config.model_type == "deformable_detr" and self.model.config.two_stage:
            boxes = found["enc_outputs_coord_logits"].sigmoid()
            return {"logits": found["enc_outputs_class"], "pred_boxes": boxes}
        return None

    def _pad(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Zero-pad to the sides that the model needs."""
        images, mask = pad_to_multiple(images, mask, self.pad_multiple)
        mask = mask.expand(len(images), -1, -1)
        if self.pad_square:
            height, width = images.shape[-2:]
            side: Any = torch.sym_max(height, width)  # an exported graph serves every size
            extra = (0, side - width, 0, side - height)
            images, mask = functional.pad(images, extra), functional.pad(mask, extra, value=True)
        return images, mask

    def _box_scale(self, mask: Tensor) -> Tensor:
        """What turns fractions of the valid image into the model's, float [B, 4], from a mask [B, H, W]."""
        if self.boxes_of == "valid":
            return torch.ones(len(mask), 4, device=mask.device)
        height, width = mask.shape[-2:]
        return valid_sizes(mask)[:, [1, 0, 1, 0]] / torch.tensor([width, height] * 2, device=mask.device)


def _layers_instead_of_loss(
    logits: Tensor,
    labels: object,
    device: object,
    pred_boxes: Tensor,
    config: object,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    *rest: object,
    **more: object,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]]]:
    """In place of a model's loss, with the same arguments: no loss, and the predictions of its earlier layers."""
    layers: list[dict[str, Tensor]] = []
    if outputs_class is not None and outputs_coord is not None:
        # some families stack layers first [L, B, Q, K], others images first [B, L, Q, K]; equal but for rounding
        ways = [(outputs_class, outputs_coord), (outputs_class.transpose(0, 1), outputs_coord.transpose(0, 1))]
        fitting = [way for way in ways if way[0].shape[1] == len(logits)]
        outputs_class, outputs_coord = min(fitting, key=lambda way: float((way[0][-1] - logits).detach().abs().max()))
        pairs = zip(outputs_class[:-1], outputs_coord[:-1], strict=True)
        layers = [{"logits": classes, "pred_boxes": boxes} for classes, boxes in pairs]
    return logits.new_zeros(()), {}, layers


def _of_all_layers(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401
    """Predictions of all layers, with every tensor [B, Q, ...] in them changed."""
    if isinstance(outputs, Tensor):
        return change(outputs)
    if isinstance(outputs, list):
        return [_of_all_layers(layer, change) for layer in outputs]
    return {name: _of_all_layers(value, change) for name, value in outputs.items()}


def _single(value: Any) -> Any:  # noqa: ANN401
    """A tensor of half precision as float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value


# ----------------------------------------------------------------------------------------------------------------------
# Configs of transformers in, object detectors of transformers out, and what their adapter must know of them.


BoxesOf = Literal["auto", "valid", "canvas"]

_BLIND_TO_PADDING = ("rt_detr", "d_fine", "deimv2", "pp_doclayout")
"""Starts of the names of families that take a mask of padding and do not look at it."""
_LABELS = {"id2label", "label2id", "num_labels", "problem_type"}
_NOT_ARCHITECTURE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"} | _LABELS
"""Settings that say nothing about the network: classes come from the data, weights are float32."""
_TRANSLATED = ("backbone", "backbone_kwargs", "use_pretrained_backbone", "use_timm_backbone")
"""Settings that configs take and turn into ``backbone_config``."""
_FIXED_SIZES = ("anchor_image_size", "eval_size")
"""Settings that tie evaluation to one image size; images come in any."""


def resolve_config(config: dict[str, Any] | str) -> dict[str, Any]:
    """All settings of an architecture as plain JSON types, from some of them or from a folder or hub id.

    Raises:
        ImportError: transformers is missing.
        ValueError: no detector is of that type, or it has no such setting, or refuses a value.
    """
    transformers = import_transformers()
    if isinstance(config, str):
        try:
            given = transformers.AutoConfig.from_pretrained(config).to_dict()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"config: {config!r} is neither a folder with a config.json of transformers nor a model of its hub "
                f"({_first_line(error)})."
            ) from error
    else:
        given = dict(config)
    default = _default_settings(given.get("model_type"))
    unknown = sorted(set(given) - set(default) - _NOT_ARCHITECTURE - {*_TRANSLATED})
    if unknown and not isinstance(config, str):  # stored configs carry what older versions knew
        raise ValueError(
            f"config: {default['model_type']} has no setting {', '.join(unknown)}; it has {', '.join(sorted(default))}."
        )
    made = _plain(_config_of({name: value for name, value in _architecture(given).items() if name not in unknown}))
    return {name: None if name in _FIXED_SIZES else made[name] for name in default if name in made}


def build_model(settings: dict[str, Any], num_classes: int, pretrained: str | None) -> Any:  # noqa: ANN401
    """The object detector of settings of ``resolve_config``, float32, in training mode.

    Of ``pretrained``, a folder or hub id of weights, tensors of another shape, such as class heads, stay new.

    Raises:
        ValueError: the parts do not fit together, or there are no such weights.
    """
    auto = import_transformers().AutoModelForObjectDetection
    config = _config_of(settings, num_labels=num_classes)
    try:
        if pretrained is None:
            model = auto.from_config(config)
        else:
            model = auto.from_pretrained(pretrained, config=config, ignore_mismatched_sizes=True)
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        what = "config" if pretrained is None else f"pretrained: {pretrained!r}"
        raise ValueError(
            f"{what}: no {settings['model_type']} could be built ({_first_line(error)}). Sizes such as those of "
            "backbone_config and encoder_in_channels must agree, and weights must be of the same architecture."
        ) from error
    return model.float().train()


def backbone_names(model: nn.Module) -> tuple[str, str]:
    """Dotted names, within a model, of its backbone and of the feature network in it.

    Where a projector stands beside the feature network, as in LW-DETR, the network alone is the backbone. A model
    without backbone (YOLOS is one transformer) gives everything but its heads for both.
    """
    named = [name for name, _ in model.named_modules() if name.split(".")[-1] == "backbone"]
    if not named:
        base = str(getattr(model, "base_model_prefix", ""))
        return base, base
    backbone = min(named, key=len)
    if "backbone" in _children(model, backbone):
        backbone = f"{backbone}.backbone"
    body = backbone
    while inner := [part for part in ("conv_encoder", "model", "_backbone") if part in _children(model, body)]:
        body = f"{body}.{inner[0]}"
    return backbone, body


def sides_multiple(settings: dict[str, Any]) -> int:
    """Pixels that image sides must be multiples of.

    The coarsest stride of a pyramid that is added up, a patch, or a patch for each window along a side.
    """
    backbone = settings.get("backbone_config") or {}
    if "num_windows" in backbone:
        windows, patch = backbone.get("num_windows_side") or backbone["num_windows"], backbone["patch_size"]
        return int(windows) * (max(patch) if isinstance(patch, list) else int(patch))
    strides = settings.get("feat_strides") or settings.get("patch_size") or 1
    return max(strides) if isinstance(strides, list) else int(strides)


def wants_squares(settings: dict[str, Any]) -> bool:
    """Whether a model takes square canvases alone: RF-DETR cuts others into windows with the sides exchanged."""
    backbone = settings.get("backbone_config") or {}
    return bool(backbone.get("model_type") == "rf_detr_dinov2" and backbone["num_windows"] > 1)


def boxes_are_of(model: nn.Module, boxes_of: BoxesOf) -> Literal["valid", "canvas"]:
    """What a model's boxes are fractions of; a ValueError for those of the valid image if it takes no mask."""
    config: Any = model.config
    takes_mask = "pixel_mask" in signature(model.forward).parameters
    if boxes_of == "valid" and not takes_mask:
        raise ValueError(
            f"boxes_of: {config.model_type} takes no mask of padding, so its boxes are of the canvas; choose auto."
        )
    if boxes_of == "auto":
        return "valid" if takes_mask and not config.model_type.startswith(_BLIND_TO_PADDING) else "canvas"
    return boxes_of


def import_transformers() -> Any:  # noqa: ANN401
    """The library, which is optional; the ImportError says what to do where it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "detectors of transformers need it installed: pip install simdetr[transformers]", name="transformers"
        ) from error
    return transformers


def _default_settings(model_type: str | None) -> dict[str, Any]:
    """Every setting of a family of detectors, with its default."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as FAMILIES

    if model_type not in FAMILIES:
        raise ValueError(
            f"config: model_type must be one of {', '.join(FAMILIES)}, which transformers can detect objects with; "
            f"got {model_type!r}."
        )
    return _architecture(_plain(_config_of({"model_type": model_type})))


def _config_of(settings: dict[str, Any], **more: Any) -> Any:  # noqa: ANN401
    """Transformers' config of settings; it never asks for weights of the backbone."""
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.for_model(**settings, **more)
    except Exception as error:  # checks of transformers raise their own types
        raise ValueError(f"config: {settings['model_type']} refuses its settings ({error}).") from error
    parts: list[Any] = [config, getattr(config, "backbone_config", None)]
    for part in parts:
        if getattr(part, "use_pretrained_backbone", False):
            part.use_pretrained_backbone = False
    return config


def _plain(config: Any) -> dict[str, Any]:  # noqa: ANN401
    """All settings of a config as JSON types."""
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    if isinstance(backbone := plain.get("backbone_config"), dict):
        plain["backbone_config"] = _architecture(backbone)
    return plain


def _architecture(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _NOT_ARCHITECTURE}


def _children(model: nn.Module, name: str) -> set[str]:
    return {child for child, _ in model.get_submodule(name).named_children()}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
