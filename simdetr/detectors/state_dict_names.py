"""Parameter names of Deformable DETR in three places: this library, the original's checkpoints, transformers.

State dicts in, state dicts with other names out; tensors are shared, except the packed projections of self-attention,
which the original keeps as one matrix and transformers as three. The original's names and ours differ in the backbone
and in learned positions alone, and list shared heads several times. transformers leaves such copies out on disk, so
``restore_copies`` accepts either. Source: specs/detectors.md part 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

HFLayout = Literal["disk", "memory"]
"""``disk``: names in files, on the Hub and in transformers 4; ``memory``: names in modules of transformers 5."""

_OURS_TO_OFFICIAL = (("backbone.body.", "backbone.0.body."), ("position_encoding.", "backbone.1."))

# (ours, transformers on disk); each pattern is tried on the whole key, the first that fits is used
_TO_HF = (
    (r"backbone\.body\.", r"model.backbone.conv_encoder.model."),
    (r"position_encoding\.row_embed\.", r"model.position_embedding.row_embeddings."),
    (r"position_encoding\.col_embed\.", r"model.position_embedding.column_embeddings."),
    (r"input_proj\.", r"model.input_proj."),
    (r"query_embed\.", r"model.query_position_embeddings."),
    (r"transformer\.encoder\.layers\.(\d+)\.norm1\.", r"model.encoder.layers.\1.self_attn_layer_norm."),
    (r"transformer\.encoder\.layers\.(\d+)\.norm2\.", r"model.encoder.layers.\1.final_layer_norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm1\.", r"model.decoder.layers.\1.encoder_attn_layer_norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm2\.", r"model.decoder.layers.\1.self_attn_layer_norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm3\.", r"model.decoder.layers.\1.final_layer_norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.cross_attn\.", r"model.decoder.layers.\1.encoder_attn."),
    (r"transformer\.(\w+)\.layers\.(\d+)\.linear([12])\.", r"model.\1.layers.\2.fc\3."),
    (r"transformer\.", r"model."),
)
_FROM_HF = (
    (r"model\.backbone\.conv_encoder\.model\.", r"backbone.body."),
    (r"model\.(?:backbone\.)?position_embedding\.row_embeddings\.", r"position_encoding.row_embed."),
    (r"model\.(?:backbone\.)?position_embedding\.column_embeddings\.", r"position_encoding.col_embed."),
    (r"model\.input_proj\.", r"input_proj."),
    (r"model\.query_position_embeddings\.", r"query_embed."),
    (r"model\.encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"transformer.encoder.layers.\1.norm1."),
    (r"model\.encoder\.layers\.(\d+)\.final_layer_norm\.", r"transformer.encoder.layers.\1.norm2."),
    (r"model\.decoder\.layers\.(\d+)\.encoder_attn_layer_norm\.", r"transformer.decoder.layers.\1.norm1."),
    (r"model\.decoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"transformer.decoder.layers.\1.norm2."),
    (r"model\.decoder\.layers\.(\d+)\.final_layer_norm\.", r"transformer.decoder.layers.\1.norm3."),
    (r"model\.decoder\.layers\.(\d+)\.encoder_attn\.", r"transformer.decoder.layers.\1.cross_attn."),
    (r"model\.(\w+)\.layers\.(\d+)\.fc([12])\.", r"transformer.\1.layers.\2.linear\3."),
    (r"model\.", r"transformer."),
)
# renames that transformers 5 does when it loads a file
_DISK_TO_MEMORY = (
    (r"(model\.backbone)\.conv_encoder\.", r"\1."),
    (r"(model\.decoder\.layers\.\d+\.self_attn)\.out_proj\.", r"\1.o_proj."),
    (r"(model\.\w+\.layers\.\d+)\.fc([12])\.", r"\1.mlp.fc\2."),
)
_MEMORY_TO_DISK = (
    (r"(model\.backbone)\.model\.", r"\1.conv_encoder.model."),
    (r"(model\.decoder\.layers\.\d+\.self_attn)\.o_proj\.", r"\1.out_proj."),
    (r"(model\.\w+\.layers\.\d+)\.mlp\.fc([12])\.", r"\1.fc\2."),
)
_PACKED = re.compile(r"(.*\.self_attn)\.in_proj_(weight|bias)")
_SPLIT = re.compile(r"(.*\.decoder\.layers\.\d+\.self_attn)\.([qkv])_proj\.(weight|bias)")
_HEAD = re.compile(r"(?:transformer\.decoder\.)?((?:class|bbox)_embed)\.(\d+)\.(.*)")


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the original's checkpoints (their ``model`` entry) from ours."""
    return {_swap_prefix(key, _OURS_TO_OFFICIAL): tensor for key, tensor in state.items()}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names from those of the original's checkpoints (their ``model`` entry)."""
    swapped = [(official, ours) for ours, official in _OURS_TO_OFFICIAL]
    return {_swap_prefix(key, swapped): tensor for key, tensor in state.items()}


