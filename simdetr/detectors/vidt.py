"""ViDT and ViDT+: images [B, 3, H, W] and their padding mask in, class logits and boxes of every detection token out.

Detection tokens pass through a Swin beside the image's patches (``swin_ram``); a neck without encoder refines them: its
decoder reads the maps as they are, without positions or level embeddings, or fused from coarse to fine. By default this
is ViDT+: fused maps, 300 tokens, estimates of IoU, masks as vectors, classes of cells. Source: ViDT and ViDT+ (arXiv
2110.03921, 2204.07962); numerics, initialisation and names of the published code.
Letters: B images, Q queries (detection tokens), K classes, C channels, L levels of h_l by w_l cells, S cells of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simdetr.detectors.backbone import batch_mask, resize_mask
from simdetr.detectors.deformable_detr import Perceptron, box_head, check_sizes, one_per_layer
from simdetr.detectors.deformable_detr import map_projection as map_projection  # heads take it from here
from simdetr.detectors.deformable_transformer import (
    DeformableDecoder,
    DeformableDecoderLayer,
    LayerSizes,
    Memory,
    cell_boxes,
    flatten_maps,
    initialise,
    inverse_sigmoid,
)
from simdetr.detectors.detector import (
    DetectorOutput,
    Features,
    FeatureSizes,
    Neck,
    Prediction,
    QueryDetector,
    levels_of,
    queries_of,
    softmax_log_odds,
)
from simdetr.detectors.mask_vectors import NUM_COEFFICIENTS
from simdetr.detectors.matcher import Target
from simdetr.detectors.swin_ram import RamFeatures, RamSwin, create_swin
from simdetr.detectors.vidt_losses import NeckFreeLoss, VidtLoss


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
        check_sizes(num_classes, hidden_dim, num_heads, num_decoder_layers, num_queries)
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
            LayerSizes(hidden_dim, ffn_dim, dropout, len(self.backbone.channels), num_heads, num_points),
            num_decoder_layers,
            refine=with_box_refine,
            token_classes=num_classes if token_labels else None,
            class_bias=class_bias,
        )
        self._add_projections(hidden_dim, fusion)
        self._add_heads(hidden_dim, with_box_refine, class_bias)
        count = num_decoder_layers + 1
        # IoU is as layers see it; a mask is the same for all layers, and so is its head
        distinct = [Perceptron(hidden_dim, 1) for _ in range(count if with_box_refine else 1)]
        self.iou_embed = one_per_layer(distinct, count) if iou_aware else None
        start = F.pad(torch.zeros(2), (0, NUM_COEFFICIENTS - 2), value=vector_bias)
        shared = [Perceptron(hidden_dim, NUM_COEFFICIENTS, start=start)]
        self.vector_embed = one_per_layer(shared, count) if mask_vectors else None

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
        distinct = range(count if refine else 1)
        class_heads = [nn.Linear(dim, self.num_classes) for _ in distinct]
        for head in class_heads:
            nn.init.constant_(head.bias, class_bias)
        self.class_embed = one_per_layer(class_heads, count)
        self.bbox_embed = one_per_layer([box_head(dim, -2.0 if layer == 0 else 0.0) for layer in distinct], count)
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
        """Detect; arguments as in ``Detector``.

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
        """As ``forward``, with the projected maps and the queries; a ValueError without a decoder (``neck=False``)."""
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
        if self.neck_free_head is None:
            return super().losses(images, mask, targets)
        features = self.backbone(*_clear_padding(images, mask))
        outputs, class_logits = self._predict_without_neck(features)
        terms: dict[str, Tensor] = self.criterion(class_logits, outputs, targets)
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


