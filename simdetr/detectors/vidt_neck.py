"""ViDT's neck, a decoder without encoder: feature maps and detection tokens in, states and boxes of every layer out.

The maps are read as they are, without positions or level embeddings. The first prediction is the body's own; then each
layer adds one. Source: ViDT and ViDT+ (arXiv 2110.03921, 2204.07962), numerics and names of specs/detectors.md B3, B4.
Letters: B images, C channels, L levels, S cells of all levels together, Q queries (detection tokens), K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simdetr.detectors.deformable_attention import MSDeformAttn
from simdetr.detectors.deformable_layers import DeformableDecoderLayer, Memory
from simdetr.detectors.deformable_transformer import DeformableDecoder, inverse_sigmoid
from simdetr.detectors.encoder_proposals import cell_boxes


def flatten_maps(maps: Sequence[Tensor], masks: Sequence[Tensor]) -> Memory:
    """The maps as a decoder reads them.

    Args:
        maps: [B, C, h_l, w_l] per level, in any order.
        masks: bool per level, True = padding: [B, h_l, w_l], or [1, h_l, w_l] and all False if no image is padded.
    """
    tokens = torch.cat([rearrange(cells, "b c h w -> b (h w) c") for cells in maps], dim=1)
    ratios = [torch.stack(((~m[:, 0]).float().mean(1), (~m[:, :, 0]).float().mean(1)), dim=-1) for m in masks]
    padded = masks[0].shape[0] == tokens.shape[0]
    padding = torch.cat([mask.flatten(1) for mask in masks], dim=1) if padded else None
    return Memory(tokens, [(m.shape[2], m.shape[3]) for m in maps], torch.stack(ratios, dim=1), padding)


class VidtNeck(nn.Module):
    """Decoder layers behind the body's own prediction, and classes of the maps' cells.

    Args:
        dim: C.
        num_heads: attention heads.
        num_layers: layers of the decoder.
        ffn_dim: width of the perceptrons.
        dropout: probability of dropout.
        num_levels: L.
        num_points: points that a head reads per level.
        refine: each layer starts from the boxes of the one before.
        token_classes: K, to learn the classes of cells as well (token labelling); None to leave that out.
        class_bias: bias of the cells' class logits at the start.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_layers: int,
        ffn_dim: int,
        dropout: float,
        num_levels: int,
        num_points: int,
        refine: bool,
        token_classes: int | None,
        class_bias: float,
    ) -> None:
        super().__init__()
        sizes = (dim, ffn_dim, dropout, num_levels, num_heads, num_points)
        self.decoder = DeformableDecoder((DeformableDecoderLayer(*sizes) for _ in range(num_layers)), refine)
        self.reference_points = nn.Linear(dim, 2)
        self.token_embed = None
        if token_classes is not None:
            self.enc_output = nn.Linear(dim, dim)
            self.enc_output_norm = nn.LayerNorm(dim)
            self.token_embed = nn.Linear(dim, token_classes)
        self._reset_parameters(class_bias)

    def _reset_parameters(self, class_bias: float) -> None:
        """Initialise as the original does; the bias of the reference points keeps PyTorch's default."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        if self.token_embed is not None:
            nn.init.constant_(self.token_embed.bias, class_bias)

    def forward(
        self, target: Tensor, query: Tensor, memory: Memory, box_heads: nn.ModuleList, num_layers: int
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """States [B, Q, C] and boxes cxcywh [B, Q, 4] of the body and each layer, 1 + ``num_layers``; points [B, Q, 2].

        The points are where the body's prediction starts, fractions of the valid image.

        Args:
            target: detection tokens [B, Q, C].
            query: their positions [B, Q, C].
            memory: the maps.
            box_heads: the body's box head, then one per layer.
            num_layers: how many of the layers to run.
        """
        reference = self.reference_points(query).float().sigmoid()
        offsets = box_heads[0](target).float()
        boxes = (offsets + F.pad(inverse_sigmoid(reference), (0, 2))).sigmoid()
        start = boxes.detach() if self.decoder.refine else reference
        later = self.decoder(target, query, start, memory, box_heads[1 : num_layers + 1])
        return [target, *later[0]], [boxes, *later[1]], reference

    def label_cells(self, memory: Memory, masks: Sequence[Tensor]) -> list[Tensor]:
        """Class logits of all cells, [B, h_l, w_l, K] per level; padding and border cells count as zeros."""
        assert self.token_embed is not None, "built without token labelling"
        usable = cell_boxes(masks)[1]
        cells = self.enc_output(memory.tokens.masked_fill(~usable[..., None], 0.0))
        logits = self.token_embed(self.enc_output_norm(cells))
        levels = logits.split_with_sizes([height * width for height, width in memory.shapes], dim=1)
        return [
            rearrange(level, "b (h w) k -> b h w k", h=height)
            for level, (height, _) in zip(levels, memory.shapes, strict=True)
        ]
