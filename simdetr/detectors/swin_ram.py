"""Swin as the body of ViDT: images and padding mask in, feature maps and detection tokens out.

An unmodified ``SwinTransformer`` of timm is walked stage by stage and its layers are called, so weights, names and
loading stay timm's; detection tokens, their positions and a fourth patch merging stand beside it. Names in a state dict
are ``backbone.body.`` and timm's own. Patches attend within windows as in plain Swin and never see the tokens. Tokens
attend to each other and, in the last stage, to all patches of the image, by the same weights (reconfigured attention).
Source: ViDT (arXiv 2110.03921, section 3.1), numerics of the published code.
Letters: B images, N tokens, C_i channels of stage i, h_i and w_i its cells; of one block C, H and W.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import is_model_in_modules
from timm.models.swin_transformer import PatchMerging, SwinTransformer, window_partition, window_reverse
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simdetr.detectors.backbone import resize_mask
from simdetr.detectors.position_encoding import sine_cell_positions

OWN_SIZES: dict[str, dict[str, Any]] = {
    "swin_pico": {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)},
    "swin_nano": {"embed_dim": 48, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
}
"""Swins that timm lacks: one for laptops, and ViDT's smallest. Other names are timm's."""
DROP_PATH = {"swin_pico": 0.0, "swin_nano": 0.0, "swin_tiny": 0.2, "swin_small": 0.3, "swin_base": 0.3}
"""Stochastic depth of ViDT by the start of the name; 0.1 for all others."""
HIDDEN = -100.0
"""What is added to attention that must not be; finite, so that a row without anything visible stays finite."""


class RamFeatures(NamedTuple):
    """What the body hands to neck and heads."""

    maps: list[Tensor]
    """Maps [B, C_i, h_i, w_i] of strides 8, 16, 32 and, with a merging at the end, 64."""
    tokens: Tensor
    """Detection tokens after the last stage [B, N, C_4]."""


def create_swin(name: str, pretrained: bool = False, drop_path: float | None = None) -> SwinTransformer:
    """A Swin for images of any size.

    Args:
        name: a Swin of timm (``timm.list_models("swin_*")``, not Swin V2), ``swin_nano`` or ``swin_pico``.
        pretrained: load timm's pretrained weights (needs the network or timm's cache).
        drop_path: stochastic depth of the last block; None for ViDT's own, see ``DROP_PATH``.

    Raises:
        ValueError: no such Swin, or one without pretrained weights.
    """
    if drop_path is None:
        drop_path = next((rate for start, rate in DROP_PATH.items() if name.startswith(start)), 0.1)
    # built for 224 px the last stage would be one window and lose its shift for good
    options: dict[str, Any] = {"dynamic_img_size": True, "always_partition": True, "drop_path_rate": drop_path}
    if name in OWN_SIZES:
        if pretrained:
            raise ValueError(
                f"backbone {name!r} has no weights in timm; set pretrained_backbone=False and give a checkpoint as "
                "model.backbone_weights, or choose swin_tiny_patch4_window7_224"
            )
        return SwinTransformer(num_classes=0, **OWN_SIZES[name], **options)
    if not is_model_in_modules(name.split(".")[0], ["swin_transformer"]):
        raise ValueError(
            f"backbone {name!r} is no Swin transformer, and ViDT needs one; expected {', '.join(OWN_SIZES)} or a name "
            "of timm's swin_transformer module, such as swin_tiny_patch4_window7_224"
        )
    return cast(SwinTransformer, timm.create_model(name, pretrained=pretrained, num_classes=0, **options))


class RamSwin(nn.Module):
    """Swin with detection tokens.

    Args:
        body: exactly timm's ``SwinTransformer``, of four stages.
        num_tokens: N.
        position_dim: P, width of the tokens' positions.
        tail_channels: channels of the map of stride 64 made by a fourth patch merging; None for none.
        activation_checkpointing: recompute the blocks in the backward pass, for less memory and a third more time.

    Attributes:
        channels: channels of each map, fine to coarse.
        strides: input pixels per cell of each map.
        token_channels: C_4.

    Raises:
        ValueError: another network, or another number of stages.
    """

    def __init__(
        self,
        body: nn.Module,
        num_tokens: int,
        position_dim: int,
        tail_channels: int | None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if type(body) is not SwinTransformer:
            found = f"{type(body).__module__}.{type(body).__qualname__}"
            raise ValueError(
                f"body must be timm.models.swin_transformer.SwinTransformer itself, got {found}; Swin V2 and other "
                "variants attend in another way. Use create_swin()"
            )
        stages: Any = body.layers
        widths: list[int] = [stage.blocks[0].dim for stage in stages]
        if len(widths) != 4:
            raise ValueError(f"body must have 4 stages, got {len(widths)}")
        # stages are read before their norm; an unused one would be a parameter without gradient
        body.prune_intermediate_layers(prune_norm=True, prune_head=True)
        self.body: Any = body  # its attributes have no types
        self.activation_checkpointing = activation_checkpointing
        self.det_token = nn.Parameter(torch.empty(1, num_tokens, widths[0]))
        self.det_pos_embed = nn.Parameter(torch.empty(1, num_tokens, position_dim))
        for parameter in (self.det_token, self.det_pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.det_pos_linear = nn.ModuleList(
            nn.ModuleList(nn.Linear(position_dim, width) for _ in stage.blocks)
            for stage, width in zip(stages, widths, strict=True)
        )
        self.tail = None if tail_channels is None else PatchMerging(widths[-1], tail_channels)
        self.channels = widths[1:] + ([] if tail_channels is None else [tail_channels])
        patches: Any = body.patch_embed
        self.strides = [int(patches.patch_size[0]) * 2**stage for stage in range(1, len(self.channels) + 1)]
        self.token_channels = widths[-1]

    def forward(self, images: Tensor, mask: Tensor) -> RamFeatures:
        """Maps and tokens of images [B, 3, H, W], zero at padding, since windows look at padded pixels.

        The mask is bool [B, H, W], True = padding, or [1, H, W] for all images alike.
        """
        high, wide = self.body.patch_embed.patch_size
        height, width = images.shape[-2:]
        patches = self.body.patch_embed(F.pad(images, (0, -width % wide, 0, -height % high)))
        # tokens read masks at an eighth of the finest grid, rounded down, before those of their own stage
        eighth = max(1, patches.shape[1] // 8), max(1, patches.shape[2] // 8)
        tokens = self.det_token.expand(len(images), -1, -1)
        maps = []
        for index, stage in enumerate(self.body.layers):
            if index > 0:
                # tokens have no neighbours: each is merged with three copies of itself
                merging = stage.downsample
                tokens = merging.reduction(merging.norm(tokens.repeat(1, 1, 4)))
            patches = stage.downsample(patches)
            last = index == len(self.body.layers) - 1
            access = self._access(resize_mask(mask, eighth), patches) if last else None
            masks = {block.shift_size: shift_mask(block, patches) for block in stage.blocks[:2]}
            for block, place in zip(stage.blocks, cast(nn.ModuleList, self.det_pos_linear[index]), strict=True):
                inputs = (block, place, patches, tokens, self.det_pos_embed, masks[block.shift_size], access)
                if self.activation_checkpointing and self.training:
                    patches, tokens = checkpoint(ram_block, *inputs, use_reentrant=False)
                else:
                    patches, tokens = ram_block(*inputs)
            if index > 0:
                maps.append(rearrange(patches, "b h w c -> b c h w"))
        if self.tail is not None:
            maps.append(rearrange(self.tail(patches), "b h w c -> b c h w"))
        return RamFeatures(maps, tokens)

    def _access(self, mask: Tensor, patches: Tensor) -> PatchAccess:
        """Sine positions of the patches [B, h, w, C] and the attention bias that hides padded ones from tokens."""
        size = (patches.shape[1], patches.shape[2])
        if mask.shape[1:] != size:
            mask = resize_mask(mask, size)
        positions = sine_cell_positions(mask, patches.shape[-1], centred=False)
        bias = F.pad(mask.flatten(1).float() * HIDDEN, (0, self.det_token.shape[1]))
        return PatchAccess(rearrange(positions, "b c h w -> b h w c"), bias[:, None, None])


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
    """Refine patches [B, H, W, C] and tokens [B, N, C].

    ``place`` maps the tokens' positions [1, N, P] to C channels; blocks that shift use ``shift_mask``; ``access`` lets
    the tokens read the patches, None is for attention among tokens alone.
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
    shifts = down or right
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

    Tokens [B, N, C] and patches [B, H, W, C] (None if they cannot be read) come normed, positions added; the result
    [B, N, C] is before the residual. ``attention`` is timm's ``WindowAttention``.
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
