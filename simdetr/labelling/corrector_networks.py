"""Feature maps and boxes in, better boxes out: the networks that correct boxes, whatever is in them.

``BoxCorrector`` reads the maps inside each box and moves the box three times (a cascade of RoI heads without classes);
``QueryCorrector`` makes each box a query of three deformable decoder layers, and may begin as the decoder of a detector
that moves boxes already. Both see no class, give no score and drop no box. The maps come from ``LevelReader``.

Sources: the correction of Label, Verify, Correct (Kaul et al., arXiv 2112.05749, section 3.3) after Cascade R-CNN (Cai
and Vasconcelos, arXiv 1712.00726); deformable decoder layers of Deformable DETR (arXiv 2010.04159).
Letters: B images, R boxes of all images of a batch, T true boxes of one image, D width of the maps that are read.
Boxes are xyxy in pixels of the network's input; those of the padding do not count.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, roi_align

from simdetr.boxes import cxcywh_to_xyxy, pairwise_iou, xyxy_to_cxcywh
from simdetr.detectors.backbone import Backbone, pad_to_multiple, resize_mask
from simdetr.detectors.deformable_detr import DeformableDETR, box_head
from simdetr.detectors.deformable_transformer import (
    DeformableDecoder,
    DeformableDecoderLayer,
    LayerSizes,
    Memory,
    flatten_maps,
    initialise,
)
from simdetr.detectors.detector import Detector, Level, QueryDetector
from simdetr.detectors.position_encoding import sine_box_positions

ROI_CELLS = 7
DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
MATCH_IOUS = (0.3, 0.5, 0.7)
"""Least overlap with a true box from which a stage learns."""
_LARGEST_LOG_SCALE = math.log(1000 / 16)
_CANONICAL_SIDE_PX, _CANONICAL_STRIDE = 224, 16  # of feature pyramid networks (arXiv 1612.03144, equation 1)
_SAMPLES_PER_BIN = 2
_EXACT_EVERY = 4
_L1_WEIGHT, _GIOU_WEIGHT = 5.0, 2.0  # of the published DETR


class LevelReader(nn.Module):
    """Feature maps of a trained detector or backbone, without gradient.

    Of a Deformable DETR they are what its encoder makes of the backbone's maps, for that has learned where objects end;
    of a ViDT the maps that its decoder reads; of a backbone, also one with a head, its own.

    Args:
        network: The detector or backbone; set to evaluation mode.

    Attributes:
        channels: C of each map, fine to coarse.
        strides: Input pixels per cell of each map.

    Raises:
        ValueError: a detector of another library, whose maps are not to be had.
    """

    def __init__(self, network: Detector | Backbone) -> None:
        super().__init__()
        core = network.core if isinstance(network, Detector) else network
        if isinstance(core, QueryDetector):
            self.channels, self.strides = core.feature_sizes.level_channels, core.feature_sizes.level_strides
        else:
            own = core if isinstance(core, Backbone) else getattr(core, "backbone", None)
            if not isinstance(own, Backbone):
                raise ValueError(
                    f"features: {type(network).__name__} gives no feature maps; take a Deformable DETR, a ViDT, or a "
                    "simdetr.detectors.Backbone on its own"
                )
            core, self.channels, self.strides = own, tuple(own.channels), tuple(own.strides)
        self.network: QueryDetector | Backbone = core
        self.eval()

    def train(self, mode: bool = True) -> LevelReader:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, mask: Tensor) -> list[Level]:
        """The maps of normalised images [B, 3, H, W], padded where ``mask`` [B, H, W] is True."""
        if isinstance(self.network, DeformableDETR):
            return self._encoded(self.network, images, mask)
        if isinstance(self.network, QueryDetector):
            return self.network.decoded(images, mask)[1].levels
        images, mask = pad_to_multiple(images, mask, self.network.pad_multiple)
        mask = mask.expand(images.shape[0], -1, -1)
        maps = self.network(images)
        shapes = [(features.shape[2], features.shape[3]) for features in maps]
        levels = zip(maps, self.strides, shapes, strict=True)
        return [Level(features, stride, resize_mask(mask, shape)) for features, stride, shape in levels]

    def _encoded(self, detector: DeformableDETR, images: Tensor, mask: Tensor) -> list[Level]:
        kept: list[Memory] = []
        hook = detector.transformer.encoder.register_forward_hook(lambda _, __, output: kept.append(output))
        try:
            levels = detector.decoded(images, mask)[1].levels
        finally:
            hook.remove()
        (memory,) = kept
        parts = memory.tokens.split_with_sizes([height * width for height, width in memory.shapes], dim=1)
        maps = [
            rearrange(part, "b (h w) c -> b c h w", h=height)
            for part, (height, _) in zip(parts, memory.shapes, strict=True)
        ]
        return [level._replace(features=features) for level, features in zip(levels, maps, strict=True)]


class Boxes(NamedTuple):
    """Boxes of a batch of images."""

    xyxy: Tensor
    """float32 [R, 4] in pixels of the network's input."""
    image: Tensor
    """int64 [R], the row of each box's image in the batch."""
    sizes_hw: Tensor
    """int64 [B, 2], height and width of each image without its padding."""

    def clipped(self, boxes_xyxy: Tensor) -> Tensor:
        """Other boxes [R, 4] of the same images, cut to them."""
        limits = self.sizes_hw.flip(1).to(boxes_xyxy)[self.image]
        return torch.minimum(boxes_xyxy.clamp(min=0), limits.repeat(1, 2))


