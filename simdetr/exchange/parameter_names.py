"""Parameter names of Deformable DETR in three places: this library, the original's checkpoints, transformers.

State dicts in, state dicts with other names out; tensors are shared, except the packed projections of self-attention,
which the original keeps as one matrix and transformers as three. The original's names and ours differ in the backbone
and in learned positions alone, and list shared heads several times. transformers leaves such copies out on disk, so
``restore_copies`` accepts either.

Two things are ours alone, and are translated: one class-free logit in the encoder's head, where the others have one per
class and read the first, and objectness, which they have as a part of the class heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
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
_HEAD = re.compile(r"(?:transformer\.decoder\.)?((?:class|bbox|object)_embed)\.(\d+)\.(.*)")
# below whatever wraps the detector: (prefix, layer, weight or bias)
_CLASS_HEAD = re.compile(r"(.*?)(?:transformer\.decoder\.)?class_embed\.(\d+)\.(weight|bias)")
_QUERIES = {"query_embed.weight": 0, "backbone.det_token": 1, "backbone.det_pos_embed": 1}
"""Tensors of learned queries, of Deformable DETR and of ViDT, and which of their dimensions counts queries."""
_UNLIKELY = -math.log(99.0)


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


def plain_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict with the heads of the original and of transformers, which give equal outputs.

    The encoder's one logit becomes the first row of a head with one row per class, the row that the choice of queries
    looks at. The other rows, which only a loss would see, say "no object" of every cell.
    """
    plain = fold_objectness(state)
    widened: dict[int, Tensor] = {}  # copies still share memory
    for name in _encoder_heads(plain):
        head, parts = plain[name], name.rsplit(".", 2)
        classes = len(plain[f"{parts[0]}.0.{parts[2]}"])
        if head.data_ptr() not in widened:
            others = head.new_full((classes - 1, *head.shape[1:]), 0.0 if parts[2] == "weight" else _UNLIKELY)
            widened[head.data_ptr()] = torch.cat([head, others])
        plain[name] = widened[head.data_ptr()]
    return plain