def _clear_padding(images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Images that are zero at padding, which windows see, and their mask as of ``batch_mask``."""
    padding = batch_mask(images, mask)
    if mask is None or len(padding) < len(images):
        return images, padding
    return images.masked_fill(padding[:, None], 0.0), padding


class VidtNeck(nn.Module):
    """Decoder layers behind the body's own prediction, which is the first, and classes of the maps' cells.

    If it refines, each layer starts from the boxes of the one before. ``token_classes`` is K, to learn the classes of
    cells as well (token labelling), whose logits start at ``class_bias``; None leaves that out.
    """

    def __init__(
        self, sizes: LayerSizes, num_layers: int, refine: bool, token_classes: int | None, class_bias: float
    ) -> None:
        super().__init__()
        dim = sizes.dim
        self.decoder = DeformableDecoder((DeformableDecoderLayer(sizes) for _ in range(num_layers)), refine)
        self.reference_points = nn.Linear(dim, 2)  # its bias keeps PyTorch's start, as in the original
        self.token_embed = None
        if token_classes is not None:
            self.enc_output = nn.Linear(dim, dim)
            self.enc_output_norm = nn.LayerNorm(dim)
            self.token_embed = nn.Linear(dim, token_classes)
        initialise(self)
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
            num_layers: of the decoder to run.
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


# ----------------------------------------------------------------------------------------------------------------------
# Fusion of feature maps from coarse to fine, of ViDT+.


class ResidualUnit(nn.Module):
    """Three convolutions through a quarter of the channels C, a multiple of 4, added to their input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim // 4, 1)
        self.conv2 = nn.Conv2d(dim // 4, dim // 4, 3, padding=1)
        self.conv3 = nn.Conv2d(dim // 4, dim, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, h, w] to the same."""
        hidden = features
        for convolution in (self.conv1, self.conv2, self.conv3):
            hidden = convolution(F.relu(hidden))
        return features + hidden


class FusionBlock(nn.Module):
    """Joins a map with the fused coarser one; at the coarsest it is only refined. Names are the original's."""

    def __init__(self, dim: int, coarsest: bool) -> None:
        super().__init__()
        self.smoothing = None if coarsest else nn.Conv2d(dim, dim, 1)
        self.resConfUnit1 = None if coarsest else ResidualUnit(dim)
        self.resConfUnit2 = ResidualUnit(dim)

    def forward(self, features: Tensor, coarser: Tensor | None) -> Tensor:
        """Fused map [B, C, h, w]; ``coarser`` is of any size and None at the coarsest level."""
        if self.smoothing is not None and self.resConfUnit1 is not None and coarser is not None:
            enlarged = F.interpolate(coarser, size=features.shape[-2:], mode="bilinear", align_corners=True)
            features = self.smoothing(enlarged) + self.resConfUnit1(features)
        fused: Tensor = self.resConfUnit2(features)
        return fused


class PyramidFusion(nn.Module):
    """Projects every map, fine to coarse, to C channels and hands what coarse maps know to the finer ones."""

    def __init__(self, channels: Sequence[int], dim: int) -> None:
        super().__init__()
        self.num_levels = len(channels)
        self.multi_scaler = nn.ModuleDict()
        for level, width in enumerate(channels):
            self.multi_scaler[f"layer_{level}_rn"], self.multi_scaler[f"p_norm_{level}"] = map_projection(width, dim)
            self.multi_scaler[f"refinenet_{level}"] = FusionBlock(dim, coarsest=level == len(channels) - 1)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, channels[l], h_l, w_l], fine to coarse, to [B, C, h_l, w_l], **coarse to fine**."""
        fused: list[Tensor] = []
        for level in reversed(range(self.num_levels)):
            projected = self.multi_scaler[f"p_norm_{level}"](self.multi_scaler[f"layer_{level}_rn"](maps[level]))
            fused.append(self.multi_scaler[f"refinenet_{level}"](projected, fused[-1] if fused else None))
        return fused


# ----------------------------------------------------------------------------------------------------------------------
# Small networks between detection tokens and predictions. N tokens.


def project_tokens(projection: nn.Sequential, tokens: Tensor) -> Tensor:
    """A map projection for tokens, [B, N, in_channels] to [B, N, C]; its group norm mixes the tokens of an image."""
    projected: Tensor = projection(rearrange(tokens, "b n c -> b c n 1"))
    return rearrange(projected, "b c n 1 -> b n c")


class NeckFreeHead(nn.Module):
    """Softmax classes, "no object" among them, and boxes from the body's tokens alone."""

    def __init__(self, token_channels: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.input_proj = map_projection(token_channels, dim)
        self.class_embed = Perceptron(dim, num_classes + 1)
        self.bbox_embed = Perceptron(dim, 4)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, token_channels] to softmax logits [B, N, K + 1] and boxes cxcywh [B, N, 4]."""
        states = project_tokens(self.input_proj, tokens)
        return self.class_embed(states), self.bbox_embed(states).float().sigmoid()
