"""Deformable DETR's settings in two vocabularies: simdetr's arguments and transformers' ``config.json``.

Plain dictionaries in and out; transformers itself is not needed. Its newer versions write the backbone as a
configuration of its own, older ones as a name, and leave defaults out; both are read, and the older form, which all
versions read, is written. Source: specs/detectors.md part 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from simdetr.data.labels import Category

MODEL_TYPE = "deformable_detr"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
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
_LOSS = {
    "auxiliary_loss": True,
    "class_cost": 2,
    "bbox_cost": 5,
    "giou_cost": 2,
    "bbox_loss_coefficient": 5,
    "giou_loss_coefficient": 2,
    "focal_alpha": 0.25,
}


def config_to_transformers(arguments: Mapping[str, Any], categories: Sequence[Category]) -> dict[str, Any]:
    """The ``config.json`` of transformers for a Deformable DETR.

    Args:
        arguments: ``init_args`` of our ``DeformableDETR``.
        categories: its classes in order; numbers stand for names where there are none.
    """
    labels = label_names(categories, arguments["num_classes"])
    config = {
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
        **_LOSS,
    }
    for ours, theirs, _ in _SAME:
        config.update(dict.fromkeys(theirs, arguments[ours]))
    return config


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

    Args:
        config: its ``config.json``.
        preprocessor: its ``preprocessor_config.json``, or nothing.
        tensors: its tensors; they say how many classes there are.
        path: the file, for messages.

    Raises:
        ValueError: another kind of detector, or settings that our ``DeformableDETR`` does not have.
    """
    kind = config["model_type"]
    if kind != MODEL_TYPE:
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
    numbers = range(arguments["num_classes"])
    return {
        "class_path": "simdetr.detectors.DeformableDETR",
        "init_args": arguments,
        "categories": [{"id": number, "name": names.get(number, f"class {number}")} for number in numbers],
        "image_settings": images_from_transformers(preprocessor),
    }


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
    return {
        "image_processor_type": "DeformableDetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": {
            "shortest_edge": image_settings.get("short_side", _SHORT_SIDE),
            "longest_edge": image_settings.get("max_side", _MAX_SIDE),
        },
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image_settings.get("mean", IMAGENET["image_mean"])),
        "image_std": list(image_settings.get("std", IMAGENET["image_std"])),
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
    normalisation = {**IMAGENET, **preprocessor} if preprocessor.get("do_normalize", True) else raw
    return {
        "short_side": size.get("shortest_edge", _SHORT_SIDE),
        "max_side": size.get("longest_edge", _MAX_SIDE),
        "mean": list(normalisation["image_mean"]),
        "std": list(normalisation["image_std"]),
    }
