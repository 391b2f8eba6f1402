"""The transformer of Deformable DETR: feature maps of several levels in, query states and boxes of every layer out.

Source: Deformable DETR (arXiv 2010.04159), numerics and names of specs/detectors.md A4 to A7.
Letters: B images, C channels, L levels, S cells of all levels together, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simdetr.detectors.deformable_attention import MSDeformAttn
from simdetr.detectors.deformable_layers import DeformableDecoderLayer, DeformableEncoderLayer, Memory
from simdetr.detectors.encoder_proposals import Proposals, cell_boxes
from simdetr.detectors.position_encoding import sine_box_positions


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


def inverse_sigmoid(values: Tensor) -> Tensor:
    """Logit with both the value and its complement kept at 1e-5 or more; any shape."""
    values = values.clamp(0.0, 1.0)
    return torch.log(values.clamp(min=1e-5) / (1.0 - values).clamp(min=1e-5))


def cell_references(shapes: Sequence[tuple[int, int]], valid_ratios: Tensor) -> Tensor:
    """Where every cell lies on every level, in fractions of the padded maps.

    Args:
        shapes: (height, width) of each level.
        valid_ratios: [B, L, 2], width then height.

    Returns:
        [B, S, L, 2].
    """
    centres = []
    for level, (height, width) in enumerate(shapes):
        ys = (torch.arange(height, device=valid_ratios.device) + 0.5) / height
        xs = (torch.arange(width, device=valid_ratios.device) + 0.5) / width
        grid = torch.stack((xs.expand(height, -1), ys[:, None].expand(-1, width)), dim=-1)
        centres.append(rearrange(grid, "h w xy -> 1 (h w) xy") / valid_ratios[:, None, level])
    return torch.cat(centres, dim=1)[:, :, None] * valid_ratios[:, None]


def run_layer(layer: nn.Module, *inputs: object, again: bool) -> Tensor:
    """A layer's output; with ``again`` its activations are not kept but computed again in the backward pass."""
    output: Tensor
    if again and layer.training and torch.is_grad_enabled():
        output = checkpoint(layer, *inputs, use_reentrant=False)
    else:
        output = layer(*inputs)
    return output


class DeformableEncoder(nn.Module):
    """Layers that refine the cells of all levels.

    Args:
        layers: the layers, in order.

    Attributes:
        activation_checkpointing: compute the layers' activations again in the backward pass instead of keeping them.
    """

    def __init__(self, layers: Iterable[DeformableEncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activation_checkpointing = False

    def forward(self, memory: Memory, positions: Tensor) -> Memory:
        """Memory with refined tokens; positions [B or 1, S, C]."""
        references = cell_references(memory.shapes, memory.valid_ratios)
        for layer in self.layers:
            tokens = run_layer(layer, memory, positions, references, again=self.activation_checkpointing)
            memory = memory._replace(tokens=tokens)
        return memory


class DeformableDecoder(nn.Module):
    """Layers that turn queries into states and boxes.

    Args:
        layers: the layers, in order.
        refine: let each layer start from the boxes of the one before (iterative box refinement).

    Attributes:
        activation_checkpointing: compute the layers' activations again in the backward pass instead of keeping them.
    """

    def __init__(self, layers: Iterable[DeformableDecoderLayer], refine: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.refine = refine
        self.activation_checkpointing = False

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
            target = run_layer(layer, target, query, places, memory, again=self.activation_checkpointing)
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
        dim: C, a multiple of 4.
        num_heads: attention heads.
        num_encoder_layers: layers of the encoder.
        num_decoder_layers: layers of the decoder.
        ffn_dim: width of the perceptrons.
        dropout: probability of dropout.
        num_levels: L.
        num_points: points per head and level.
        refine: iterative box refinement.
        num_proposals: how many cells of the encoder's output become queries (two-stage); None for learned queries.
        exclude_invalid: never choose padding or border cells; the original lets them compete with one constant score.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        ffn_dim: int,
        dropout: float,
        num_levels: int,
        num_points: int,
        refine: bool,
        num_proposals: int | None,
        exclude_invalid: bool,
    ) -> None:
        super().__init__()
        sizes = (dim, ffn_dim, dropout, num_levels, num_heads, num_points)
        self.num_proposals, self.exclude_invalid = num_proposals, exclude_invalid
        self.encoder = DeformableEncoder(DeformableEncoderLayer(*sizes) for _ in range(num_encoder_layers))
        self.decoder = DeformableDecoder((DeformableDecoderLayer(*sizes) for _ in range(num_decoder_layers)), refine)
        self.level_embed = nn.Parameter(torch.empty(num_levels, dim))
        if num_proposals is not None:
            self.enc_output = nn.Linear(dim, dim)
            self.enc_output_norm = nn.LayerNorm(dim)
            self.pos_trans = nn.Linear(dim * 2, dim * 2)
            self.pos_trans_norm = nn.LayerNorm(dim * 2)
        else:
            self.reference_points = nn.Linear(dim, 2)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Initialise as the original does (A7)."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)
        if self.num_proposals is None:
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
        memory = self.encoder(*self._flatten(maps, masks, positions))
        batch = memory.tokens.shape[0]
        if self.num_proposals is not None:
            assert object_head is not None, "the two-stage variant chooses by objectness"
            chosen = self._propose(memory, [mask.expand(batch, -1, -1) for mask in masks], object_head, box_heads[-1])
            states, boxes = self.decoder(chosen.target, chosen.query, chosen.reference, memory, box_heads)
            return TransformerOutput(states, boxes, chosen.logits, chosen.boxes, chosen.reference)
        assert query_embed is not None, "learned queries need an embedding"
        query, target = query_embed[None].expand(batch, -1, -1).chunk(2, dim=-1)
        reference = self.reference_points(query).float().sigmoid()
        states, boxes = self.decoder(target, query, reference, memory, box_heads)
        return TransformerOutput(states, boxes, None, None, reference)

    def _flatten(
        self, maps: Sequence[Tensor], masks: Sequence[Tensor], positions: Sequence[Tensor]
    ) -> tuple[Memory, Tensor]:
        """Concatenate the cells of all levels; positions get the embedding of their level."""
        tokens = torch.cat([rearrange(cells, "b c h w -> b (h w) c") for cells in maps], dim=1)
        placed = [
            rearrange(cells, "b c h w -> b (h w) c") + embedding
            for cells, embedding in zip(positions, self.level_embed, strict=True)
        ]
        ratios = [torch.stack(((~m[:, 0]).float().mean(1), (~m[:, :, 0]).float().mean(1)), dim=-1) for m in masks]
        padded = masks[0].shape[0] == tokens.shape[0]
        padding = torch.cat([mask.flatten(1) for mask in masks], dim=1) if padded else None
        shapes = [(cells.shape[2], cells.shape[3]) for cells in maps]
        return Memory(tokens, shapes, torch.stack(ratios, dim=1), padding), torch.cat(placed, dim=1)

    def _propose(
        self, memory: Memory, masks: Sequence[Tensor], object_head: nn.Module, box_head: nn.Module
    ) -> Proposals:
        """Score all cells with the encoder's heads and turn the best into queries (section 4.2)."""
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
        return Proposals(query, target, reference, logits, box_logits.sigmoid())
