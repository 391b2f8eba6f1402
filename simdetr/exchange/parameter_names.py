"""Parameter names of detectors in other projects: state dicts in, state dicts with other names out; tensors are shared.

Deformable DETR has three vocabularies: ours, the original's checkpoints (their ``model`` entry) and transformers. The
original's names differ from ours in the backbone and in learned positions alone, and list shared heads several times.
transformers leaves such copies out on disk and splits the packed projections of self-attention into three. Two things
are ours alone, and are translated: one class-free logit in the encoder's head, where the others have one per class and
read the first, and objectness, which they have as a part of the class heads.

DETR, and so UP-DETR, shares with Deformable DETR the backbone, the projection of its last map, self-attention of the
decoder, perceptrons and layer norms. Deformable attention reads its values and writes its result by the same two
matrices as DETR's attention; what chooses where to look has no counterpart. Layer norms 1 and 2 of a decoder layer have
changed places: here norm 1 belongs to cross-attention. DETR's heads and queries mean other things and stay out.

The original ViDT changed Swin's source, so its additions stand inside the blocks and a merging ends a stage; here
timm's Swin is unmodified, the additions stand beside it, and a merging begins a stage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

HFLayout = Literal["disk", "memory"]
"""``disk``: names in files, which transformers 4 and 5 read; ``memory``: names in modules of transformers 5."""

# pairs of name starts, the first that fits is used; {} stands for a word without dots
_OFFICIAL = (("backbone.body.", "backbone.0.body."), ("position_encoding.", "backbone.1."))
_HF_POSITIONS = "model.position_embedding.", "model.backbone.position_embedding."  # the second is only read
_HF = (
    ("backbone.body.", "model.backbone.conv_encoder.model."),
    *(("position_encoding.row_embed.", f"{place}row_embeddings.") for place in _HF_POSITIONS),
    *(("position_encoding.col_embed.", f"{place}column_embeddings.") for place in _HF_POSITIONS),
    ("input_proj.", "model.input_proj."),
    ("query_embed.", "model.query_position_embeddings."),
    ("transformer.encoder.layers.{}.norm1.", "model.encoder.layers.{}.self_attn_layer_norm."),
    ("transformer.encoder.layers.{}.norm2.", "model.encoder.layers.{}.final_layer_norm."),
    ("transformer.decoder.layers.{}.norm1.", "model.decoder.layers.{}.encoder_attn_layer_norm."),
    ("transformer.decoder.layers.{}.norm2.", "model.decoder.layers.{}.self_attn_layer_norm."),
    ("transformer.decoder.layers.{}.norm3.", "model.decoder.layers.{}.final_layer_norm."),
    ("transformer.decoder.layers.{}.cross_attn.", "model.decoder.layers.{}.encoder_attn."),
    ("transformer.{}.layers.{}.linear{}.", "model.{}.layers.{}.fc{}."),
    ("transformer.", "model."),
)
# (disk, memory): renames that transformers 5 does when it loads a file
_HF_MEMORY = (
    ("model.backbone.conv_encoder.model.", "model.backbone.model."),
    ("model.decoder.layers.{}.self_attn.out_proj.", "model.decoder.layers.{}.self_attn.o_proj."),
    ("model.{}.layers.{}.fc{}.", "model.{}.layers.{}.mlp.fc{}."),
)
_DETR = (
    ("backbone.body.", "backbone.0.body."),
    *(2 * (f"transformer.encoder.layers.{{}}.{part}{{}}.",) for part in ("linear", "norm")),
    ("transformer.encoder.layers.{}.self_attn.output_proj.", "transformer.encoder.layers.{}.self_attn.out_proj."),
    *(2 * (f"transformer.decoder.layers.{{}}.{part}.",) for part in ("self_attn", "linear1", "linear2", "norm3")),
    ("transformer.decoder.layers.{}.norm2.", "transformer.decoder.layers.{}.norm1."),
    ("transformer.decoder.layers.{}.norm1.", "transformer.decoder.layers.{}.norm2."),
    ("transformer.decoder.layers.{}.cross_attn.output_proj.", "transformer.decoder.layers.{}.multihead_attn.out_proj."),
)
_VIDT = (
    ("backbone.body.patch_embed.", "backbone.patch_embed."),
    ("backbone.det_pos_linear.{}.{}.", "backbone.layers.{}.blocks.{}.det_pos_linear."),
    ("backbone.body.layers.{}.blocks.", "backbone.layers.{}.blocks."),
    ("backbone.tail.", "backbone.layers.3.downsample."),
    *((f"backbone.body.layers.{i + 1}.downsample.", f"backbone.layers.{i}.downsample.") for i in range(3)),
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
"""What ViDT's checkpoints hold and nothing reads."""
_PACKED = re.compile(r"(.*\.self_attn\.)in_proj_(weight|bias)")
_SPLIT = re.compile(r"(.*\.decoder\.layers\.\d+\.self_attn\.)([qkv])_proj\.(weight|bias)")
_DETR_PACKED = re.compile(
    r"(transformer\.(?:encoder\.layers\.\d+\.self_attn|decoder\.layers\.\d+\.multihead_attn)\.)in_proj_(weight|bias)"
)
_HEAD = re.compile(r"(?:transformer\.decoder\.)?((?:class|bbox|object)_embed)\.(\d+)\.(.*)")
# below whatever wraps the detector: (prefix, layer, weight or bias)
_CLASS_HEAD = re.compile(r"(.*?)(?:transformer\.decoder\.)?class_embed\.(\d+)\.(weight|bias)")
_QUERIES = {"query_embed.weight": 0, "backbone.det_token": 1, "backbone.det_pos_embed": 1}
"""Tensors of learned queries, of Deformable DETR and of ViDT, and which of their dimensions counts queries."""
_UNLIKELY = -math.log(99.0)


