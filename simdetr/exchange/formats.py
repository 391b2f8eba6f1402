"""Whose checkpoint it is: names, shapes or settings of a file in; its format and the detector that it is of, out.

A format is recognised by names of tensors that only it has; what fits none is read as simdetr's own. Class and
arguments of the detector are read off names and shapes. Tensors do not tell everything: heads and points only as a
product, neither dilation nor the queries of the two-stage variant. Those come from the options that the original keeps
beside its tensors; where there are none, the published values are assumed, and named. A folder of transformers tells
them in its ``config.json``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from simdetr.data.annotations import Category
from simdetr.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from simdetr.exchange.parameter_names import from_detr, from_official, from_official_vidt, from_transformers, has_neck

# of torchvision and timm: (blocks of each stage, whether they are bottlenecks, width of their first 3x3 convolution)
_RESNETS = {
    ((2, 2, 2, 2), False, 64): "resnet18",
    ((3, 4, 6, 3), False, 64): "resnet34",
    ((3, 4, 6, 3), True, 64): "resnet50",
    ((3, 4, 23, 3), True, 64): "resnet101",
    ((3, 8, 36, 3), True, 64): "resnet152",
    ((3, 4, 6, 3), True, 128): "wide_resnet50_2",
    ((3, 4, 23, 3), True, 128): "wide_resnet101_2",
}
# of timm and simdetr: (width of the first stage, blocks of each stage); all with windows of 7 cells
_SWINS = {
    (32, (2, 2, 2, 2)): "swin_pico",
    (48, (2, 2, 6, 2)): "swin_nano",
    (96, (2, 2, 6, 2)): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2)): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2)): "swin_base_patch4_window7_224",
    (192, (2, 2, 18, 2)): "swin_large_patch4_window7_224",
}
_PUBLISHED_HEADS, _PUBLISHED_POINTS, _PUBLISHED_QUERIES = 8, 4, 300
State = Mapping[str, Tensor]


class UnknownArchitectureError(ValueError):
    """The tensors do not say which detector they are of."""


@dataclass(frozen=True)
class Architecture:
    """A detector to build; ``assumed`` are arguments that neither tensors nor options told, as ``name=value``."""

    class_path: str
    init_args: dict[str, Any]
    assumed: tuple[str, ...] = ()


def deformable_detr_of(state: State, known: Mapping[str, Any]) -> Architecture:
    """The Deformable DETR of a state dict in our names; ``known`` arguments go over what the tensors say.

    Raises:
        UnknownArchitectureError: the backbone is no ResNet, or heads and points cannot be told apart.
    """
    levels = count(state, r"input_proj\.(\d+)\.")
    two_stage = "transformer.enc_output.weight" in state
    assumed = {"dilation": False, "num_heads": _PUBLISHED_HEADS}
    if two_stage:
        assumed["num_queries"] = _PUBLISHED_QUERIES
    told = {
        "backbone": known.get("backbone") or resnet_of(state),
        "hidden_dim": len(state["input_proj.0.0.weight"]),
        "num_encoder_layers": count(state, r"transformer\.encoder\.layers\.(\d+)\."),
        "num_queries": _PUBLISHED_QUERIES if two_stage else len(state["query_embed.weight"]),
        "num_feature_levels": levels,
        "two_stage": two_stage,
        "dilation": False,
        "position_encoding": "learned" if "position_encoding.row_embed.weight" in state else "sine",
        "frozen_batch_norm": not any(name.endswith("num_batches_tracked") for name in state),
        **_decoder_of(state, known, levels),
    }
    return _architecture("DeformableDETR", told, assumed, known)


def vidt_of(state: State, known: Mapping[str, Any]) -> Architecture:
    """The ViDT that a state dict is of, with what it has of ViDT+; arguments as of ``deformable_detr_of``.

    Raises:
        UnknownArchitectureError: the backbone is no Swin of ViDT, or heads and points cannot be told apart.
    """
    told: dict[str, Any] = {
        "backbone": known.get("backbone") or swin_of(state),
        "num_queries": state["backbone.det_token"].shape[1],
        "hidden_dim": state["backbone.det_pos_embed"].shape[2],
        "neck": has_neck(state),
    }
    if not told["neck"]:
        told["num_classes"] = len(state["neck_free_head.class_embed.layers.2.bias"]) - 1
        return _architecture("ViDT", told, {}, known)
    told |= {
        "fusion": any(name.startswith("fusion.") for name in state),
        "iou_aware": "iou_embed.0.layers.0.weight" in state,
        "mask_vectors": "vector_embed.0.layers.0.weight" in state,
        "token_labels": "transformer.token_embed.weight" in state,
        **_decoder_of(state, known, 4),
    }
    return _architecture("ViDT", told, {"num_heads": _PUBLISHED_HEADS}, known)


def _decoder_of(state: State, known: Mapping[str, Any], levels: int) -> dict[str, Any]:
    """Arguments of the decoder that Deformable DETR and ViDT share, and of its heads."""
    heads = int(known.get("num_heads", _PUBLISHED_HEADS))
    return {
        "num_classes": len(state["class_embed.0.bias"]),
        "num_heads": heads,
        "num_decoder_layers": count(state, r"transformer\.decoder\.layers\.(\d+)\."),
        "ffn_dim": len(state["transformer.decoder.layers.0.linear1.weight"]),
        "num_points": points_of(state, levels, heads, heads_are_known="num_heads" in known),
        "with_box_refine": any(name.startswith("transformer.decoder.bbox_embed.") for name in state),
    }


def _architecture(name: str, told: dict[str, Any], assumed: dict[str, Any], known: Mapping[str, Any]) -> Architecture:
    guesses = tuple(f"{argument}={value}" for argument, value in assumed.items() if argument not in known)
    return Architecture(f"simdetr.detectors.{name}", {**told, **known}, guesses)


def points_of(state: State, levels: int, heads: int, *, heads_are_known: bool) -> int:
    """Points that a head of deformable attention reads per level, if all layers and the number of heads tell them."""
    products = {len(bias) // levels for name, bias in state.items() if name.endswith(".attention_weights.bias")}
    if len(products) != 1:
        raise UnknownArchitectureError(f"num_points: expected the same in all layers, got heads x points {products}.")
    product = products.pop()
    if product % heads or (not heads_are_known and product != _PUBLISHED_HEADS * _PUBLISHED_POINTS):
        raise UnknownArchitectureError(
            f"num_heads: the tensors tell only that heads x points is {product}; expected the number of heads, give "
            "--detector.num_heads to `simdetr import`."
        )
    return product // heads


def resnet_of(state: State) -> str:
    """Name in timm of the ResNet below ``backbone.body.``, if it is one of the usual ones."""
    stages = tuple(count(state, rf"backbone\.body\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    width = len(state.get("backbone.body.layer1.0.conv2.weight", ()))
    known = (stages, "backbone.body.layer1.0.conv3.weight" in state, width)
    if known not in _RESNETS:
        raise _unknown_backbone(f"blocks per stage of a ResNet: {stages}")
    return _RESNETS[known]


def swin_of(state: State) -> str:
    """Name of the Swin below ``backbone.body.``, if it is one of those that ViDT is made of."""
    stages = tuple(count(state, rf"backbone\.body\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4))
    known = (state["backbone.det_token"].shape[2], stages)
    biases = state.get("backbone.body.layers.0.blocks.0.attn.relative_position_bias_table")
    if known not in _SWINS or biases is None or len(biases) != (2 * 7 - 1) ** 2:
        raise _unknown_backbone(f"width and blocks per stage of a Swin: {known}")
    return _SWINS[known]


def _unknown_backbone(found: str) -> UnknownArchitectureError:
    return UnknownArchitectureError(
        f"backbone: cannot be told from the tensors ({found}); give --detector.backbone to `simdetr import`."
    )


def count(names: Collection[str], pattern: str) -> int:
    """How many numbers the group of a pattern takes at the start of names: the length of a list of modules."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})


