"""Deformable DETR: images [B, 3, H, W] and their padding mask in, class logits and boxes of every query out.

Source: Deformable DETR (arXiv 2010.04159); numerics, initialisation and parameter names of the published code, so that
its checkpoints and those of transformers can be read. Base, iterative box refinement, two-stage, single-scale and
dilated variants.
Letters: B images, Q queries, K classes, C channels, L levels, S cells of all levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from simdetr.detectors.backbone import Backbone, pad_to_multiple, resize_mask
from simdetr.detectors.deformable_transformer import DeformableTransformer, LayerSizes, TransformerOutput
from simdetr.detectors.detector import (
    DetectorOutput,
    Features,
    FeatureSizes,
    Level,
    Neck,
    Prediction,
    QueryDetector,
    levels_of,
    queries_of,
)
from simdetr.detectors.losses import DetectionLoss
from simdetr.detectors.matcher import Target
from simdetr.detectors.position_encoding import LearnedEncoding, SineEncoding


class Perceptron(nn.Module):
    """Linear layers with ReLU between them, C wide all but the last; names are the original's.

    Args:
        dim: C, of the input.
        out_dim: width of the output.
        depth: number of layers.
        start: what every output [out_dim] is at the start, whatever the input; None leaves that to chance.
    """

    def __init__(self, dim: int, out_dim: int, depth: int = 3, start: Tensor | None = None) -> None:
        super().__init__()
        last = nn.Linear(dim, out_dim)
        if start is not None:
            nn.init.zeros_(last.weight)
            with torch.no_grad():
                last.bias.copy_(start)
        self.layers = nn.ModuleList([*(nn.Linear(dim, dim) for _ in range(depth - 1)), last])

    def forward(self, states: Tensor) -> Tensor:
        """[..., C] to [..., out_dim]."""
        for layer in self.layers[:-1]:
            states = layer(states).relu_()
        out: Tensor = self.layers[-1](states)
        return out


def box_head(dim: int, size_bias: float = 0.0) -> Perceptron:
    """From a query state (C) to offsets of box logits, which start at 0, those of width and height at ``size_bias``."""
    return Perceptron(dim, 4, start=torch.tensor([0.0, 0.0, size_bias, size_bias]))


class DeformableDETR(QueryDetector):
    """Deformable DETR on a timm backbone.

    Args:
        num_classes: K. Classes are numbered from 0; there is no class for background.
        backbone: timm name of the feature network.
        pretrained_backbone: load timm's pretrained weights into it.
        hidden_dim: C, width of the transformer; a multiple of 4 and of ``num_heads``.
        num_heads: attention heads.
        num_encoder_layers: layers of the encoder.
        num_decoder_layers: layers of the decoder, each with its own prediction.
        ffn_dim: width of the perceptrons in the layers.
        dropout: probability of dropout in the transformer.
        num_queries: Q, most objects that can be found in one image.
        num_feature_levels: L; 1 uses the coarsest map only, 3 those of strides 8, 16 and 32; more add halved ones.
        num_points: points that a head reads per level.
        with_box_refine: each decoder layer corrects the boxes of the one before.
        two_stage: queries are the encoder's best proposals instead of learned ones; needs ``with_box_refine``. Which
            are best is one class-free logit per cell, so that it stays what it is when the classes change.
        objectness: give every query one class-free logit o, *whether* something is there, beside those that say
            *what*: the logit of class k is o + c_k. It is learned from the scores of boxes (``pred_objectness``), ranks
            boxes in relabelling and stays when the classes change. Adding it to a class head's weights gives a plain
            detector.
        exclude_invalid_proposals: two-stage: no padding or border cell becomes a query. The original lets them.
        dilation: keep the backbone's last stage at stride 16 (DC5).
        position_encoding: fixed sine waves or learned rows and columns.
        frozen_batch_norm: fix the backbone's batch norm; set False to train a batch-norm backbone from random weights.
        freeze_stem: fix the backbone before its stage of stride 8; set False to train it from random weights.
        freeze_backbone: fix the whole backbone.
        class_prior: probability of every class at the start, which sets the bias of the class heads.
        activation_checkpointing: keep no activations of layers and of the backbone's stages for the backward pass, but
            compute them again: much less memory for about a third more time.

    Raises:
        ValueError: sizes that do not fit together, or an unsuitable backbone.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained_backbone: bool = False,
        hidden_dim: int = 256,
        num_heads: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
        num_queries: int = 300,
        num_feature_levels: int = 4,
        num_points: int = 4,
        with_box_refine: bool = False,
        two_stage: bool = False,
        objectness: bool = False,
        exclude_invalid_proposals: bool = False,
        dilation: bool = False,
        position_encoding: Literal["sine", "learned"] = "sine",
        frozen_batch_norm: bool = True,
        freeze_stem: bool = True,
        freeze_backbone: bool = False,
        class_prior: float = 0.01,
        activation_checkpointing: bool = False,
    ) -> None:
        # what rebuilds this detector; kept beside its weights
        self.init_args = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        check_sizes(num_classes, hidden_dim, num_heads, num_decoder_layers, num_queries)
        if num_feature_levels != 1 and num_feature_levels < 3:
            raise ValueError(
                f"num_feature_levels must be 1 (coarsest map only) or at least 3, got {num_feature_levels}"
            )
        if two_stage and not with_box_refine:
            raise ValueError("two_stage=True needs with_box_refine=True; set both or neither")
        self.num_classes = num_classes
        self.criterion = DetectionLoss()
        self.backbone = Backbone(
            backbone,
            num_maps=1 if num_feature_levels == 1 else 3,
            output_stride=16 if dilation else 32,
            frozen_batch_norm=frozen_batch_norm,
            freeze_stem=freeze_stem,
            freeze_all=freeze_backbone,
            pretrained=pretrained_backbone,
            pyramid_channels=hidden_dim,
        )
        self.input_proj = _input_projections(self.backbone.channels, num_feature_levels, hidden_dim)
        self.position_encoding = (SineEncoding if position_encoding == "sine" else LearnedEncoding)(hidden_dim)
        self.transformer = DeformableTransformer(
            LayerSizes(hidden_dim, ffn_dim, dropout, num_feature_levels, num_heads, num_points),
            num_encoder_layers,
            num_decoder_layers,
            refine=with_box_refine,
            num_proposals=num_queries if two_stage else None,
            exclude_invalid=exclude_invalid_proposals,
        )
        self.query_embed = None if two_stage else nn.Embedding(num_queries, hidden_dim * 2)
        self._add_heads(hidden_dim, num_decoder_layers, with_box_refine, two_stage, objectness, class_prior)
        if activation_checkpointing:
            self.backbone.checkpoint_activations()
            self.transformer.encoder.activation_checkpointing = True
            self.transformer.decoder.activation_checkpointing = True

    def _add_heads(
        self, dim: int, num_layers: int, refine: bool, two_stage: bool, objectness: bool, class_prior: float
    ) -> None:
        """Class and box heads with the original's initialisation and names; the encoder's, if any, are the last."""
        count = num_layers + 1 if two_stage else num_layers
        distinct = range(count if refine else 1)
        widths = [1 if two_stage and layer == num_layers else self.num_classes for layer in distinct]
        class_heads = [nn.Linear(dim, width) for width in widths]
        # boxes start at sigmoid(-2) = 0.12 of the image; proposals of the encoder bring their own size
        box_heads = [box_head(dim, -2.0 if layer == 0 and not two_stage else 0.0) for layer in distinct]
        absent = -math.log((1 - class_prior) / class_prior)
        for layer, head in enumerate(class_heads):
            # with objectness, which brings the prior, each class is one of many
            spread = objectness and layer < num_layers
            nn.init.constant_(head.bias, -math.log(self.num_classes) if spread else absent)
        self.object_embed: nn.ModuleList | None = None
        if objectness:
            object_heads = [nn.Linear(dim, 1) for _ in range(num_layers if refine else 1)]
            for head in object_heads:
                nn.init.constant_(head.bias, absent)
            self.object_embed = one_per_layer(object_heads, num_layers)
        self.class_embed, self.bbox_embed = one_per_layer(class_heads, count), one_per_layer(box_heads, count)
        # the original registers the heads again where the decoder uses them, and its checkpoints have both names
        if refine:
            self.transformer.decoder.bbox_embed = self.bbox_embed
        if two_stage:
            self.transformer.decoder.class_embed = self.class_embed

    def forward(self, images: Tensor, mask: Tensor | None = None) -> DetectorOutput:
        """Detect; arguments as in ``Detector``.

        Returns:
            Predictions of the last layer, of the earlier ones and, in the two-stage variant, of the encoder.
        """
        return self.predictions(self.decode(images, mask)[0])

    def decoded(
        self, images: Tensor, mask: Tensor | None = None, neck: Neck | None = None
    ) -> tuple[DetectorOutput, Features]:
        """As ``forward``, with the projected maps and the queries; arguments as in ``QueryDetector``."""
        out, levels, taps = self.decode(images, mask, neck)
        outputs = self.predictions(out)
        logits = [layer["pred_logits"] for layer in (*outputs["aux_outputs"], outputs)]
        queries = queries_of(out.states, out.boxes, logits, out.start, self.transformer.decoder.refine)
        return outputs, Features(levels, queries, taps)

    @property
    def feature_sizes(self) -> FeatureSizes:
        """Sizes of what ``decoded`` gives."""
        dim, count = self.transformer.level_embed.shape[1], len(self.input_proj)
        layers = len(self.transformer.decoder.layers)
        return FeatureSizes(self.num_classes, (dim,) * count, self._strides(), dim, layers)

    def _strides(self) -> tuple[int, ...]:
        """Pixels per cell of every level: the backbone's, then each twice the one before."""
        strides = list(self.backbone.strides)
        while len(strides) < len(self.input_proj):
            strides.append(2 * strides[-1])
        return tuple(strides[-len(self.input_proj) :])

    def decode(
        self, images: Tensor, mask: Tensor | None, neck: Neck | None = None
    ) -> tuple[TransformerOutput, list[Level], list[Any]]:
        """States and boxes of the queries after every layer, the maps and the neck's notes; as in ``decoded``."""
        images, mask = pad_to_multiple(images, mask, self.backbone.pad_multiple)
        maps = self._levels(self.backbone(images))
        masks = [resize_mask(mask, (level.shape[2], level.shape[3])) for level in maps]
        levels, taps = levels_of(maps, masks, self._strides(), neck)
        out: TransformerOutput = self.transformer(
            [level.features for level in levels],
            masks,
            [self.position_encoding(level) for level in masks],
            None if self.query_embed is None else self.query_embed.weight,
            self.bbox_embed,
            self.class_embed[-1] if self.query_embed is None else None,
        )
        return out, levels, taps

    def predictions(self, out: TransformerOutput) -> DetectorOutput:
        """What ``forward`` returns, of states and boxes."""
        layers = enumerate(zip(out.states, out.boxes, strict=True))
        *earlier, last = [self._prediction(index, *layer) for index, layer in layers]
        result = cast(DetectorOutput, {**last, "aux_outputs": earlier})
        if out.encoder_logits is not None and out.encoder_boxes is not None:
            result["enc_outputs"] = {"pred_logits": out.encoder_logits, "pred_boxes": out.encoder_boxes}
        return result

    def _prediction(self, layer: int, states: Tensor, boxes: Tensor) -> Prediction:
        logits = self.class_embed[layer](states)
        if self.object_embed is None:
            return {"pred_logits": logits, "pred_boxes": boxes}
        present = self.object_embed[layer](states)
        return {"pred_logits": logits + present, "pred_boxes": boxes, "pred_objectness": present}

    def losses_of(self, outputs: DetectorOutput, images: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Losses of all layers, see ``DetectionLoss``."""
        terms: dict[str, Tensor] = self.criterion(outputs, targets)
        return terms

    def _levels(self, maps: list[Tensor]) -> list[Tensor]:
        """Project the backbone's maps to C channels and add coarser ones, the first of them from the raw last map."""
        levels = [project(features) for project, features in zip(self.input_proj, maps, strict=False)]
        source = maps[-1]
        for project in self.input_proj[len(maps) :]:
            source = project(source)
            levels.append(source)
        return levels


def check_sizes(classes: int, dim: int, heads: int, layers: int, queries: int) -> None:
    """Raise for sizes that do not fit together."""
    if dim % 4 or dim % heads:
        raise ValueError(f"hidden_dim must be a multiple of 4 and of num_heads={heads}, got {dim}")
    for name, value in (("num_classes", classes), ("num_decoder_layers", layers), ("num_queries", queries)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def one_per_layer(heads: Sequence[nn.Module], count: int) -> nn.ModuleList:
    """A list of ``count`` heads: each its own, or all the only one."""
    return nn.ModuleList(heads[min(layer, len(heads) - 1)] for layer in range(count))


def map_projection(in_channels: int, dim: int, halve: bool = False) -> nn.Sequential:
    """Convolution to C channels and group norm, for maps [B, in_channels, h, w]: 1x1, or 3x3 of stride 2 to halve."""
    convolution = nn.Conv2d(in_channels, dim, 3, 2, padding=1) if halve else nn.Conv2d(in_channels, dim, 1)
    nn.init.xavier_uniform_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return nn.Sequential(convolution, nn.GroupNorm(math.gcd(32, dim), dim))


def _input_projections(channels: list[int], num_levels: int, dim: int) -> nn.ModuleList:
    """Of the backbone's maps, then of maps that are half as large as the one before."""
    widths = [*channels, channels[-1], *[dim] * num_levels][:num_levels]
    return nn.ModuleList(map_projection(width, dim, level >= len(channels)) for level, width in enumerate(widths))