def _found(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    """The name by the first pair whose left side its start fits; None where none does."""
    for old, new in pairs:
        start = re.match(re.escape(old).replace(r"\{\}", r"(\w+)"), name)
        if start:
            return new.format(*start.groups()) + name[start.end() :]
    return None


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    return _found(name, pairs) or name


def _back(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(theirs, ours) for ours, theirs in pairs]


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the original Deformable DETR from ours."""
    return {_renamed(name, _OFFICIAL): tensor for name, tensor in state.items()}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names from those of the original Deformable DETR."""
    return {_renamed(name, _back(_OFFICIAL)): tensor for name, tensor in state.items()}


def to_transformers(state: Mapping[str, Tensor], layout: HFLayout = "disk") -> dict[str, Tensor]:
    """Names of transformers' ``DeformableDetrForObjectDetection`` from ours, by default for files; see `HFLayout`."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if packed := _PACKED.fullmatch(name):
            attention = _renamed(packed[1], _HF)
            parts = zip("qkv", tensor.chunk(3), strict=True)
            renamed |= {f"{attention}{role}_proj.{packed[2]}": part for role, part in parts}
        else:
            renamed[_renamed(name, _HF)] = tensor
    return renamed if layout == "disk" else {_renamed(name, _HF_MEMORY): tensor for name, tensor in renamed.items()}


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names from transformers' names, of files or in memory; a KeyError if a self-attention lacks a part."""
    renamed: dict[str, Tensor] = {}
    for given, tensor in state.items():
        name = _renamed(given, _back(_HF_MEMORY))
        split = _SPLIT.fullmatch(name)
        if split is None:
            renamed[_renamed(name, _back(_HF))] = tensor
        elif split[2] == "q":
            parts = [state[given.replace("q_proj", f"{role}_proj")] for role in "qkv"]
            renamed[f"{_renamed(split[1], _back(_HF))}in_proj_{split[3]}"] = torch.cat(parts)
    return renamed


def from_detr(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a DETR that have a role in Deformable DETR, under our names; shapes are not compared.

    ``own`` is the state dict of the detector that they are for. Its last input projection that is a 1x1 convolution is
    of the backbone's last map, where DETR's only one belongs.
    """
    projections = (re.fullmatch(r"input_proj\.(\d+)\.0\.weight", name) for name in own)
    level = max((int(found[1]) for found in projections if found and own[found[0]].shape[2:] == (1, 1)), default=0)
    rules = [*_back(_DETR), ("input_proj.", f"input_proj.{level}.0.")]
    taken: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if packed := _DETR_PACKED.fullmatch(name):
            taken[f"{packed[1].replace('multihead_attn', 'cross_attn')}value_proj.{packed[2]}"] = tensor.chunk(3)[2]
        elif renamed := _found(name, rules):
            taken[renamed] = tensor
    return taken


def from_official_vidt(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names from those of the original ViDT; parameters that it stores and never reads are left out."""
    pairs = _back(_VIDT)
    ours = {_renamed(name, pairs): tensor for name, tensor in state.items() if not _UNUSED.fullmatch(name)}
    if not has_neck(state):
        ours = {f"neck_free_head.{k}" if _NECK_FREE.fullmatch(k) else k: tensor for k, tensor in ours.items()}
    return ours


def to_official_vidt(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the original ViDT from ours, without the parameters that only the original has."""
    return {_renamed(name.removeprefix("neck_free_head."), _VIDT): tensor for name, tensor in state.items()}


def has_neck(state: Mapping[str, Tensor]) -> bool:
    """Whether a ViDT, under either names, has a decoder."""
    return any(name.startswith("transformer.decoder.") for name in state)


def plain_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict with the heads of the original and of transformers, which give equal outputs.

    The encoder's one logit becomes the first row of a head with one row per class, the row that the choice of queries
    looks at. The other rows, which only a loss would see, say "no object" of every cell.
    """
    plain = fold_objectness(state)
    widened: dict[int, Tensor] = {}  # copies still share memory
    for name, _, layer, part in _encoder_heads(plain):
        head = plain[name]
        if head.data_ptr() not in widened:
            classes = len(plain[name.replace(f"class_embed.{layer}.", "class_embed.0.")])
            others = head.new_full((classes - 1, *head.shape[1:]), 0.0 if part == "weight" else _UNLIKELY)
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

    ``state`` has its copies, see ``restore_copies``; o keeps the bias that it has in ``own``, the detector's.
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
    queries looks at. Of learned queries it is as many as there are on both sides; further ones stay as in ``own``, the
    detector's. ``state`` has its copies, see ``restore_copies``.
    """
    fitted = dict(state)
    for name, prefix, _, _ in _encoder_heads(own):
        # a head that a detector without two stages shares among its layers says nothing about cells
        if name in state and f"{prefix}transformer.enc_output.weight" in state:
            fitted[name] = state[name][: len(own[name])]
    for name, tensor in state.items():
        dim = next((dim for queries, dim in _QUERIES.items() if name.endswith(queries)), None)
        if dim is None or name not in own or tensor.ndim != own[name].ndim:
            continue
        wanted = own[name].shape[dim]
        common = min(tensor.shape[dim], wanted)
        kept, rest = tensor.narrow(dim, 0, common), own[name].narrow(dim, common, wanted - common)
        if kept.shape == own[name].narrow(dim, 0, common).shape:  # they differ in their number alone
            fitted[name] = torch.cat([kept, rest.to(tensor)], dim)
    return fitted


def is_of_queries(name: str) -> bool:
    """Whether a tensor of this name holds learned queries."""
    return name.endswith(tuple(_QUERIES))


def _encoder_heads(names: Collection[str]) -> list[tuple[str, str, str, str]]:
    """Name, prefix, layer and part of the head that chooses a two-stage detector's queries: the last class head."""
    heads = [(head[0], *head.groups()) for name in names if (head := _CLASS_HEAD.fullmatch(name))]
    last: dict[str, int] = {}
    for _, prefix, layer, _ in heads:
        last[prefix] = max(last.get(prefix, 0), int(layer))
    return [
        (name, prefix, layer, part)
        for name, prefix, layer, part in heads
        if f"{prefix}transformer.enc_output.weight" in names and int(layer) == last[prefix]
    ]


def drop_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict, whose copies share memory, with every tensor under its first name alone; what safetensors wants."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    kept: dict[str, Tensor] = {}
    for key, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or identity not in seen:
            seen.add(identity)
            kept[key] = tensor
    return kept


def restore_copies(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """A state dict in our names with the copies of heads that a model lists under several of its ``names``.

    A head without its own entry is taken from its other name or, where all layers share one head, from the only one.
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
