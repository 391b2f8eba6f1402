"""Which detector a state dict is of: shapes and names of tensors in, the class and the arguments that build it out.

Tensors do not tell everything: heads and points only as a product, neither dilation nor the queries of the two-stage
variant. Those come from the options that the original keeps beside its tensors; where there are none, the published
values are assumed, and named. Source: specs/detectors.md A and part 1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from simdetr.detectors.vidt_names import has_neck

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


class UnknownArchitectureError(ValueError):
    """The tensors do not say which detector they are of."""


@dataclass(frozen=True)
class Architecture:
    """A detector to build.

    Attributes:
        class_path: its class.
        init_args: its arguments.
        assumed: those among them that neither tensors nor options told, as ``name=value``.
    """

    class_path: str
    init_args: dict[str, Any]
    assumed: tuple[str, ...] = ()


def deformable_detr_of(state: Mapping[str, Tensor], known: Mapping[str, Any]) -> Architecture:
    """The Deformable DETR that a state dict is of.

    Args:
        state: state dict in our names.
        known: arguments that somebody told; they go over what the tensors say.

    Raises:
        UnknownArchitectureError: the backbone is no ResNet, or heads and points cannot be told apart.
    """
    levels = count(state, r"input_proj\.(\d+)\.")
    two_stage = "transformer.enc_output.weight" in state
    assumed = {"dilation": False, "num_heads": _PUBLISHED_HEADS}
    if two_stage:
        assumed["num_queries"] = _PUBLISHED_QUERIES
    heads = int(known.get("num_heads", _PUBLISHED_HEADS))
    told = {
        "num_classes": len(state["class_embed.0.bias"]),
        "backbone": known.get("backbone") or resnet_of(state),
        "hidden_dim": len(state["input_proj.0.0.weight"]),
        "num_heads": heads,
        "num_encoder_layers": count(state, r"transformer\.encoder\.layers\.(\d+)\."),
        "num_decoder_layers": count(state, r"transformer\.decoder\.layers\.(\d+)\."),
        "ffn_dim": len(state["transformer.decoder.layers.0.linear1.weight"]),
        "num_queries": _PUBLISHED_QUERIES if two_stage else len(state["query_embed.weight"]),
        "num_feature_levels": levels,
        "num_points": points_of(state, levels, heads, heads_are_known="num_heads" in known),
        "with_box_refine": any(name.startswith("transformer.decoder.bbox_embed.") for name in state),
        "two_stage": two_stage,
        "dilation": False,
        "position_encoding": "learned" if "position_encoding.row_embed.weight" in state else "sine",
        "frozen_batch_norm": not any(name.endswith("num_batches_tracked") for name in state),
    }
    guesses = tuple(f"{name}={value}" for name, value in assumed.items() if name not in known)
    return Architecture("simdetr.detectors.DeformableDETR", {**told, **known}, guesses)


def vidt_of(state: Mapping[str, Tensor], known: Mapping[str, Any]) -> Architecture:
    """The ViDT that a state dict is of, with what it has of ViDT+.

    Args:
        state: state dict in our names.
        known: arguments that somebody told; they go over what the tensors say.

    Raises:
        UnknownArchitectureError: the backbone is no Swin of ViDT, or heads and points cannot be told apart.
    """
    told: dict[str, Any] = {
        "backbone": known.get("backbone") or swin_of(state),
        "num_queries": state["backbone.det_token"].shape[1],
        "hidden_dim": state["backbone.det_pos_embed"].shape[2],
        "neck": has_neck(state),
    }
    assumed = {}
    if told["neck"]:
        heads = int(known.get("num_heads", _PUBLISHED_HEADS))
        assumed["num_heads"] = _PUBLISHED_HEADS
        told |= {
            "num_classes": len(state["class_embed.0.bias"]),
            "num_heads": heads,
            "num_decoder_layers": count(state, r"transformer\.decoder\.layers\.(\d+)\."),
            "ffn_dim": len(state["transformer.decoder.layers.0.linear1.weight"]),
            "num_points": points_of(state, 4, heads, heads_are_known="num_heads" in known),
            "with_box_refine": "transformer.decoder.bbox_embed.0.layers.0.weight" in state,
            "fusion": any(name.startswith("fusion.") for name in state),
            "iou_aware": "iou_embed.0.layers.0.weight" in state,
            "mask_vectors": "vector_embed.0.layers.0.weight" in state,
            "token_labels": "transformer.token_embed.weight" in state,
        }
    else:
        told["num_classes"] = len(state["neck_free_head.class_embed.layers.2.bias"]) - 1
    guesses = tuple(f"{name}={value}" for name, value in assumed.items() if name not in known)
    return Architecture("simdetr.detectors.ViDT", {**told, **known}, guesses)


def points_of(state: Mapping[str, Tensor], levels: int, heads: int, *, heads_are_known: bool) -> int:
    """Points that a head of deformable attention reads per level.

    Raises:
        UnknownArchitectureError: layers differ, or the heads are not known and the product is not the published one.
    """
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


def resnet_of(state: Mapping[str, Tensor]) -> str:
    """Name in timm of the ResNet below ``backbone.body.``.

    Raises:
        UnknownArchitectureError: it is none of the usual ones.
    """
    prefix = "backbone.body."
    stages = tuple(count(state, rf"backbone\.body\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    first = state.get(f"{prefix}layer1.0.conv2.weight")
    known = (stages, f"{prefix}layer1.0.conv3.weight" in state, 0 if first is None else len(first))
    if known not in _RESNETS:
        raise UnknownArchitectureError(
            f"backbone: cannot be told from the tensors (blocks per stage of a ResNet: {stages}); give "
            "--detector.backbone to `simdetr import`."
        )
    return _RESNETS[known]


def swin_of(state: Mapping[str, Tensor]) -> str:
    """Name of the Swin below ``backbone.body.``.

    Raises:
        UnknownArchitectureError: it is none of those that ViDT is made of.
    """
    stages = tuple(count(state, rf"backbone\.body\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4))
    known = (state["backbone.det_token"].shape[2], stages)
    biases = state.get("backbone.body.layers.0.blocks.0.attn.relative_position_bias_table")
    if known not in _SWINS or biases is None or len(biases) != (2 * 7 - 1) ** 2:
        raise UnknownArchitectureError(
            f"backbone: cannot be told from the tensors (width and blocks per stage of a Swin: {known}); give "
            "--detector.backbone to `simdetr import`."
        )
    return _SWINS[known]


def count(names: Collection[str], pattern: str) -> int:
    """How many numbers the group of a pattern takes at the start of names: the length of a list of modules."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})
