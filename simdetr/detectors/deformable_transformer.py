"""The transformer of Deformable DETR: feature maps of several levels in, query states and boxes of every layer out.

Source: Deformable DETR (arXiv 2010.04159), numerics and names of the published code, post-norm; ``norm1`` of a decoder
layer belongs to its cross-attention. Two-stage (section 4.2): every cell of the encoder's output proposes a box, and
the best ones become queries.
Letters: B images, C channels, L levels, S cells of all levels together, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simdetr.detectors.deformable_attention import MSDeformAttn
from simdetr.detectors.position_encoding import sine_box_positions


@dataclass(frozen=True)
class LayerSizes:
    """Sizes that all layers of a transformer share.

    Attributes:
        dim: C, a multiple of 4 and of ``num_heads``.
        ffn_dim: Width of the perceptrons.
        dropout: Probability at every residual, inside the perceptrons and in the queries' self-attention.
        num_levels: L.
        num_heads: Attention heads.
        num_points: Points that a head reads per level.
    """

    dim: int
    ffn_dim: int
    dropout: float
    num_levels: int
    num_heads: int
    num_points: int

    def attention(self) -> MSDeformAttn:
        """Deformable attention of these sizes."""
        return MSDeformAttn(self.dim, self.num_levels, self.num_heads, self.num_points)


class Memory(NamedTuple):
    """Flattened feature maps, as decoder layers read them."""

    tokens: Tensor
    """[B, S, C], level after level, row by row."""
    shapes: list[tuple[int, int]]
    """(height, width) of each level."""
    valid_ratios: Tensor
    """Valid fraction of width and height, [B, L, 2]."""
    padding: Tensor | None
    """Bool [B, S], True = padding; None if no image is padded."""


class TransformerOutput(NamedTuple):
    """What the transformer hands to the heads and losses."""

    states: list[Tensor]
    """Query states [B, Q, C] after each decoder layer."""
    boxes: list[Tensor]
    """Boxes cxcywh [B, Q, 4] of each decoder layer, fractions of the valid image."""
    encoder_logits: Tensor | None
    """Objectness logits [B, S, 1] of the encoder's proposals (two-stage)."""
    encoder_boxes: Tensor | None
    """Boxes [B, S, 4] of the encoder's proposals (two-stage)."""
    start: Tensor
    """Where the first decoder layer starts, fractions of the valid image: [B, Q, 2] or boxes cxcywh [B, Q, 4]."""


def flatten_maps(maps: Sequence[Tensor], masks: Sequence[Tensor]) -> Memory:
    """The cells of all maps [B, C, h_l, w_l].

    Masks are bool per level, True = padding: [B, h_l, w_l], or [1, h_l, w_l] and all False if no image is padded.
    """
    tokens = _cells(maps)
    ratios = [torch.stack(((~m[:, 0]).float().mean(1), (~m[:, :, 0]).float().mean(1)), dim=-1) for m in masks]
    padded = masks[0].shape[0] == tokens.shape[0]
    padding = torch.cat([mask.flatten(1) for mask in masks], dim=1) if padded else None
    return Memory(tokens, [(m.shape[2], m.shape[3]) for m in maps], torch.stack(ratios, dim=1), padding)


def _cells(maps: Sequence[Tensor]) -> Tensor:
    """[B, S, C] of maps [B, C, h_l, w_l]."""
    return torch.cat([rearrange(cells, "b c h w -> b (h w) c") for cells in maps], dim=1)


def inverse_sigmoid(values: Tensor) -> Tensor:
    """Logit with both the value and its complement kept at 1e-5 or more; any shape."""
    values = values.clamp(0.0, 1.0)
    return torch.log(values.clamp(min=1e-5) / (1.0 - values).clamp(min=1e-5))