# ----------------------------------------------------------------------------------------------------------------------
# Settings of transformers, which itself is not needed: its newer versions write the backbone as a configuration of its
# own, older ones as a name, and leave defaults out. Both are read; the older form, which all versions read, is written.

MODEL_TYPE = "deformable_detr"
_SHORT_SIDE, _MAX_SIDE = 800, 1333
# (simdetr, transformers' names of the same, default of both); several names must hold one value
_SAME: tuple[tuple[str, tuple[str, ...], Any], ...] = (
    ("hidden_dim", ("d_model",), 256),
    ("num_heads", ("encoder_attention_heads", "decoder_attention_heads"), 8),
    ("num_encoder_layers", ("encoder_layers",), 6),
    ("num_decoder_layers", ("decoder_layers",), 6),
    ("ffn_dim", ("encoder_ffn_dim", "decoder_ffn_dim"), 1024),
    ("dropout", ("dropout",), 0.1),
    ("num_feature_levels", ("num_feature_levels",), 4),
    ("num_points", ("encoder_n_points", "decoder_n_points"), 4),
    ("with_box_refine", ("with_box_refine",), False),
    ("two_stage", ("two_stage",), False),
    ("dilation", ("dilation",), False),
    ("position_encoding", ("position_embedding_type",), "sine"),
)


