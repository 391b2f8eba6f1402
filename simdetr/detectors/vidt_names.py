"""Parameter names of ViDT in two places: this library and the original's checkpoints (their ``model`` entry).

State dicts in, state dicts with other names out. The original changed Swin's source, so its additions stand inside the
blocks and a merging ends a stage; here timm's Swin is unmodified, the additions stand beside it, and a merging begins a
stage. The original stores parameters that nothing reads; they are left out. Source: specs/detectors.md B1 and part 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

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
    ours = {_rename(name, _FROM_OFFICIAL): tensor for name, tensor in state.items() if not _UNUSED.fullmatch(name)}
    if not has_neck(state):
        ours = {f"neck_free_head.{k}" if _NECK_FREE.fullmatch(k) else k: tensor for k, tensor in ours.items()}
    return ours


def to_official_vidt(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's names from ours, without the parameters that only the original has."""
    return {_rename(name.removeprefix("neck_free_head."), _TO_OFFICIAL): tensor for name, tensor in state.items()}


def has_neck(state: Mapping[str, Tensor]) -> bool:
    """Whether a ViDT, under either names, has a decoder."""
    return any(name.startswith("transformer.decoder.") for name in state)


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        if re.fullmatch(pattern, name):
            return re.sub(f"^{pattern}$", replacement, name)
    return name
