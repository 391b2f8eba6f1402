"""Where objects recur: a small map over the image that is learned, added to feature maps and to their objectness.

Industrial cameras stand still, so objects come at the same places again and again. Convolutions cannot tell: they see a
pattern, not where it is. A map R of 10 x 10 numbers, zero at the start, is laid over the image; every level gets
objectness o = conv(F) + conv_R(R~) and location-aware features F' = F + conv'_R(R~), where R~ is R at the level's
cells. R lies over the *original* image: a sample that was cut out or mirrored reads its own part, a mosaic none.
Source: US 2022/0121872 [0084], where the vector [1, 10, 10, 1] is filled with 0; that it learns is this library's
reading, for a constant 0 could carry nothing, as are loss, ranking and places.
Letters: B images, C channels, h x w cells of a level, S numbers along a side of R, T boxes of an image, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simdetr.boxes import normalise
from simdetr.data.legal_values import check_choice
from simdetr.detectors.detector import Features, FeatureSizes, Level, Neck
from simdetr.detectors.losses import global_mean_count
from simdetr.detectors.matcher import FOCAL_ALPHA, FOCAL_GAMMA, Target, at_least_float32
from simdetr.evaluation.heat_map_boxes import heat_map_boxes
from simdetr.heads.attention import CONSTANT, checked_taps
from simdetr.heads.head import Head, HeadLosses, check_finite, is_labelled
from simdetr.heads.landmark_targets import valid_cells

Fit = Literal["resize", "crop"]
Use = Literal["rank", "feature"]
ObjectnessLoss = Literal["focal", "bce"]

PRIOR_LOGIT = -4.6
"""Objectness at the start: a probability of 0.01, as focal losses want it."""
BOX_SHARES = (0.3, 0.5, 0.7)
"""Of a heat map's maximum: boxes of a head without a decoder go around what lies above one of these."""


class LocationTap(NamedTuple):
    """Notes of one level."""

    objectness: Tensor  # o [B, h, w]
    prior: Tensor  # R~ [B, h, w]