def cell_references(shapes: Sequence[tuple[int, int]], valid_ratios: Tensor) -> Tensor:
    """Where every cell lies on every level, in fractions of the padded maps, [B, S, L, 2].

    Shapes are (height, width) of each level, valid ratios width then height, [B, L, 2].
    """
    centres = []
    for level, (height, width) in enumerate(shapes):
        ys = (torch.arange(height, device=valid_ratios.device) + 0.5) / height
        xs = (torch.arange(width, device=valid_ratios.device) + 0.5) / width
        grid = torch.stack((xs.expand(height, -1), ys[:, None].expand(-1, width)), dim=-1)
        centres.append(rearrange(grid, "h w xy -> 1 (h w) xy") / valid_ratios[:, None, level])
    return torch.cat(centres, dim=1)[:, :, None] * valid_ratios[:, None]


def initialise(transformer: nn.Module) -> None:
    """Xavier for all matrices, and deformable attention's own start (A7)."""
    for parameter in transformer.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for module in transformer.modules():
        if isinstance(module, MSDeformAttn):
            module.reset_parameters()


class _Layers(nn.Module):
    """Layers in order; ``activation_checkpointing`` computes their activations again instead of keeping them."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activation_checkpointing = False

    def run(self, layer: nn.Module, *inputs: object) -> Tensor:
        """The output of one of them."""
        again = self.activation_checkpointing and layer.training and torch.is_grad_enabled()
        output: Tensor = checkpoint(layer, *inputs, use_reentrant=False) if again else layer(*inputs)
        return output


class DeformableEncoder(_Layers):
    """Layers that refine the cells of all levels."""

    def forward(self, memory: Memory, positions: Tensor) -> Memory:
        """Memory with refined tokens; positions [B or 1, S, C]."""
        references = cell_references(memory.shapes, memory.valid_ratios)
        for layer in self.layers:
            memory = memory._replace(tokens=self.run(layer, memory, positions, references))
        return memory


class DeformableDecoder(_Layers):
    """Layers that turn queries into states and boxes; if they refine, each starts from the boxes of the one before."""

    def __init__(self, layers: Iterable[DeformableDecoderLayer], refine: bool) -> None:
        super().__init__(layers)
        self.refine = refine

    def forward(
        self, target: Tensor, query: Tensor, reference: Tensor, memory: Memory, box_heads: nn.ModuleList
    ) -> tuple[list[Tensor], list[Tensor]]:
        """States [B, Q, C] and boxes cxcywh [B, Q, 4] after each layer.

        Args:
            target: content of the queries [B, Q, C].
            query: positions of the queries [B, Q, C].
            reference: points [B, Q, 2] or boxes cxcywh [B, Q, 4] in fractions of the valid image.
            memory: the encoder's output.
            box_heads: one per layer (more are ignored), C to 4 offsets of the reference's logits.
        """
        states, boxes = [], []
        for layer, head in zip(self.layers, box_heads, strict=False):
            ratios = memory.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)
            places = reference[:, :, None] * ratios[:, None]
            target = self.run(layer, target, query, places, memory)
            offsets = head(target).float()
            start = inverse_sigmoid(reference)
            logits = offsets + F.pad(start, (0, 4 - start.shape[-1]))
            states.append(target)
            boxes.append(logits.sigmoid())
            if self.refine:
                reference = boxes[-1].detach()
        return states, boxes


class DeformableTransformer(nn.Module):
    """Encoder, choice of queries, decoder.

    Args:
        sizes: of all layers.
        num_encoder_layers: layers of the encoder.
        num_decoder_layers: layers of the decoder.
        refine: iterative box refinement.
        num_proposals: how many cells of the encoder's output become queries (two-stage); None for learned queries.
        exclude_invalid: never choose padding or border cells; the original lets them compete with one constant score.
    """

    def __init__(
        self,
        sizes: LayerSizes,
        num_encoder_layers: int,
        num_decoder_layers: int,
        refine: bool,
        num_proposals: int | None,
        exclude_invalid: bool,
    ) -> None:
        super().__init__()
        dim = sizes.dim
        self.num_proposals, self.exclude_invalid = num_proposals, exclude_invalid
        self.encoder = DeformableEncoder(DeformableEncoderLayer(sizes) for _ in range(num_encoder_layers))
        self.decoder = DeformableDecoder((DeformableDecoderLayer(sizes) for _ in range(num_decoder_layers)), refine)
        self.level_embed = nn.Parameter(torch.empty(sizes.num_levels, dim))
        if num_proposals is not None:
            self.enc_output = nn.Linear(dim, dim)
            self.enc_output_norm = nn.LayerNorm(dim)
            self.pos_trans = nn.Linear(dim * 2, dim * 2)
            self.pos_trans_norm = nn.LayerNorm(dim * 2)
        else:
            self.reference_points = nn.Linear(dim, 2)
        initialise(self)
        nn.init.normal_(self.level_embed)
        if num_proposals is None:
            nn.init.zeros_(self.reference_points.bias)

    def forward(
        self,
        maps: Sequence[Tensor],
        masks: Sequence[Tensor],
        positions: Sequence[Tensor],
        query_embed: Tensor | None,
        box_heads: nn.ModuleList,
        object_head: nn.Module | None,
    ) -> TransformerOutput:
        """Encode the maps and decode the queries.

        Args:
            maps: [B, C, H_l, W_l] per level.
            masks: bool per level, True = padding: [B, H_l, W_l], or [1, H_l, W_l] and all False if no image is padded.
            positions: position encodings per level, [B, C, H_l, W_l] or [1, C, H_l, W_l].
            query_embed: positions and contents of the queries [Q, 2C]; None in the two-stage variant.
            box_heads: box heads of the decoder's layers, then of the encoder in the two-stage variant.
            object_head: objectness of the encoder's cells (C to 1), which the choice of queries looks at (two-stage).
        """
        placed = [_cells([cells]) + own for cells, own in zip(positions, self.level_embed, strict=True)]
        memory = self.encoder(flatten_maps(maps, masks), torch.cat(placed, dim=1))
        batch = memory.tokens.shape[0]
        if self.num_proposals is not None:
            assert object_head is not None, "the two-stage variant chooses by objectness"
            full = [mask.expand(batch, -1, -1) for mask in masks]
            target, query, reference, logits, proposed = self._propose(memory, full, object_head, box_heads[-1])
            states, boxes = self.decoder(target, query, reference, memory, box_heads)
            return TransformerOutput(states, boxes, logits, proposed, reference)
        assert query_embed is not None, "learned queries need an embedding"
        query, target = query_embed[None].expand(batch, -1, -1).chunk(2, dim=-1)
        reference = self.reference_points(query).float().sigmoid()
        states, boxes = self.decoder(target, query, reference, memory, box_heads)
        return TransformerOutput(states, boxes, None, None, reference)

    def _propose(
        self, memory: Memory, masks: Sequence[Tensor], object_head: nn.Module, box_head: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Score all cells with the encoder's heads and turn the best into queries.

        Contents and positions of the queries [B, Q, C], their boxes cxcywh [B, Q, 4] without gradient; for the
        encoder's own loss, objectness logits [B, S, 1] and boxes [B, S, 4] of all cells, 1 where one may not propose.
        """
        assert self.num_proposals is not None
        tokens = memory.tokens
        if tokens.shape[1] < self.num_proposals:
            raise ValueError(
                f"two_stage chooses num_queries={self.num_proposals} of the feature maps' cells, but these images give "
                f"only {tokens.shape[1]}; use larger images or fewer queries"
            )
        candidates, usable = cell_boxes(masks)
        tokens = self.enc_output_norm(self.enc_output(tokens.masked_fill(~usable[..., None], 0.0)))
        logits = object_head(tokens)
        box_logits = box_head(tokens).float() + candidates
        scores = logits[..., 0].detach()
        if self.exclude_invalid:
            scores = scores.masked_fill(~usable, -torch.inf)
        best = scores.topk(self.num_proposals, dim=1).indices
        reference = box_logits.detach().gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
        embedding = sine_box_positions(reference, tokens.shape[-1] // 2)
        query, target = self.pos_trans_norm(self.pos_trans(embedding)).chunk(2, dim=-1)
        return target, query, reference, logits, box_logits.sigmoid()


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention of all cells, then a two-layer perceptron; each with residual and layer norm (A4)."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        dim = sizes.dim
        self.self_attn = sizes.attention()
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, sizes.ffn_dim)
        self.linear2 = nn.Linear(sizes.ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, memory: Memory, positions: Tensor, references: Tensor) -> Tensor:
        """New tokens [B, S, C]; positions [B or 1, S, C], references [B, S, L, 2]."""
        tokens = memory.tokens
        attended = self.self_attn(tokens + positions, references, tokens, memory.shapes, memory.padding)
        tokens = self.norm1(tokens + self.dropout(attended))
        hidden = self.dropout(self.linear1(tokens).relu_())
        normed: Tensor = self.norm2(tokens + self.dropout(self.linear2(hidden)))
        return normed