def config_to_transformers(arguments: Mapping[str, Any], categories: Sequence[Category]) -> dict[str, Any]:
    """The ``config.json`` of transformers for our ``DeformableDETR`` of these ``init_args`` and classes in order."""
    labels = label_names(categories, arguments["num_classes"])
    return {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": MODEL_TYPE,
        "use_timm_backbone": True,
        "backbone": arguments["backbone"],
        "backbone_config": None,
        "use_pretrained_backbone": False,
        "num_queries": arguments["num_queries"],
        "two_stage_num_proposals": arguments["num_queries"],
        "id2label": {str(number): name for number, name in enumerate(labels)},
        "label2id": {name: number for number, name in enumerate(labels)},
        "auxiliary_loss": True,
        "focal_alpha": 0.25,
        "class_cost": 2,
        "bbox_cost": 5,
        "giou_cost": 2,
        "bbox_loss_coefficient": 5,
        "giou_loss_coefficient": 2,
        **{name: arguments[ours] for ours, theirs, _ in _SAME for name in theirs},
    }


def label_names(categories: Sequence[Category], num_classes: int) -> list[str]:
    """One name per class, all different: equal ones get the id of their category."""
    if not categories:
        return [f"class {number}" for number in range(num_classes)]
    times = Counter(category.name for category in categories)
    return [
        category.name if times[category.name] == 1 else f"{category.name} ({category.id})" for category in categories
    ]