def to_transformers(state: Mapping[str, Tensor], layout: HFLayout = "disk") -> dict[str, Tensor]:
    """Names of transformers' ``DeformableDetrForObjectDetection`` from ours.

    Args:
        state: our state dict.
        layout: ``disk`` for files (read by transformers 4 and 5), ``memory`` for modules of transformers 5.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        packed = _PACKED.fullmatch(key)
        if packed is None:
            renamed[_rename(key, _TO_HF)] = tensor
            continue
        attention = _rename(packed[1] + ".", _TO_HF)
        for role, part in zip("qkv", tensor.chunk(3), strict=True):
            renamed[f"{attention}{role}_proj.{packed[2]}"] = part
    return renamed if layout == "disk" else {_rename(key, _DISK_TO_MEMORY): tensor for key, tensor in renamed.items()}


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names from transformers' names, of files or in memory.

    Raises:
        KeyError: one of the three projections of a self-attention is missing.
    """
    renamed: dict[str, Tensor] = {}
    for raw_key, tensor in state.items():
        key = _rename(raw_key, _MEMORY_TO_DISK)
        split = _SPLIT.fullmatch(key)
        if split is None:
            renamed[_rename(key, _FROM_HF)] = tensor
        elif split[2] == "q":
            parts = [state[raw_key.replace("q_proj", f"{role}_proj")] for role in "qkv"]
            renamed[f"{_rename(split[1] + '.', _FROM_HF)}in_proj_{split[3]}"] = torch.cat(parts)
    return renamed


def drop_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with every tensor under one name, the first that it has; what safetensors wants.

    Args:
        state: a state dict whose copies share memory, as ``state_dict()`` gives it.
    """
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    kept: dict[str, Tensor] = {}
    for key, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or identity not in seen:
            seen.add(identity)
            kept[key] = tensor
    return kept


def restore_copies(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """A state dict with the copies of heads that a model lists under several names.

    A head without its own entry is taken from its other name or, where all layers share one head, from the only one.

    Args:
        state: state dict in our names, with or without copies.
        names: names that the model has, ``model.state_dict()``.

    Returns:
        The state, with one more entry for each name that is missing and known under another.
    """
    heads: dict[tuple[str, str], dict[int, Tensor]] = {}
    for key, tensor in state.items():
        if head := _HEAD.fullmatch(key):
            heads.setdefault((head[1], head[3]), {})[int(head[2])] = tensor
    completed = dict(state)
    for name in names:
        head = _HEAD.fullmatch(name)
        if name in completed or head is None:
            continue
        known = heads.get((head[1], head[3]), {})
        found = next(iter(known.values())) if len(known) == 1 else known.get(int(head[2]))
        if found is not None:
            completed[name] = found
    return completed


def _rename(key: str, rules: Iterable[tuple[str, str]]) -> str:
    """Apply the first rule that fits the start of a key."""
    for pattern, replacement in rules:
        renamed, count = re.subn("^" + pattern, replacement, key)
        if count:
            return renamed
    return key


def _swap_prefix(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Replace the first prefix that fits."""
    for old, new in pairs:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key
