"""ViDT and ViDT+: images [B, 3, H, W] and their padding mask in, class logits and boxes of every detection token out.

Detection tokens pass through a Swin beside the image's patches (``swin_ram``); a decoder without encoder refines them.
By default this is ViDT+: fused maps, 300 tokens, estimates of IoU, masks as vectors, classes of cells. Source: ViDT and
ViDT+ (arXiv 2110.03921, 2204.07962); numerics, initialisation and names of specs/detectors.md part B.
Letters: B images, Q queries (detection tokens), K classes, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from simdetr.detectors.deformable_detr import BoxHead
from simdetr.detectors.detector import DetectorOutput, Prediction
from simdetr.detectors.features import Features, FeatureSizes, Neck, QueryDetector, levels_of, queries_of
from simdetr.detectors.mask_vectors import NUM_COEFFICIENTS
from simdetr.detectors.matcher import Target
from simdetr.detectors.neck_free_loss import NeckFreeLoss
from simdetr.detectors.padding_mask import resize_mask
from simdetr.detectors.pyramid_fusion import PyramidFusion
from simdetr.detectors.swin_ram import RamFeatures, RamSwin, create_swin
from simdetr.detectors.vidt_heads import (
    NeckFreeHead,
    Perceptron,
    map_projection,
    project_tokens,
    softmax_log_odds,
    vector_head,
)
from simdetr.detectors.vidt_losses import VidtLoss
from simdetr.detectors.vidt_neck import VidtNeck, flatten_maps


class ViDT(QueryDetector):
    """ViDT+ on a Swin of timm; set ``fusion``, ``iou_aware``, ``mask_vectors`` and ``token_labels`` to False for ViDT.

    Without masks in the targets the masks' vectors and the cells' classes learn nothing, and the loss says so.

    Args:
        num_classes: K. Classes are numbered from 0; there is no class for background.
        backbone: a Swin of timm, not Swin V2; ``swin_nano`` (ViDT's smallest) or ``swin_pico`` (a laptop's).
        pretrained_backbone: load timm's pretrained weights into it.
        num_queries: Q, most objects that can be found in one image; 100 in ViDT, 300 in ViDT+.
        hidden_dim: C, width of the decoder; a multiple of 4 and of ``num_heads``.
        num_heads: attention heads of the decoder.
        num_decoder_layers: layers of the decoder; the body predicts as well, so there is one prediction more.
        ffn_dim: width of the decoder's perceptrons.
        dropout: probability of dropout in the decoder.
        num_points: points that a head reads per level.
        with_box_refine: each layer corrects the boxes of the one before.
        neck: have a decoder; False predicts from the body alone by softmax, with DETR's loss, one prediction and none
            of the additions of ViDT+.
        fusion: fuse the maps from coarse to fine before the decoder reads them.
        iou_aware: estimate the IoU of every box with its object; training only, the score does not use it.
        mask_vectors: draw every object's mask as a vector of coefficients.
        token_labels: learn the classes of the maps' cells; training only.
        drop_path: stochastic depth of the body's last block; None for ViDT's own by the backbone's name.
        inference_layers: decoder layers used in evaluation mode, fewer are faster; None for all, 0 for the body's
            prediction. May be set at any time.
        activation_checkpointing: recompute the body's blocks in the backward pass, for less memory and more time.
        class_prior: probability of every class at the start, which sets the bias of the class heads.
        vector_bias: bias of all but the first two coefficients at the start; 0 would be more natural.

    Raises:
        ValueError: sizes that do not fit together, or a backbone that is no Swin.
    """

    slow_names = ()
    decays_backbone_vectors = False

    def __init__(
        self,
        num_classes: int,
        backbone: str = "swin_tiny_patch4_window7_224",
        pretrained_backbone: bool = False,
        num_queries: int = 300,
        hidden_dim: int = 256,
        num_heads: int = 8,
        num_decoder_layers: int = 6,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
        num_points: int = 4,
        with_box_refine: bool = True,
        neck: bool = True,
        fusion: bool = True,
        iou_aware: bool = True,
        mask_vectors: bool = True,
        token_labels: bool = True,
        drop_path: float | None = None,
        inference_layers: int | None = None,
        activation_checkpointing: bool = False,
        class_prior: float = 0.01,
        vector_bias: float = -2.0,
    ) -> None:
        # what rebuilds this detector; kept beside its weights
        self.init_args = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        _check_sizes(num_classes, hidden_dim, num_heads, num_decoder_layers, num_queries)
        self.num_classes, self.num_decoder_layers = num_classes, num_decoder_layers
        self.inference_layers = inference_layers
        self.backbone = RamSwin(
            create_swin(backbone, pretrained_backbone, drop_path),
            num_queries,
            hidden_dim,
            hidden_dim if neck else None,
            activation_checkpointing,
        )
        self.neck_free_head: NeckFreeHead | None = None
        if not neck:
            self.neck_free_head = NeckFreeHead(self.backbone.token_channels, hidden_dim, num_classes)
            self.criterion: nn.Module = NeckFreeLoss()
            return
        self.criterion = VidtLoss()
        class_bias = -math.log((1 - class_prior) / class_prior)
        self.transformer = VidtNeck(
            hidden_dim,
            num_heads,
            num_decoder_layers,
            ffn_dim,
            dropout,
            len(self.backbone.channels),
            num_points,
            refine=with_box_refine,
            token_classes=num_classes if token_labels else None,
            class_bias=class_bias,
        )
        self._add_projections(hidden_dim, fusion)
        self._add_heads(hidden_dim, with_box_refine, class_bias)
        # IoU is as layers see it; a mask is the same for all layers, and so is its head
        distinct = [Perceptron(hidden_dim, 1) for _ in range(num_decoder_layers + 1 if with_box_refine else 1)]
        self.iou_embed = _one_per_layer(distinct, num_decoder_layers + 1) if iou_aware else None
        shared = [vector_head(hidden_dim, NUM_COEFFICIENTS, vector_bias)]
        self.vector_embed = _one_per_layer(shared, num_decoder_layers + 1) if mask_vectors else None

    def _add_projections(self, dim: int, fusion: bool) -> None:
        """To C channels: the maps, the tokens and their positions."""
        channels = self.backbone.channels
        self.fusion = PyramidFusion(channels, dim) if fusion else None
        self.input_proj = None if fusion else nn.ModuleList(map_projection(width, dim) for width in channels)
        self.tgt_proj = map_projection(self.backbone.token_channels, dim)
        self.query_pos_proj = map_projection(dim, dim)

    def _add_heads(self, dim: int, refine: bool, class_bias: float) -> None:
        """Class and box heads of the body and of every layer, with the original's initialisation and names."""
        count = self.num_decoder_layers + 1
        distinct = count if refine else 1
        class_heads = [nn.Linear(dim, self.num_classes) for _ in range(distinct)]
        for head in class_heads:
            nn.init.constant_(head.bias, class_bias)
        self.class_embed = _one_per_layer(class_heads, count)
        self.bbox_embed = _one_per_layer(
            [BoxHead(dim, -2.0 if layer == 0 else 0.0) for layer in range(distinct)], count
        )
        if refine:
            # the original registers the heads again where the decoder uses them, and its checkpoints have both names
            self.transformer.decoder.bbox_embed = self.bbox_embed

    @property
    def inference_layers(self) -> int | None:
        """Decoder layers used in evaluation mode; None for all, 0 for the body's prediction."""
        layers: int | None = self.init_args["inference_layers"]
        return layers

    @inference_layers.setter
    def inference_layers(self, layers: int | None) -> None:
        if layers is not None and not 0 <= layers <= self.num_decoder_layers:
            raise ValueError(f"inference_layers must be None or 0 to {self.num_decoder_layers}, got {layers}")
        self.init_args["inference_layers"] = layers

    def forward(self, images: Tensor, mask: Tensor | None = None) -> DetectorOutput:
        """Detect.

        Args:
            images: normalised images [B, 3, H, W], padded at the bottom and right.
            mask: bool [B, H, W], True = padding; None if no image is padded.

        Returns:
            Predictions of the last layer and of the earlier ones, with ``pred_ious`` [B, Q, 1] and ``pred_vectors``
            [B, Q, 256]; in training mode also ``enc_tokens``. Without a neck, one prediction.
        """
        images, mask = _clear_padding(images, mask)
        features = self.backbone(images, mask)
        if self.neck_free_head is not None:
            return self._predict_without_neck(features)[0]
        return self._predict(features, mask)[0]

    def decoded(
        self, images: Tensor, mask: Tensor | None = None, neck: Neck | None = None
    ) -> tuple[DetectorOutput, Features]:
        """As ``forward``, with the projected maps and the queries; arguments as in ``QueryDetector``.

        Raises:
            ValueError: there is no decoder (``neck=False``).
        """
        if self.neck_free_head is not None:
            raise ValueError("neck: heads read the decoder's queries; build ViDT with neck=True")
        images, mask = _clear_padding(images, mask)
        return self._predict(self.backbone(images, mask), mask, neck)

    @property
    def feature_sizes(self) -> FeatureSizes:
        """Sizes of what ``decoded`` gives."""
        dim, count = self.backbone.det_pos_embed.shape[2], len(self.backbone.channels)
        return FeatureSizes(
            self.num_classes, (dim,) * count, tuple(self.backbone.strides), dim, self.num_decoder_layers + 1
        )

    def losses(self, images: Tensor, mask: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Losses of all layers, see ``VidtLoss``, or ``NeckFreeLoss`` without a neck."""
        terms: dict[str, Tensor]
        if self.neck_free_head is None:
            return self.losses_of(self(images, mask), images, targets)
        features = self.backbone(*_clear_padding(images, mask))
        outputs, class_logits = self._predict_without_neck(features)
        terms = self.criterion(class_logits, outputs, targets)
        # nothing reads the last maps, but every parameter has to take part
        return {**terms, "loss": terms["loss"] + 0.0 * features.maps[-1].float().sum()}

    def losses_of(self, outputs: DetectorOutput, images: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """``losses`` of outputs of a decoder that are there already."""
        terms: dict[str, Tensor] = self.criterion(outputs, targets, tuple(images.shape[-2:]))
        return terms

    def _predict(
        self, features: RamFeatures, mask: Tensor, neck: Neck | None = None
    ) -> tuple[DetectorOutput, Features]:
        """Decode the tokens and apply the heads."""
        if self.fusion is not None:
            maps = self.fusion(features.maps)[::-1]
        else:
            assert self.input_proj is not None
            maps = [project(level) for project, level in zip(self.input_proj, features.maps, strict=True)]
        masks = [resize_mask(mask, (level.shape[2], level.shape[3])) for level in maps]
        levels, taps = levels_of(maps, masks, self.backbone.strides, neck)
        order = slice(None, None, -1 if self.fusion is not None else 1)  # the original decodes fused maps coarse first
        masks = masks[order]
        memory = flatten_maps([level.features for level in levels[order]], masks)
        target = project_tokens(self.tgt_proj, features.tokens)
        query = project_tokens(self.query_pos_proj, self.backbone.det_pos_embed).expand_as(target)
        used = self.num_decoder_layers if self.training or self.inference_layers is None else self.inference_layers
        states, boxes, start = self.transformer(target, query, memory, self.bbox_embed, used)
        layers = [self._apply_heads(index, *layer) for index, layer in enumerate(zip(states, boxes, strict=True))]
        logits = [layer["pred_logits"] for layer in layers]
        queries = queries_of(states, boxes, logits, start, self.transformer.decoder.refine)
        last = layers.pop()
        outputs = cast(DetectorOutput, {**last, "aux_outputs": layers})
        if self.training and self.transformer.token_embed is not None:
            outputs["enc_tokens"] = self.transformer.label_cells(memory, masks)
        return outputs, Features(levels, queries, taps)

    def _apply_heads(self, index: int, states: Tensor, boxes: Tensor) -> Prediction:
        """Prediction of one layer; states [B, Q, C], boxes [B, Q, 4]."""
        prediction: Prediction = {"pred_logits": self.class_embed[index](states), "pred_boxes": boxes}
        if self.iou_embed is not None:
            prediction["pred_ious"] = self.iou_embed[index](states)
        if self.vector_embed is not None:
            prediction["pred_vectors"] = self.vector_embed[index](states)
        return prediction

    def _predict_without_neck(self, features: RamFeatures) -> tuple[DetectorOutput, Tensor]:
        """The body's prediction, and its softmax logits [B, Q, K + 1] for the loss."""
        assert self.neck_free_head is not None
        class_logits, boxes = self.neck_free_head(features.tokens)
        return {"pred_logits": softmax_log_odds(class_logits), "pred_boxes": boxes}, class_logits


def _one_per_layer(heads: Sequence[nn.Module], count: int) -> nn.ModuleList:
    """A list of ``count`` heads: each its own, or all the only one."""
    return nn.ModuleList(heads[min(layer, len(heads) - 1)] for layer in range(count))


def _clear_padding(images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Images that are zero at padding, which windows see; a mask without padding shrinks to one image to save work."""
    wanted = (images.shape[0], *images.shape[-2:])
    if mask is None:
        return images, images.new_zeros(1, *wanted[1:], dtype=torch.bool)
    if mask.shape != wanted:
        raise ValueError(f"mask must be [B, H, W] = {list(wanted)}, got {list(mask.shape)}")
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not mask.any():
        return images, mask[:1]
    return images.masked_fill(mask[:, None], 0.0), mask


def _check_sizes(classes: int, dim: int, heads: int, layers: int, queries: int) -> None:
    """Raise for sizes that do not fit together."""
    if dim % 4 or dim % heads:
        raise ValueError(f"hidden_dim must be a multiple of 4 and of num_heads={heads}, got {dim}")
    for name, value in (("num_classes", classes), ("num_decoder_layers", layers), ("num_queries", queries)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