def config_from_transformers(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> dict[str, Any]:
    """What rebuilds a detector of a folder of transformers: class, arguments, categories and image settings.

    Its ``config.json`` and, if there is one, ``preprocessor_config.json`` tell, its tensors how many classes it has.

    Raises:
        ValueError: another kind of detector, or settings that our ``DeformableDETR`` does not have.
    """
    if (kind := config["model_type"]) != MODEL_TYPE:
        raise ValueError(
            f"weights: {path} holds transformers' {kind!r}, expected {MODEL_TYPE!r}; turn other families into a "
            "detector of simdetr by `simdetr import`."
        )
    arguments: dict[str, Any] = {}
    for ours, theirs, default in _SAME:
        values = {name: config.get(name, default) for name in theirs}
        if len(set(values.values())) > 1:
            raise ValueError(f"weights: {path} has {values}; DeformableDETR has one {ours}, so they must be equal.")
        arguments[ours] = values[theirs[0]]
    queries = "two_stage_num_proposals" if arguments["two_stage"] else "num_queries"
    arguments |= {
        "num_classes": len(tensors[next(name for name in tensors if name.endswith("class_embed.0.bias"))]),
        "num_queries": config.get(queries, 300),
        "backbone": _backbone_of(config, path),
    }
    names = {int(number): name for number, name in (config.get("id2label") or {}).items()}
    return {
        "class_path": "simdetr.detectors.DeformableDETR",
        "init_args": arguments,
        "categories": numbered_categories(arguments["num_classes"], names),
        "image_settings": images_from_transformers(preprocessor),
    }


def numbered_categories(num_classes: int, names: Mapping[int, str] | None = None) -> list[dict[str, Any]]:
    """A category for each number of a class, called by it where there is no name."""
    return [{"id": number, "name": (names or {}).get(number, f"class {number}")} for number in range(num_classes)]


def _backbone_of(config: Mapping[str, Any], path: Path) -> str:
    """Name in timm of the backbone."""
    nested = config.get("backbone_config") or {}
    if not config.get("use_timm_backbone", True) or nested.get("model_type", "timm_backbone") != "timm_backbone":
        raise ValueError(
            f"weights: the backbone of {path} is transformers' own ({nested.get('model_type')!r}), expected one of "
            "timm; use the class simdetr.detectors.TransformersDetector with the argument `pretrained`."
        )
    return str(nested.get("backbone") or config.get("backbone") or "resnet50")


def images_to_transformers(image_settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of transformers that prepares images as we do."""
    settings = {**images_from_transformers({}), **image_settings}
    return {
        "image_processor_type": "DeformableDetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": {"shortest_edge": settings["short_side"], "longest_edge": settings["max_side"]},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings["mean"]),
        "image_std": list(settings["std"]),
        "do_convert_annotations": True,
        "do_pad": True,
    }


def images_from_transformers(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Our image settings of a ``preprocessor_config.json``; the published ones for what it does not say."""
    size = preprocessor.get("size", {})
    if isinstance(size, int):  # transformers before 4.26
        size = {"shortest_edge": size, "longest_edge": preprocessor.get("max_size", _MAX_SIDE)}
    if "height" in size:  # squashed to one size there; here the shape is kept
        size = {"shortest_edge": min(size.values()), "longest_edge": max(size.values())}
    raw = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    normalisation = preprocessor if preprocessor.get("do_normalize", True) else raw
    return {
        "short_side": size.get("shortest_edge", _SHORT_SIDE),
        "max_side": size.get("longest_edge", _MAX_SIDE),
        "mean": list(normalisation.get("image_mean", IMAGENET_MEAN)),
        "std": list(normalisation.get("image_std", IMAGENET_STD)),
    }


@dataclass(frozen=True)
class CheckpointFormat:
    """A way to name the tensors of a detector.

    Attributes:
        title: What a user calls it.
        marks: Every checkpoint of this format has, for each mark, a name that starts with it.
        rename: The file's tensors under our names; the state dict of the detector they are for decides where several
            places are possible.
        architecture: The detector of a state dict in our names, given what is known of its arguments; None where no
            detector of simdetr is the same.
        is_partial: The tensors are of another detector, so that only some of them have a place.
    """

    title: str
    marks: tuple[str, ...]
    rename: Callable[[State, State], dict[str, Tensor]]
    architecture: Callable[[State, Mapping[str, Any]], Architecture] | None = None
    is_partial: bool = False


_RESNET, _DETR_ATTENTION = "backbone.0.body.", "transformer.decoder.layers.0.multihead_attn."
_DEFORMABLE_ATTENTION = "transformer.encoder.layers.0.self_attn.sampling_offsets."
OWN = CheckpointFormat("simdetr", (), lambda state, own: dict(state))
_DEFORMABLE_DETR = CheckpointFormat(
    "Deformable DETR",
    (_RESNET, _DEFORMABLE_ATTENTION),
    lambda state, own: from_official(state),
    architecture=deformable_detr_of,
)
FORMATS = (
    CheckpointFormat("UP-DETR", (_RESNET, _DETR_ATTENTION, "patch2query."), from_detr, is_partial=True),
    CheckpointFormat("DETR", (_RESNET, _DETR_ATTENTION), from_detr, is_partial=True),
    replace(_DEFORMABLE_DETR, title="DETReg", marks=(*_DEFORMABLE_DETR.marks, "feature_embed.")),
    _DEFORMABLE_DETR,
    CheckpointFormat(
        "ViDT",
        ("backbone.det_token", "backbone.patch_embed."),
        lambda state, own: from_official_vidt(state),
        architecture=vidt_of,
    ),
    CheckpointFormat(
        "transformers' Deformable DETR",
        ("model.backbone.", "model.encoder.layers.0.self_attn.sampling_offsets.", "model.level_embed"),
        lambda state, own: from_transformers(state),
    ),
    OWN,
)
"""Known formats; the first that fits is taken."""


def recognise(names: Collection[str]) -> CheckpointFormat:
    """The format of a file with these names of tensors."""
    return next(known for known in FORMATS if all(any(name.startswith(mark) for name in names) for mark in known.marks))