def fold_objectness(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict without objectness, which the class heads take up: o + c_k is linear in the query's state."""
    folded = {name: tensor for name, tensor in state.items() if "object_embed." not in name}
    sums: dict[tuple[int, int], Tensor] = {}  # heads that share memory still do
    for name, tensor in folded.items():
        head = _CLASS_HEAD.fullmatch(name)
        present = state.get(f"{head[1]}object_embed.{head[2]}.{head[3]}") if head else None
        if present is not None:
            identity = (tensor.data_ptr(), present.data_ptr())
            folded[name] = sums[identity] = sums[identity] if identity in sums else tensor + present
    return folded


def add_objectness(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Heads for a detector with objectness, of a state dict without: o starts equal everywhere, o + c_k as they were.

    Args:
        state: with its copies, see ``restore_copies``.
        own: state dict of the detector, whose bias of objectness, the prior, o keeps.
    """
    split = dict(state)
    for name, tensor in state.items():
        head = _CLASS_HEAD.fullmatch(name)
        present = f"{head[1]}object_embed.{head[2]}.{head[3]}" if head else ""
        if head is None or present in state or present not in own or own[name].shape != tensor.shape:
            continue
        split[present] = torch.zeros_like(own[present]) if head[3] == "weight" else own[present]
        if head[3] == "bias":
            split[name] = tensor - own[present].to(tensor)
    return split


def fit_to(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What fits a detector of a state dict with the same names but other numbers of classes or queries.

    Of a published head of the encoder, with one row per class, this is the first row, the one that its choice of
    queries looks at. Of learned queries it is as many as there are on both sides; further ones stay as the detector has
    them.

    Args:
        state: with its copies, see ``restore_copies``.
        own: state dict of the detector.
    """
    fitted = dict(state)
    for name in _encoder_heads(own):
        # a head that a detector without two stages shares among its layers says nothing about cells
        if name in state and f"{_prefix(name)}transformer.enc_output.weight" in state:
            fitted[name] = state[name][: len(own[name])]
    for name, tensor in state.items():
        dim = next((dim for queries, dim in _QUERIES.items() if name.endswith(queries)), None)
        if dim is None or name not in own or _without(dim, tensor) != _without(dim, own[name]):
            continue
        common, wanted = min(tensor.shape[dim], own[name].shape[dim]), own[name].shape[dim]
        rest = own[name].narrow(dim, common, wanted - common).to(tensor)
        fitted[name] = torch.cat([tensor.narrow(dim, 0, common), rest], dim)
    return fitted


def is_of_queries(name: str) -> bool:
    """Whether a tensor of this name holds learned queries."""
    return name.endswith(tuple(_QUERIES))


def _encoder_heads(names: Collection[str]) -> list[str]:
    """Names of the head that chooses the queries of a two-stage detector: the class head behind the decoder's."""
    heads = [head for name in names if (head := _CLASS_HEAD.fullmatch(name))]
    last: dict[str, int] = {}
    for head in heads:
        last[head[1]] = max(last.get(head[1], 0), int(head[2]))
    return [
        head[0]
        for head in heads
        if f"{head[1]}transformer.enc_output.weight" in names and int(head[2]) == last[head[1]]
    ]


def _prefix(name: str) -> str:
    head = _CLASS_HEAD.fullmatch(name)
    return head[1] if head else ""


def _without(dim: int, tensor: Tensor) -> tuple[int, ...]:
    """Shape of a tensor but for one dimension."""
    return (*tensor.shape[:dim], *tensor.shape[dim + 1 :])


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


# ----------------------------------------------------------------------------------------------------------------------
# What Deformable DETR can take from plain DETR, and so from UP-DETR: names and tensors of theirs in, ours out.
#
# The two share the backbone, the projection of its last map, self-attention of the decoder, perceptrons and layer
# norms. Deformable attention reads its values and writes its result by the same two matrices as DETR's attention; what
# chooses where to look has no counterpart. Layer norms 1 and 2 of a decoder layer have changed places: here norm 1
# belongs to cross-attention. DETR's heads and queries mean other things and stay out.


# (DETR, ours); each pattern must fit the whole name
_SAME_ROLE = (
    (r"backbone\.0\.body\.(.*)", r"backbone.body.\1"),
    (r"(transformer\.encoder\.layers\.\d+\.(?:linear[12]|norm[12])\..*)", r"\1"),
    (r"(transformer\.encoder\.layers\.\d+\.self_attn)\.out_proj\.(.*)", r"\1.output_proj.\2"),
    (r"(transformer\.decoder\.layers\.\d+\.(?:self_attn|linear[12]|norm3)[._].*)", r"\1"),
    (r"(transformer\.decoder\.layers\.\d+)\.norm1\.(.*)", r"\1.norm2.\2"),
    (r"(transformer\.decoder\.layers\.\d+)\.norm2\.(.*)", r"\1.norm1.\2"),
    (r"(transformer\.decoder\.layers\.\d+)\.multihead_attn\.out_proj\.(.*)", r"\1.cross_attn.output_proj.\2"),
)
_DETR_PACKED = re.compile(
    r"(transformer\.(?:encoder\.layers\.\d+\.self_attn|decoder\.layers\.\d+\.multihead_attn))\.in_proj_(weight|bias)"
)


def from_detr(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a DETR that have a role in Deformable DETR, under our names; shapes are not compared.

    Args:
        state: DETR's state dict, with the original's names.
        own: state dict of the detector that they are for; its input projections tell where DETR's only one belongs.
    """
    taken: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if packed := _DETR_PACKED.fullmatch(name):
            place = packed[1].replace("multihead_attn", "cross_attn")
            taken[f"{place}.value_proj.{packed[2]}"] = tensor.chunk(3)[2]
            continue
        if name.startswith("input_proj."):
            taken[f"input_proj.{_level_of_last_map(own)}.0.{name.removeprefix('input_proj.')}"] = tensor
            continue
        for pattern, replacement in _SAME_ROLE:
            renamed, count = re.subn(f"^{pattern}$", replacement, name)
            if count:
                taken[renamed] = tensor
                break
    return taken


def _level_of_last_map(own: Mapping[str, Tensor]) -> int:
    """Level of the backbone's last map: the last one whose projection is a 1x1 convolution."""
    levels = [
        int(found[1])
        for name, tensor in own.items()
        if (found := re.fullmatch(r"input_proj\.(\d+)\.0\.weight", name)) and tuple(tensor.shape[2:]) == (1, 1)
    ]
    return max(levels, default=0)


# ----------------------------------------------------------------------------------------------------------------------
# Parameter names of ViDT in two places: this library and the original's checkpoints (their ``model`` entry).
#
# State dicts in, state dicts with other names out. The original changed Swin's source, so its additions stand inside
# the blocks and a merging ends a stage; here timm's Swin is unmodified, the additions stand beside it, and a merging
# begins a stage. The original stores parameters that nothing reads; they are left out.
# and part 1.


# (the original's, ours); each pattern must fit the whole name, the first that does is used
_FROM_OFFICIAL = (
    (r"backbone\.patch_embed\.(.*)", r"backbone.body.patch_embed.\1"),
    (r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.det_pos_linear\.(.*)", r"backbone.det_pos_linear.\1.\2.\3"),
    (r"backbone\.layers\.(\d+)\.blocks\.(.*)", r"backbone.body.layers.\1.blocks.\2"),
    (r"backbone\.layers\.3\.downsample\.(.*)", r"backbone.tail.\1"),
    *((rf"backbone\.layers\.{i}\.downsample\.(.*)", rf"backbone.body.layers.{i + 1}.downsample.\1") for i in range(3)),
)
_TO_OFFICIAL = (
    (r"backbone\.body\.patch_embed\.(.*)", r"backbone.patch_embed.\1"),
    (r"backbone\.det_pos_linear\.(\d+)\.(\d+)\.(.*)", r"backbone.layers.\1.blocks.\2.det_pos_linear.\3"),
    (r"backbone\.body\.layers\.(\d+)\.blocks\.(.*)", r"backbone.layers.\1.blocks.\2"),
    (r"backbone\.tail\.(.*)", r"backbone.layers.3.downsample.\1"),
    *((rf"backbone\.body\.layers\.{i + 1}\.downsample\.(.*)", rf"backbone.layers.{i}.downsample.\1") for i in range(3)),
)
# without a neck the heads have no numbers, and ours stand together
_NECK_FREE = re.compile(r"(?:input_proj\.[01]|(?:class|bbox)_embed\.layers\.\d)\..*")
_UNUSED = re.compile(
    r"backbone\.norm\d\..*"
    r"|backbone\..*\.relative_position_index"
    r"|backbone\..*\.downsample\.(?:expansion|norm2)\..*"
    r"|transformer\.level_embed"
    r"|fusion\.multi_scaler\.refinenet_3\.(?:smoothing|resConfUnit1)\..*"
)


def from_official_vidt(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names from the original's; parameters that it stores and never reads are left out."""
    ours = {
        _renamed_vidt(name, _FROM_OFFICIAL): tensor for name, tensor in state.items() if not _UNUSED.fullmatch(name)
    }
    if not has_neck(state):
        ours = {f"neck_free_head.{k}" if _NECK_FREE.fullmatch(k) else k: tensor for k, tensor in ours.items()}
    return ours


def to_official_vidt(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's names from ours, without the parameters that only the original has."""
    return {_renamed_vidt(name.removeprefix("neck_free_head."), _TO_OFFICIAL): tensor for name, tensor in state.items()}


def has_neck(state: Mapping[str, Tensor]) -> bool:
    """Whether a ViDT, under either names, has a decoder."""
    return any(name.startswith("transformer.decoder.") for name in state)


def _renamed_vidt(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        if re.fullmatch(pattern, name):
            return re.sub(f"^{pattern}$", replacement, name)
    return name