class LocationPrior(Head):
    """Objectness of feature maps that knows where in the image they are, and features that know it too.

    On a detector it is a neck before the encoder, and its objectness may rank the boxes; on a backbone alone it
    proposes boxes of any class.

    Args:
        sizes: what it is built for.
        levels: indices of the levels that it reads and changes, fine to coarse; None for all.
        size: S; the document has 10.
        fit: ``resize`` lays R over the whole image; ``crop`` gives cell (i, j) of a level the number (i, j) of R, as
            the document has it, for maps of at most S x S cells.
        with_map: whether there is an R; without it this is plain objectness that changes no features, to compare to.
        use: at inference let features alone work (``feature``), or ``rank`` boxes by the root of objectness times
            score too, which costs accuracy until the objectness has learned: after 60 steps on thirty images of blood
            cells 3.3 points of AP.
        loss: of the objectness, ``focal`` or ``bce``.
        loss_weight: of that loss.
        kernel_size: of the convolution from features to objectness, odd; from 3 on, its padding tells of borders too.
        map_size: pixels of the square heat map that stands for the valid image.
        num_boxes: most boxes that it proposes on a backbone alone.

    Raises:
        ValueError: options outside their range, or unknown ones.
    """

    name = "location"
    needs = frozenset({"levels"})
    undecayed_names = ("prior",)
    takes_unlabelled = True

    def __init__(
        self,
        sizes: FeatureSizes,
        levels: Sequence[int] | None = None,
        size: int = 10,
        fit: Fit = "resize",
        with_map: bool = True,
        use: Use = "feature",
        loss: ObjectnessLoss = "focal",
        loss_weight: float = 1.0,
        kernel_size: int = 1,
        map_size: int = 112,
        num_boxes: int = 100,
    ) -> None:
        self.init_args = {name: v for name, v in locals().items() if name not in ("self", "__class__", "sizes")}
        super().__init__()
        self.levels = checked_taps(levels, len(sizes.level_channels), "levels")
        self.init_args["levels"] = None if levels is None else list(levels)
        for name, kind in {"fit": Fit, "use": Use, "loss": ObjectnessLoss}.items():
            check_choice(name, self.init_args[name], kind)
        for name, least in {"size": 1, "kernel_size": 1, "map_size": 2, "num_boxes": 1}.items():
            if self.init_args[name] < least:
                raise ValueError(f"{name} must be at least {least}, got {self.init_args[name]}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if not loss_weight >= 0:
            raise ValueError(f"loss_weight must be at least 0, got {loss_weight}")
        self.sizes, self.fit, self.use, self.loss, self.loss_weight = sizes, fit, use, loss, loss_weight
        self.map_size, self.num_boxes, self.is_neck = map_size, num_boxes, with_map
        channels = [sizes.level_channels[index] for index in self.levels]
        self.objectness = nn.ModuleList(nn.Conv2d(width, 1, kernel_size, padding="same") for width in channels)
        parts: list[Any] = list(self.objectness)
        for score in parts:
            nn.init.normal_(score.weight, std=0.01)
            nn.init.constant_(score.bias, PRIOR_LOGIT)
        self.prior: nn.Parameter | None = None
        if with_map:
            # 1 x 1: only so does a mirrored sample see the mirrored map
            self.prior = nn.Parameter(torch.zeros(1, 1, size, size))
            self.to_objectness = nn.ModuleList(nn.Conv2d(1, 1, 1, bias=False) for _ in channels)
            self.to_features = nn.ModuleList(nn.Conv2d(1, width, 1, bias=False) for width in channels)
            for weights in self.to_objectness.parameters():
                nn.init.ones_(weights)  # not 0, or R would never have a gradient
            for weights in self.to_features.parameters():
                nn.init.normal_(weights, std=0.1)

    def neck(self, targets: Sequence[Target] | None) -> Neck:
        """``pass_level`` that knows where in its original image each sample lies, ``window`` of the targets."""
        windows = None if targets is None else sample_windows(targets)
        return partial(self.pass_level, windows=windows)

    def pass_level(self, index: int, level: Level, windows: Tensor | None = None) -> tuple[Tensor, LocationTap | None]:
        """Objectness of a level, and its features with R; see ``Head``.

        Args:
            index: its place among the levels, fine to coarse.
            level: the features as they come.
            windows: of ``sample_windows`` [B, 4]; None where all images are whole.

        Raises:
            ValueError: features of other channels, or a map larger than R that is to be cropped from it.
        """
        if index not in self.levels or self.prior is None:
            return level.features, None
        place = self.levels.index(index)
        plain = self._plain(place, level)
        shown = prior_at_cells(self.prior, level.mask, windows, self.fit)
        added = self.to_objectness[place](shown)[:, 0]
        changed = level.features + self.to_features[place](shown).to(level.features.dtype)
        return changed, LocationTap(plain + added, shown[:, 0])

    def _plain(self, place: int, level: Level) -> Tensor:
        """conv(F) [B, h, w]."""
        index = self.levels[place]
        shape, width = list(level.features.shape), self.sizes.level_channels[index]
        if len(shape) != 4 or shape[1] != width:
            raise ValueError(f"features of level {index}: expected [B, {width}, h, w], got {shape}")
        check_finite(f"features of level {index}", level.features)
        found: Tensor = self.objectness[place](level.features.masked_fill(level.mask[:, None], 0.0))
        return found[:, 0]

    def forward(self, features: Features) -> list[Tensor]:
        """Objectness o [B, h, w] of each of its levels, fine to coarse."""
        if self.prior is None:
            return [self._plain(place, features.levels[index]) for place, index in enumerate(self.levels)]
        taps: list[LocationTap] = [features.taps[index] for index in self.levels]
        return [tap.objectness for tap in taps]

    def losses(self, outputs: list[Tensor], features: Features, targets: Sequence[Target]) -> HeadLosses:
        """Objectness against the boxes' inner halves, see ``box_coverage``; of labelled images only.

        ``focal`` is divided by the positive cells of all processes, ``bce`` is the mean over the cells that count.

        Raises:
            ValueError: not one target per image.
        """
        if len(targets) != len(outputs[0]):
            raise ValueError(f"targets: expected one per image ({len(outputs[0])}), got {len(targets)}")
        labelled = torch.tensor([is_labelled(target) for target in targets], device=outputs[0].device)
        sums, positives, cells = [], [], []
        for found, index in zip(outputs, self.levels, strict=True):
            logits = at_least_float32(found)
            wanted, counts = box_coverage(targets, features.levels[index].mask)
            counts = counts & labelled[:, None, None]
            each = objectness_loss(logits, wanted.to(logits.dtype), self.loss)
            sums.append(each.masked_fill(~counts, 0.0).sum())
            positives.append((wanted * counts).sum())
            cells.append(counts.sum())
        total = torch.stack(sums).sum()
        if self.loss == "focal":
            loss = total / global_mean_count(torch.stack(positives).sum(), total.device)
        else:
            loss = total / torch.stack(cells).sum().clamp(min=1)
        watched = {"positive_cells": torch.stack(positives).sum()}
        if self.prior is not None:
            watched["map_norm"] = self.prior.detach().norm()
        return HeadLosses(self.loss_weight * loss, {"objectness": loss.detach()}, watched)

    @torch.no_grad()
    def heat_map(self, outputs: list[Tensor], features: Features) -> Tensor:
        """Probability that there is an object, the highest of the levels: [B, 1, S', S'] over the valid image."""
        side = (self.map_size, self.map_size)
        maps = []
        for found, index in zip(outputs, self.levels, strict=True):
            rows, columns = (count.tolist() for count in valid_cells(features.levels[index].mask))
            chances = at_least_float32(found).sigmoid()
            shown = [
                F.interpolate(image[None, None, :height, :width], side, mode="bilinear")
                for image, height, width in zip(chances, rows, columns, strict=True)
            ]
            maps.append(torch.cat(shown))
        return torch.stack(maps).amax(dim=0)

    @property
    def prior_map(self) -> Tensor:
        """R [S, S] as it stands, without gradient, to draw; 0 without one."""
        if self.prior is None:
            return torch.zeros(self.init_args["size"], self.init_args["size"])
        return self.prior.detach()[0, 0].clone()

    def predictions(self, outputs: list[Tensor], features: Features) -> dict[str, Tensor]:
        """With ``rank``, the detector's logits ``pred_logits`` [B, Q, K] of the root of objectness times probability.

        On a backbone alone, boxes around the high parts of the heat map, whose classes all have the same logit.
        """
        if features.queries is None:
            return self._proposals(self.heat_map(outputs, features)[:, 0])
        if self.use == "feature":
            return {}
        boxes, logits = features.queries.boxes[-1], features.queries.logits[-1]
        masks = [features.levels[index].mask for index in self.levels]
        found = [objectness_at(level, mask, boxes[..., :2]) for level, mask in zip(outputs, masks, strict=True)]
        return {"pred_logits": ranked_logits(logits, torch.stack(found).amax(dim=0))}

    def _proposals(self, maps: Tensor) -> dict[str, Tensor]:
        """Boxes of heat maps [B, S', S'], scored by the map's mean within, best first."""
        count = self.num_boxes
        boxes = torch.zeros(len(maps), count, 4, device=maps.device)
        logits = torch.full((len(maps), count), -torch.inf, device=maps.device)
        for row, values in enumerate(maps.cpu()):
            if float(values.max() - values.min()) <= CONSTANT * float(values.max()):
                continue
            pixels = values.double().numpy()
            parts = [torch.from_numpy(heat_map_boxes(pixels, share, largest=False)) for share in BOX_SHARES]
            corners = torch.unique(torch.cat(parts), dim=0)
            corners = corners[(corners[:, 2:] > corners[:, :2]).all(dim=1)]
            means = [values[int(y0) : int(y1), int(x0) : int(x1)].mean() for x0, y0, x1, y1 in corners.tolist()]
            if not means:
                continue
            scores, order = torch.stack(means).sort(descending=True, stable=True)
            kept = order[:count]
            boxes[row, : len(kept)] = normalise(corners[kept], (self.map_size, self.map_size)).to(boxes)
            logits[row, : len(kept)] = scores[:count].logit(eps=1e-6).to(logits)
        return {"pred_logits": logits[..., None].repeat(1, 1, self.sizes.num_classes), "pred_boxes": boxes}


# ----------------------------------------------------------------------------------------------------------------------
# The map at the cells of a level.


def sample_windows(targets: Sequence[Target]) -> Tensor:
    """Where in its original image each sample lies, float [B, 4]: left, upper, right and lower edge as fractions.

    Left and right change places where it is mirrored. A target without ``window`` is the whole image; NaN, of mosaics,
    is no place at all.
    """
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
    found: list[Any] = [target.get("window", whole) for target in targets]
    device = next((window.device for window in found if window is not whole), whole.device)
    return torch.stack([window.to(device) for window in found])


def prior_at_cells(prior: Tensor, mask: Tensor, windows: Tensor | None, fit: Fit = "resize") -> Tensor:
    """R~ [B, 1, h, w]: the map R where the cells of a level lie in the original image.

    Args:
        prior: R [1, 1, S, S].
        mask: bool [B, h, w], True = padding.
        windows: as of ``sample_windows``; 0 comes of those that are not finite. None where all images are whole.
        fit: ``resize`` interpolates R over the whole image; ``crop`` takes R's number of the cell's row and column in
            a map of the whole image, or the nearest one where R is too small for what was enlarged.

    Raises:
        ValueError: a level with more cells than R, to be cropped from it.
    """
    size, (height, width) = prior.shape[-1], mask.shape[1:]
    if fit == "crop" and max(height, width) > size:
        raise ValueError(
            f"fit: expected a map of at most {size} x {size} cells for 'crop', got {height} x {width}; choose "
            f"'resize', coarser levels, or size={max(height, width)}"
        )
    if windows is None:
        windows = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(mask), -1)
    windows = windows.to(prior.device, prior.dtype)
    known = windows.isfinite().all(dim=1)
    x0, y0, x1, y1 = windows.nan_to_num(posinf=0.0, neginf=0.0)[..., None].unbind(dim=1)
    rows, columns = (count.clamp(min=1)[:, None] for count in valid_cells(mask))
    x = x0 + (x1 - x0) * (torch.arange(width, device=prior.device) + 0.5) / columns
    y = y0 + (y1 - y0) * (torch.arange(height, device=prior.device) + 0.5) / rows
    if fit == "crop":  # fractions of a whole image of so many cells, as fractions of R
        x = x * columns / ((x1 - x0).abs().clamp(min=1e-6) * size)
        y = y * rows / ((y1 - y0).abs().clamp(min=1e-6) * size)
    shape = (len(mask), height, width)
    places = torch.stack([(2 * x - 1)[:, None].expand(shape), (2 * y - 1)[..., None].expand(shape)], dim=3)
    values = F.grid_sample(
        prior.expand(len(mask), -1, -1, -1),
        places,
        mode="nearest" if fit == "crop" else "bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return values.masked_fill(~known[:, None, None, None], 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Objectness: what it learns, and what it says of boxes.


@torch.no_grad()
def box_coverage(targets: Sequence[Target], mask: Tensor) -> tuple[Tensor, Tensor]:
    """What the cells of a level are to learn.

    A cell is an object's where its centre lies in the inner half (of width and of height) of a box, or where the box
    has its centre in it, so that small boxes have a cell too. Cells between there and the box's border are left out.

    Args:
        targets: ``boxes`` [T, 4] cxcywh, fractions of the valid image, and, unless all are 1, ``scores`` [T].
        mask: bool [B, h, w], True = padding.

    Returns:
        How sure it is that each cell is an object's, float32 [B, h, w], 0 for background; and bool [B, h, w], which
        cells count, that is, no rims and no padding.
    """
    wanted = torch.zeros(mask.shape, device=mask.device)
    counts = ~mask
    rows, columns = (count.clamp(min=1) for count in valid_cells(mask))
    for image, target in enumerate(targets):
        boxes = target["boxes"].to(mask.device).float()
        if not len(boxes):
            continue
        scores = target["scores"].to(mask.device).float() if "scores" in target else torch.ones_like(boxes[:, 0])
        along_x = _along(boxes[:, 0], boxes[:, 2], mask.shape[2], columns[image])
        along_y = _along(boxes[:, 1], boxes[:, 3], mask.shape[1], rows[image])
        inner, whole, centre = (y[:, :, None] & x[:, None, :] for x, y in zip(along_x, along_y, strict=True))
        objects = inner | centre
        wanted[image] = (objects * scores[:, None, None]).amax(dim=0)
        counts[image] &= objects.any(dim=0) | ~whole.any(dim=0)
    return wanted.masked_fill(mask, 0.0), counts


def _along(centres: Tensor, sides: Tensor, cells: int, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis, which cells lie in the inner half of each box, in all of it, and which one has its centre."""
    place = (torch.arange(cells, device=centres.device) + 0.5) / valid
    away = (place - centres[:, None]).abs()
    holding = (centres * valid).floor().clamp(max=valid - 1)
    held = torch.arange(cells, device=centres.device) == holding[:, None]
    return away < sides[:, None] / 4, away < sides[:, None] / 2, held


def objectness_loss(logits: Tensor, wanted: Tensor, kind: ObjectnessLoss) -> Tensor:
    """Loss of every cell, any shape; one that is an object's with probability s counts s as such, the rest as none."""
    positive, negative = F.softplus(-logits), F.softplus(logits)
    if kind == "focal":
        chance = logits.sigmoid()
        positive = FOCAL_ALPHA * (1 - chance) ** FOCAL_GAMMA * positive
        negative = (1 - FOCAL_ALPHA) * chance**FOCAL_GAMMA * negative
    return wanted * positive + (1 - wanted) * negative


def objectness_at(objectness: Tensor, mask: Tensor, points: Tensor) -> Tensor:
    """Objectness [B, Q] of the cells of [B, h, w] that hold points (x, y) [B, Q, 2], fractions of the valid image."""
    rows, columns = (count.clamp(min=1)[:, None] for count in valid_cells(mask))
    x = (points[..., 0].detach().clamp(0, 1) * columns).long().minimum(columns - 1)
    y = (points[..., 1].detach().clamp(0, 1) * rows).long().minimum(rows - 1)
    return objectness.flatten(1).gather(1, y * mask.shape[2] + x)


def ranked_logits(logits: Tensor, objectness: Tensor) -> Tensor:
    """Logits [B, Q, K] of √(σ(o) · p), p the probabilities of ``logits`` [B, Q, K] and o of ``objectness`` [B, Q]."""
    present = F.logsigmoid(at_least_float32(objectness))[..., None]
    logs = 0.5 * (F.logsigmoid(at_least_float32(logits)) + present)
    logs = logs.clamp(max=-torch.finfo(logs.dtype).eps)
    return logs - torch.log(-torch.expm1(logs))
