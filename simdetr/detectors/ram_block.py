"""One Swin block with reconfigured attention: patches and detection tokens in, both refined by one set of weights out.

Patches attend within windows as in plain Swin and never see the tokens. Tokens attend to each other and, in the stage
that says so, to all patches of the image. The block stays timm's: its layers are called, nothing is subclassed.
Source: ViDT (arXiv 2110.03921, section 3.1), numerics of specs/detectors.md B1 and part 3.
Letters: B images, H and W cells, C channels, N tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

HIDDEN = -100.0
"""What is added to attention that must not be; finite, so that a row without anything visible stays finite."""


class PatchAccess(NamedTuple):
    """What tokens need to read the patches of their stage."""

    positions: Tensor
    """Positions added to the patches, [B or 1, H, W, C]."""
    bias: Tensor
    """Added to the attention, [B or 1, 1, 1, H · W + N]: ``HIDDEN`` at padded patches, 0 at others and at tokens."""


def ram_block(
    block: Any,  # noqa: ANN401 - timm's SwinTransformerBlock, whose attributes have no types
    place: nn.Module,
    patches: Tensor,
    tokens: Tensor,
    token_positions: Tensor,
    shift_mask: Tensor | None,
    access: PatchAccess | None,
) -> tuple[Tensor, Tensor]:
    """Refine patches and tokens.

    Args:
        block: timm's ``SwinTransformerBlock``.
        place: maps the tokens' positions to C channels.
        patches: [B, H, W, C].
        tokens: [B, N, C].
        token_positions: [1, N, P].
        shift_mask: attention mask of shifted windows, see ``shift_mask``; unused by blocks that do not shift.
        access: lets the tokens read the patches; None for attention among tokens alone.

    Returns:
        Patches and tokens, shapes as they came.
    """
    normed = block.norm1(patches)
    # positions reach queries, keys and values, but not the residual
    placed = block.norm1(tokens) + place(token_positions)
    readable = None if access is None else normed + access.positions
    updates = attend_windows(block, normed, shift_mask), attend_tokens(block.attn, placed, readable, access)
    updates = _drop_together(block.drop_path1, *updates)
    patches, tokens = patches + updates[0], tokens + updates[1]
    updates = _drop_together(block.drop_path2, block.mlp(block.norm2(patches)), block.mlp(block.norm2(tokens)))
    return patches + updates[0], tokens + updates[1]


def shift_mask(block: Any, patches: Tensor) -> Tensor | None:  # noqa: ANN401
    """Attention mask of shifted windows for patches [B, H, W, C]: [windows, area, area]; None without shift."""
    (high, wide), (height, width) = block.window_size, patches.shape[1:3]
    padded = patches.new_empty(1, height + -height % high, width + -width % wide, 1)
    mask: Tensor | None = block.get_attn_mask(padded)
    return mask


def attend_windows(block: Any, normed: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ANN401
    """Attention of patches within windows: [B, H, W, C] to the same, before the residual.

    Zeros are added at the bottom and right before the shift, as ViDT was trained; timm shifts first. Both agree where
    the windows fit the map.
    """
    height, width = normed.shape[1:3]
    (high, wide), (down, right) = block.window_size, block.shift_size
    shifts = bool(down or right)
    cells = F.pad(normed, (0, 0, 0, -width % wide, 0, -height % high))
    padded_height, padded_width = cells.shape[1:3]
    if shifts:
        cells = torch.roll(cells, (-down, -right), (1, 2))
    windows = window_partition(cells, block.window_size).flatten(1, 2)
    attended = block.attn(windows, mask=mask if shifts else None)
    cells = window_reverse(attended, block.window_size, padded_height, padded_width)
    if shifts:
        cells = torch.roll(cells, (down, right), (1, 2))
    return cells[:, :height, :width]


def attend_tokens(attention: Any, tokens: Tensor, patches: Tensor | None, access: PatchAccess | None) -> Tensor:  # noqa: ANN401
    """Attention of tokens to each other and to readable patches, with the windows' weights and without their biases.

    Args:
        attention: timm's ``WindowAttention``.
        tokens: [B, N, C], normed, positions added.
        patches: [B, H, W, C], normed, positions added; None if they cannot be read.
        access: how patches are read, with ``patches`` alone.

    Returns:
        [B, N, C], before the residual.
    """
    heads = attention.num_heads
    query, key, value = rearrange(attention.qkv(tokens), "b n (role m d) -> role b m n d", role=3, m=heads)
    bias = None
    if patches is not None and access is not None:
        weight, offset = attention.qkv.weight, attention.qkv.bias
        inner = weight.shape[0] // 3
        read = F.linear(patches.flatten(1, 2), weight[inner:], None if offset is None else offset[inner:])
        patch_key, patch_value = rearrange(read, "b s (role m d) -> role b m s d", role=2, m=heads)
        key, value = torch.cat((patch_key, key), dim=2), torch.cat((patch_value, value), dim=2)
        bias = access.bias.to(query.dtype)
    dropout = attention.attn_drop.p if attention.training else 0.0
    attended = F.scaled_dot_product_attention(query, key, value, bias, dropout_p=dropout, scale=attention.scale)
    projected: Tensor = attention.proj_drop(attention.proj(rearrange(attended, "b m n d -> b n (m d)")))
    return projected


def _drop_together(drop_path: nn.Module, patches: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the updates of patches and tokens for the same images (stochastic depth)."""
    if isinstance(drop_path, nn.Identity) or not drop_path.training:
        return patches, tokens
    kept = drop_path(patches.new_ones(len(patches), 1, 1, 1))
    return patches * kept, tokens * kept[:, 0]