class Corrector(nn.Module, ABC):
    """A network that moves boxes in stages.

    Attributes:
        init_args: Options, plain JSON types; with the maps' channels they rebuild it.
    """

    init_args: dict[str, Any]
    strides: tuple[int, ...]

    @abstractmethod
    def forward(self, levels: Sequence[Level], boxes: Boxes) -> list[Tensor]:
        """Boxes [R, 4] after each stage, not cut to the images; a stage starts from the one before, gradient-free."""

    judge: nn.Module
    """Reads pooled features [R, D, 7, 7] and gives the logit [R, 1] of the box's overlap with its object."""

    def learnt_parameters(self) -> list[nn.Parameter]:
        """Those that come from another training, and should change less than the new ones."""
        return []

    @abstractmethod
    def maps(self, levels: Sequence[Level]) -> list[Tensor]:
        """The maps [B, D, h, w] that boxes are read from."""

    def overlap_logits(self, levels: Sequence[Level], boxes: Boxes) -> Tensor:
        """Logits [R] of the overlap that each box is thought to have with its object."""
        read = pooled(self.maps(levels), self.strides, boxes.xyxy, boxes.image)
        logits: Tensor = self.judge(read)[:, 0].float()
        return logits

    @abstractmethod
    def box_loss(self, found: Tensor, wanted: Tensor, sizes_wh: Tensor) -> Tensor:
        """Mean loss of boxes [N, 4] in pixels that should be others, on images of [N, 2] pixels."""

    def losses(self, levels: Sequence[Level], boxes: Boxes, truth: Sequence[Tensor]) -> dict[str, Tensor]:
        """Losses of a batch: each stage learns from the boxes that overlap a true one enough when they reach it.

        Args:
            levels: maps of the images.
            boxes: to be corrected.
            truth: true boxes [T, 4] of each image, in pixels of the input.

        Returns:
            ``loss``, the sum, and ``stage1``, ``stage2`` ...; 0, and part of the graph, where no box matches.
        """
        outputs = self(levels, boxes)
        starts = [boxes.xyxy, *(boxes.clipped(found.detach()) for found in outputs[:-1])]
        terms = {}
        for number, (start, found, least) in enumerate(zip(starts, outputs, MATCH_IOUS, strict=True), 1):
            wanted, overlap = best_matches(start, boxes.image, truth)
            chosen = overlap >= least
            sizes_wh = boxes.sizes_hw.flip(1).to(found)[boxes.image[chosen]]
            loss = found.sum() * 0.0
            if chosen.any():
                loss = self.box_loss(found[chosen], wanted[chosen], sizes_wh)
            terms[f"stage{number}"] = loss
        terms["judge"] = self._judge_loss(levels, boxes, boxes.clipped(outputs[-1].detach()), truth)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def _judge_loss(self, levels: Sequence[Level], boxes: Boxes, after_xyxy: Tensor, truth: Sequence[Tensor]) -> Tensor:
        """Cross-entropy of the judged overlaps of the boxes before, after, and of as many true ones."""
        known = torch.tensor([len(own) > 0 for own in truth], device=boxes.image.device)[boxes.image]
        both = torch.cat([boxes.xyxy[known], after_xyxy[known]])
        image = boxes.image[known].repeat(2)
        wanted, overlap = best_matches(both, image, truth)
        exact = torch.arange(len(image), device=image.device)[::_EXACT_EVERY]
        judged = Boxes(torch.cat([both, wanted[exact]]), torch.cat([image, image[exact]]), boxes.sizes_hw)
        target = torch.cat([overlap, torch.ones_like(overlap[exact])])
        logits = self.overlap_logits(levels, judged)
        if not len(logits):
            return logits.sum()
        return F.binary_cross_entropy_with_logits(logits, target)


