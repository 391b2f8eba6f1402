"""What Deformable DETR can take from plain DETR, and so from UP-DETR: names and tensors of theirs in, ours out.

The two share the backbone, the projection of its last map, self-attention of the decoder, perceptrons and layer norms.
Deformable attention reads its values and writes its result by the same two matrices as DETR's attention; what chooses
where to look has no counterpart. Layer norms 1 and 2 of a decoder layer have changed places: here norm 1 belongs to
cross-attention (specs/detectors.md A5). DETR's heads and queries mean other things and stay out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

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
_PACKED = re.compile(
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
        if packed := _PACKED.fullmatch(name):
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