class DeformableDecoderLayer(nn.Module):
    """Self-attention of the queries, deformable attention to the memory, perceptron (A5)."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        dim, dropout = sizes.dim, sizes.dropout
        self.cross_attn = sizes.attention()
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = nn.MultiheadAttention(dim, sizes.num_heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, sizes.ffn_dim)
        self.linear2 = nn.Linear(sizes.ffn_dim, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, target: Tensor, query: Tensor, references: Tensor, memory: Memory) -> Tensor:
        """New states [B, Q, C]; query positions [B, Q, C], references [B, Q, L, 2 or 4] on the padded maps."""
        placed = target + query
        attended = attend(self.self_attn, placed, target)
        target = self.norm2(target + self.dropout(attended))
        attended = self.cross_attn(target + query, references, memory.tokens, memory.shapes, memory.padding)
        target = self.norm1(target + self.dropout(attended))
        hidden = self.dropout(self.linear1(target).relu_())
        normed: Tensor = self.norm3(target + self.dropout(self.linear2(hidden)))
        return normed


def attend(attention: nn.MultiheadAttention, placed: Tensor, values: Tensor) -> Tensor:
    """Self-attention of queries, of which no table of weights is kept: two projections, the fused operator, one more.

    They are compared by ``placed``, contents and positions [B, Q, C]; ``values`` are their contents.
    """
    dim, heads = values.shape[-1], attention.num_heads
    both, value = attention.in_proj_weight.split_with_sizes((2 * dim, dim))
    both_bias, value_bias = attention.in_proj_bias.split_with_sizes((2 * dim, dim))
    asked, found = rearrange(F.linear(placed, both, both_bias), "b q (two m d) -> two b m q d", two=2, m=heads)
    read = rearrange(F.linear(values, value, value_bias), "b q (m d) -> b m q d", m=heads)
    dropout = attention.dropout if attention.training else 0.0
    attended = F.scaled_dot_product_attention(asked, found, read, dropout_p=dropout)
    return F.linear(rearrange(attended, "b m q d -> b q (m d)"), attention.out_proj.weight, attention.out_proj.bias)


def cell_boxes(masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One box per cell, centred on it, with sides of 0.05 · 2^level of the image.

    Args:
        masks: bool [B, H_l, W_l] per level, True = padding.

    Returns:
        Logits of the boxes cxcywh [B, S, 4] relative to the valid image, +inf for cells that may not propose, and bool
        [B, S] of those that may: not padding, and all four coordinates within (0.01, 0.99).
    """
    boxes = []
    for level, mask in enumerate(masks):
        height, width = mask.shape[1:]
        valid_h = (~mask[:, :, 0]).sum(1)[:, None, None]
        valid_w = (~mask[:, 0, :]).sum(1)[:, None, None]
        rows = (torch.arange(height, device=mask.device) + 0.5)[:, None] / valid_h
        columns = (torch.arange(width, device=mask.device) + 0.5)[None, :] / valid_w
        side = torch.full_like(columns, 0.05 * 2.0**level).expand(-1, height, -1)
        boxes.append(torch.stack((columns.expand_as(side), rows.expand_as(side), side, side), dim=-1).flatten(1, 2))
    cxcywh = torch.cat(boxes, dim=1)
    padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
    usable = ((cxcywh > 0.01) & (cxcywh < 0.99)).all(-1) & ~padding
    return torch.logit(cxcywh).masked_fill(~usable[..., None], torch.inf), usable