def best_matches(boxes_xyxy: Tensor, image: Tensor, truth: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The true box [R, 4] of its image that each box overlaps most, and the IoU [R]; 0 where the image has none."""
    wanted, overlap = torch.zeros_like(boxes_xyxy), boxes_xyxy.new_zeros(len(boxes_xyxy))
    for row, own in enumerate(truth):
        rows = torch.nonzero(image == row)[:, 0]
        if len(own) and len(rows):
            best = pairwise_iou(boxes_xyxy[rows], own).max(dim=1)
            wanted[rows], overlap[rows] = own[best.indices], best.values
    return wanted, overlap


# ----------------------------------------------------------------------------------------------------------------------
# Cascade of RoI heads.


def pooled(levels: Sequence[Tensor], strides: Sequence[int], boxes_xyxy: Tensor, image: Tensor) -> Tensor:
    """What the maps have inside boxes, each read from the map that suits its size.

    A box of 224 px is read at stride 16, one of twice the side at twice the stride (arXiv 1612.03144, equation 1).

    Args:
        levels: maps [B, D, h, w], fine to coarse.
        strides: pixels per cell of each.
        boxes_xyxy: [R, 4] in pixels.
        image: int64 [R], each box's image.

    Returns:
        [R, D, 7, 7].
    """
    sides = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clamp(min=0).prod(dim=1).sqrt()
    suited = torch.log2(sides / _CANONICAL_SIDE_PX * _CANONICAL_STRIDE + 1e-6).floor()
    logs = torch.tensor(strides, device=sides.device).log2()
    choice = (torch.bucketize(suited, logs, right=True) - 1).clamp(min=0)
    rois = torch.cat([image[:, None].to(boxes_xyxy), boxes_xyxy], dim=1)
    found = levels[0].new_zeros(len(rois), levels[0].shape[1], ROI_CELLS, ROI_CELLS)
    for index, (features, stride) in enumerate(zip(levels, strides, strict=True)):
        rows = torch.nonzero(choice == index)[:, 0]
        if len(rows):
            scale = 1.0 / stride
            found[rows] = roi_align(features, rois[rows], ROI_CELLS, scale, _SAMPLES_PER_BIN, aligned=True)
    return found


def moved(boxes_xyxy: Tensor, deltas: Tensor) -> Tensor:
    """Boxes whose centre moves by (dx, dy) of their sides and whose sides grow by exp(dw), exp(dh).

    Written so that deltas of 0 give the very same numbers. Shapes [R, 4] and [R, 4] to [R, 4].
    """
    low, high = boxes_xyxy.chunk(2, dim=1)
    sides = high - low
    shift = sides * deltas[:, :2]
    growth = 0.5 * sides * torch.expm1(deltas[:, 2:].clamp(max=_LARGEST_LOG_SCALE))
    return torch.cat([low + shift - growth, high + shift + growth], dim=1)


def unpadded(levels: Sequence[Level]) -> list[Tensor]:
    """The maps [B, C, h, w] in float32, 0 in the padding: nothing depends on what was stored there."""
    return [level.features.float().masked_fill(level.mask[:, None], 0.0) for level in levels]


class LevelProjection(nn.Module):
    """Maps of several widths to maps of one width D; padding reads 0.

    Args:
        channels: of each map.
        dim: D.
    """

    def __init__(self, channels: Sequence[int], dim: int) -> None:
        super().__init__()
        # normalised cell by cell: the statistics of a whole map would depend on the padding
        self.projections = nn.ModuleList(
            nn.Sequential(LayerNorm2d(width), nn.Conv2d(width, dim, 1), LayerNorm2d(dim)) for width in channels
        )

    def forward(self, levels: Sequence[Level]) -> list[Tensor]:
        """Maps [B, D, h, w], fine to coarse."""
        projected = zip(self.projections, unpadded(levels), levels, strict=True)
        return [project(values).masked_fill(level.mask[:, None], 0.0) for project, values, level in projected]


class _ScaledGradient(torch.autograd.Function):
    """The same values; their gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:  # noqa: ANN401
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return gradients[0] * ctx.factor, None


class BoxCorrector(Corrector):
    """Cascade: three times, read the maps inside each box and move it.

    Each stage has three layers of ``width`` and its own output of four numbers, divided by (10, 10, 5, 5) times the
    stage's number; its loss is the mean of 1 - GIoU. The published width is 1024.

    Args:
        channels: C of each map.
        strides: pixels per cell of each map.
        width: neurons of each layer.
        dim: D.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        width: int = 256,
        dim: int = 64,
    ) -> None:
        super().__init__()
        if width < 1 or dim < 1:
            raise ValueError(f"width and dim: expected at least 1, got {width} and {dim}")
        self.init_args = {"width": width, "dim": dim}
        self.strides = tuple(strides)
        self.projection = LevelProjection(channels, dim)
        self.stages = nn.ModuleList(_stage(dim * ROI_CELLS**2, width, 4) for _ in MATCH_IOUS)
        self.judge = _stage(dim * ROI_CELLS**2, width, 1)
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor(DELTA_WEIGHTS), persistent=False)

    def maps(self, levels: Sequence[Level]) -> list[Tensor]:
        """The maps, projected."""
        projected: list[Tensor] = self.projection(levels)
        return projected

    def forward(self, levels: Sequence[Level], boxes: Boxes) -> list[Tensor]:
        """Boxes [R, 4] after each stage."""
        maps = self.maps(levels)
        current, outputs = boxes.xyxy, []
        for number, stage in enumerate(self.stages, 1):
            read = pooled(maps, self.strides, current, boxes.image)
            read = _ScaledGradient.apply(read, 1 / len(self.stages))
            outputs.append(moved(current, stage(read).float() / (self.weights * number)))
            current = boxes.clipped(outputs[-1].detach())
        return outputs

    def box_loss(self, found: Tensor, wanted: Tensor, sizes_wh: Tensor) -> Tensor:
        """Mean of 1 - GIoU."""
        loss: Tensor = generalized_box_iou_loss(found, wanted, reduction="mean")
        return loss


def _stage(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Three layers and an output that starts at 0."""
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    sizes = (inputs, width, width, width)
    hidden = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, last)


# ----------------------------------------------------------------------------------------------------------------------
# Boxes as queries.


class QueryCorrector(Corrector):
    """Each box is a query of three deformable decoder layers; queries do not see each other.

    A query's content and position are made of its box, as a two-stage detector makes them of its proposals; to the
    content comes what the maps have inside the box. Each layer's loss is that of DETR's boxes, 5 · L1 + 2 · (1 - GIoU),
    of the boxes as fractions of the image.

    Args:
        channels: C of each map.
        strides: pixels per cell of each map.
        dim: D, a multiple of 8; maps of this width are read as they are.
        ffn_dim: width of the layers' perceptrons.
        num_heads: attention heads.
        num_points: points that a head reads per map.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        dim: int = 128,
        ffn_dim: int = 256,
        num_heads: int = 8,
        num_points: int = 4,
    ) -> None:
        super().__init__()
        if dim < 1 or dim % 8 or dim % num_heads:
            raise ValueError(f"dim: expected a multiple of 8 and of num_heads={num_heads}, got {dim}")
        self.init_args = {"dim": dim, "ffn_dim": ffn_dim, "num_heads": num_heads, "num_points": num_points}
        self.strides = tuple(strides)
        self.projection = None if set(channels) == {dim} else LevelProjection(channels, dim)
        sizes = LayerSizes(dim, ffn_dim, 0.0, len(channels), num_heads, num_points)
        self.decoder = DeformableDecoder((_LoneDecoderLayer(sizes) for _ in MATCH_IOUS), refine=True)
        self.pos_trans, self.pos_trans_norm = nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim)
        initialise(self.decoder)
        self.content = nn.Sequential(nn.Flatten(), nn.Linear(dim * ROI_CELLS**2, dim))
        self.heads = nn.ModuleList(box_head(dim) for _ in MATCH_IOUS)
        self.judge = _stage(dim * ROI_CELLS**2, 2 * dim, 1)
        self._begun = False

    def start_from(self, detector: DeformableDETR) -> None:
        """Take over the first three layers of a two-stage detector's decoder, and how it makes queries of boxes.

        What the maps have inside the box counts nothing at first: the corrector begins as that decoder.
        """
        theirs = detector.transformer
        for own, layer in zip(self.decoder.layers, theirs.decoder.layers, strict=False):
            own.load_state_dict(layer.state_dict())
        for own, head in zip(self.heads, detector.bbox_embed, strict=False):
            own.load_state_dict(head.state_dict())
        self.pos_trans.load_state_dict(theirs.pos_trans.state_dict())
        self.pos_trans_norm.load_state_dict(theirs.pos_trans_norm.state_dict())
        for parameter in self.content.parameters():
            nn.init.zeros_(parameter)
        self._begun = True

    def learnt_parameters(self) -> list[nn.Parameter]:
        """The decoder, its heads and what makes queries of boxes, if they were taken over."""
        taken = (self.decoder, self.heads, self.pos_trans, self.pos_trans_norm) if self._begun else ()
        return [parameter for part in taken for parameter in part.parameters()]

    def maps(self, levels: Sequence[Level]) -> list[Tensor]:
        """The maps, projected unless they are of the queries' width."""
        return unpadded(levels) if self.projection is None else self.projection(levels)

    def forward(self, levels: Sequence[Level], boxes: Boxes) -> list[Tensor]:
        """Boxes [R, 4] after each layer."""
        maps = self.maps(levels)
        sizes = boxes.sizes_hw.flip(1).to(boxes.xyxy).repeat(1, 2)[boxes.image]
        reference = xyxy_to_cxcywh(boxes.xyxy) / sizes
        embedding = sine_box_positions(reference, maps[0].shape[1] // 2)
        place, target = self.pos_trans_norm(self.pos_trans(embedding)).chunk(2, dim=-1)
        target = target + self.content(pooled(maps, self.strides, boxes.xyxy, boxes.image))
        row, column, most = _places(boxes.image, len(boxes.sizes_hw))

        def spread(values: Tensor, fill: float) -> Tensor:
            """[R, N] to [B, most, N]: the boxes of each image in a row."""
            table = values.new_full((len(boxes.sizes_hw), most, values.shape[1]), fill)
            return table.index_put((row, column), values)

        memory = flatten_maps(maps, [level.mask for level in levels])
        found = self.decoder(spread(target, 0.0), spread(place, 0.0), spread(reference, 0.5), memory, self.heads)[1]
        return [cxcywh_to_xyxy(layer[row, column]) * sizes for layer in found]

    def box_loss(self, found: Tensor, wanted: Tensor, sizes_wh: Tensor) -> Tensor:
        """Mean of 5 · L1 + 2 · (1 - GIoU)."""
        sizes = sizes_wh.repeat(1, 2)
        far = F.l1_loss(xyxy_to_cxcywh(found) / sizes, xyxy_to_cxcywh(wanted) / sizes, reduction="none").sum(1).mean()
        apart: Tensor = generalized_box_iou_loss(found, wanted, reduction="mean")
        return _L1_WEIGHT * far + _GIOU_WEIGHT * apart


def _places(image: Tensor, images: int) -> tuple[Tensor, Tensor, int]:
    """Row and column of each box in a table with a row per image, and its number of columns."""
    counts = torch.bincount(image, minlength=images)
    order = torch.argsort(image, stable=True)
    column = torch.empty_like(image)
    starts = (counts.cumsum(0) - counts)[image[order]]
    column[order] = torch.arange(len(image), device=image.device) - starts
    return image, column, max(1, int(counts.max()))


class _LoneDecoderLayer(DeformableDecoderLayer):
    """A decoder layer whose queries attend to themselves alone, so that no candidate depends on the others."""

    def forward(self, target: Tensor, query: Tensor, references: Tensor, memory: Memory) -> Tensor:
        """New states [B, Q, D]; query positions [B, Q, D], references [B, Q, L, 4] on the padded maps."""
        # the softmax over one key is 1: what is left of the attention are two linear maps
        dim, attention = target.shape[-1], self.self_attn
        own = F.linear(target, attention.in_proj_weight[2 * dim :], attention.in_proj_bias[2 * dim :])
        target = self.norm2(target + attention.out_proj(own))
        attended = self.cross_attn(target + query, references, memory.tokens, memory.shapes, memory.padding)
        target = self.norm1(target + attended)
        normed: Tensor = self.norm3(target + self.linear2(self.linear1(target).relu_()))
        return normed


Kind = Literal["cascade", "queries"]
_KINDS: dict[str, type[BoxCorrector | QueryCorrector]] = {"cascade": BoxCorrector, "queries": QueryCorrector}


def decoder_to_start_from(reader: LevelReader) -> DeformableDETR | None:
    """The detector whose decoder can be a corrector's start: one of two stages and at least three layers."""
    network = reader.network
    if not isinstance(network, DeformableDETR):
        return None
    given = network.init_args
    fits = given["two_stage"] and given["num_decoder_layers"] >= len(MATCH_IOUS) and given["hidden_dim"] % 8 == 0
    return network if fits else None


def sizes_of_decoder(detector: DeformableDETR) -> dict[str, Any]:
    """Options of a `QueryCorrector` that can start from this detector."""
    names = {"dim": "hidden_dim", "ffn_dim": "ffn_dim", "num_heads": "num_heads", "num_points": "num_points"}
    return {own: detector.init_args[theirs] for own, theirs in names.items()}


def build_corrector(kind: Kind, reader: LevelReader, options: dict[str, Any]) -> Corrector:
    """A corrector for the maps of a reader.

    Raises:
        ValueError: an unknown kind, options that it does not have.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {', '.join(map(repr, get_args(Kind)))}, got {kind!r}")
    try:
        return _KINDS[kind](reader.channels, reader.strides, **options)
    except TypeError as error:
        raise ValueError(f"options: {error}; see simdetr.labelling.correction.{_KINDS[kind].__name__}") from error
