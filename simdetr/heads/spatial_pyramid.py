"""Spatial pyramid pooling (SPP) whose internal layers are read too, not only its output.

Pooling loses information, and the layers before the last have lost less of it. Which of them are read is chosen, any
number of them; a convolution brings each to one width, and they are put together. Two forms: ``same_size``, max pools
of stride 1 on a map, as detectors of one stage have it, gives a map; ``bins``, max pools of a map or of an object's
window into 1, 2 x 2 and 4 x 4 bins (He et al. 2014), gives a vector. Padding is in no pool.
Source: US 2022/0121872 [0055] to [0057], [0097], Fig. 5; forms, sizes and widths are this library's.
Letters: B images, C channels, D channels of what comes out, h x w cells, k side of a pool or number of bins along a
side, N objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from simdetr.boxes import cxcywh_to_xyxy
from simdetr.data.legal_values import check_choice
from simdetr.detectors.detector import Features, FeatureSizes, Level
from simdetr.detectors.matcher import Target
from simdetr.heads.attention import checked_taps
from simdetr.heads.head import Head, HeadLosses, check_finite
from simdetr.heads.landmark_targets import valid_cells

Form = Literal["same_size", "bins"]
Combine = Literal["sum", "concat"]

SIZES: dict[str, tuple[int, ...]] = {"same_size": (5, 9, 13), "bins": (1, 2, 4)}
"""Sides of the pools, or numbers of bins along a side, where none are given."""
CONV_KERNEL = 1
ROI_CELLS = 7


class SpatialPyramid(nn.Module):
    """SPP of maps of C channels; the layers are ``in``, ``pool_k`` for every size k, ``concat`` and ``out``.

    ``same_size``: ``in`` is F, ``pool_k`` its max over k x k cells around each, ``concat`` F and the pools, ``out`` a
    1 x 1 convolution of ``concat`` to D channels. ``bins``: ``pool_k`` has k x k bins, ``concat`` and ``out`` are the
    vector of all bins, one after the other (21 C for 1, 2 and 4), and ``in`` is F's mean. Each layer that is tapped is
    convolved to D channels by a 1 x 1 convolution (``out`` of ``same_size`` is that already); they are added, or
    concatenated and convolved once more. ``out`` tapped alone is plain SPP and comes as it is.

    Args:
        channels: C.
        dim: D; None for C.
        form: ``same_size`` or ``bins``.
        sizes: k of the pools; None for 5, 9 and 13, or for 1, 2 and 4 bins.
        taps: names of the layers to read; None for ``in``, every pool and ``out``.
        combine: ``sum`` of the convolved taps, or ``concat`` and a 1 x 1 convolution.
        starts_at_zero: whether the last convolutions start at 0, so that nothing comes out at first; for what is added
            to features that others have learned already.

    Raises:
        ValueError: options outside their range or unknown, no taps, or unknown ones.
    """

    def __init__(
        self,
        channels: int,
        dim: int | None = None,
        form: Form = "same_size",
        sizes: Sequence[int] | None = None,
        taps: Sequence[str] | None = None,
        combine: Combine = "sum",
        starts_at_zero: bool = False,
    ) -> None:
        super().__init__()
        check_choice("form", form, Form)
        check_choice("combine", combine, Combine)
        self.form: Form = form
        self.channels, self.dim = channels, channels if dim is None else dim
        for name, count in (("channels", channels), ("dim", self.dim)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.sizes = checked_sizes(form, sizes)
        widths = self.layer_channels
        self.taps = checked_layers(taps, tuple(widths))
        self.is_plain = self.taps == ("out",)
        has_out = form == "same_size" and "out" in self.taps
        self.out = nn.Conv2d(widths["concat"], self.dim, CONV_KERNEL) if has_out else None
        convolved = [] if self.is_plain else [tap for tap in self.taps if tap != "out" or form == "bins"]
        self.convolve = nn.ModuleDict({f"to_{tap}": nn.Conv2d(widths[tap], self.dim, CONV_KERNEL) for tap in convolved})
        self.join: nn.Conv2d | None = None
        if combine == "concat" and not self.is_plain:
            self.join = nn.Conv2d(self.dim * len(self.taps), self.dim, CONV_KERNEL)
        if starts_at_zero:
            last: list[nn.Module | None] = [self.convolve, self.out] if self.join is None else [self.join]
            for weights in (w for part in last if part is not None for w in part.parameters()):
                nn.init.zeros_(weights)

    @property
    def layer_channels(self) -> dict[str, int]:
        """Channels, or elements, of every layer, in their order; those of ``out`` are what plain SPP gives."""
        bins = {f"pool_{k}": self.channels * (k * k if self.form == "bins" else 1) for k in self.sizes}
        together = sum(bins.values()) + (self.channels if self.form == "same_size" else 0)
        out = self.dim if self.form == "same_size" else together
        return {"in": self.channels, **bins, "concat": together, "out": out}

    @property
    def out_channels(self) -> int:
        """Channels, or elements, of what comes out."""
        return self.layer_channels["out"] if self.is_plain else self.dim

    def layers(self, features: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        """The internal layers by name, as the class describes them.

        Args:
            features: F [B, C, h, w]; objects' windows may take the place of images.
            padding: bool [B, h, w], True = padding; None for none. ``same_size`` has 0 there.

        Returns:
            ``same_size``: maps [B, ., h, w], ``out`` only if it is tapped. ``bins``: vectors [B, ., 1, 1].

        Raises:
            ValueError: features of another shape or not finite, or a map with fewer cells than bins.
        """
        shape = list(features.shape)
        if len(shape) != 4 or shape[1] != self.channels:
            raise ValueError(f"features: expected [B, {self.channels}, h, w], got {shape}")
        check_finite("features", features)
        if padding is None:
            padding = torch.zeros(shape[0], *shape[2:], dtype=torch.bool, device=features.device)
        if self.form == "bins":
            vectors = pooled_bins(features, padding, self.sizes)
            together = torch.cat(list(vectors.values()), dim=1)
            means = image_vectors(features, padding)
            return {
                name: vector[..., None, None]
                for name, vector in {"in": means, **vectors, "concat": together, "out": together}.items()
            }
        found = {"in": features.masked_fill(padding[:, None], 0.0)}
        found |= {f"pool_{k}": pooled_same_size(features, padding, k) for k in self.sizes}
        found["concat"] = torch.cat(list(found.values()), dim=1)
        if self.out is not None:
            found["out"] = self.out(found["concat"]).masked_fill(padding[:, None], 0.0)
        return found

    def forward(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        """The taps put together: a map [B, D, h, w], 0 in padding, or a vector [B, D]; arguments as of ``layers``."""
        return self.combined(self.layers(features, padding), padding)

    def combined(self, layers: dict[str, Tensor], padding: Tensor | None = None) -> Tensor:
        """As ``forward``, of ``layers`` that are there already."""
        if self.is_plain:
            found = layers["out"]
        else:
            parts = [
                self.convolve[f"to_{tap}"](layers[tap]) if f"to_{tap}" in self.convolve else layers[tap]
                for tap in self.taps
            ]
            found = torch.stack(parts).sum(dim=0) if self.join is None else self.join(torch.cat(parts, dim=1))
        if self.form == "bins":
            return found.flatten(1)
        return found if padding is None else found.masked_fill(padding[:, None], 0.0)


def checked_sizes(form: Form, sizes: Sequence[int] | None) -> tuple[int, ...]:
    """Sizes of the pools; a ValueError for none, for some twice, below 1, or even ones of ``same_size``."""
    chosen = SIZES[form] if sizes is None else tuple(sizes)
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 1:
        raise ValueError(f"sizes: expected different numbers of at least 1, got {list(chosen)}")
    if form == "same_size" and any(k % 2 == 0 for k in chosen):
        raise ValueError(f"sizes: expected odd numbers for 'same_size', got {list(chosen)}; even pools have no centre")
    return chosen


def checked_layers(taps: Sequence[str] | None, legal: Sequence[str]) -> tuple[str, ...]:
    """The taps in the layers' order; a ValueError for none, and for unknown ones, with the legal names."""
    if taps is None:
        return tuple(name for name in legal if name != "concat")
    unknown = [tap for tap in taps if tap not in legal]
    if not taps or unknown:
        got = f"{unknown[0]!r}" if unknown else "none"
        raise ValueError(f"taps: expected some of {', '.join(map(repr, legal))}, got {got}")
    return tuple(name for name in legal if name in taps)


def pooled_same_size(features: Tensor, padding: Tensor, size: int) -> Tensor:
    """Maximum [B, C, h, w] over size x size cells around each that are no padding; 0 in the padding."""
    low = features.masked_fill(padding[:, None], -torch.inf)
    return F.max_pool2d(low, size, stride=1, padding=size // 2).masked_fill(padding[:, None], 0.0)


def pooled_bins(features: Tensor, padding: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Maxima over k x k bins of the valid part of each map, as vectors [B, C k k] by the name ``pool_k``.

    Raises:
        ValueError: a valid part with fewer rows or columns than bins.
    """
    rows, columns = (count.tolist() for count in valid_cells(padding))
    smallest = min(*rows, *columns)
    if smallest < max(sizes):
        raise ValueError(
            f"features: expected at least {max(sizes)} x {max(sizes)} cells for as many bins, got a map with only "
            f"{smallest} in a row or column; use larger images, a finer level or fewer bins (sizes)"
        )
    parts = [image[:, :height, :width] for image, height, width in zip(features, rows, columns, strict=True)]
    return {f"pool_{k}": torch.stack([F.adaptive_max_pool2d(part, k).flatten() for part in parts]) for k in sizes}


# ----------------------------------------------------------------------------------------------------------------------
# Vectors of images and of objects.


def image_vectors(features: Tensor, padding: Tensor) -> Tensor:
    """Mean [B, C] of features [B, C, h, w] over the cells that are no padding, bool [B, h, w]."""
    kept = features.masked_fill(padding[:, None], 0.0)
    return kept.sum(dim=(2, 3)) / (~padding).sum(dim=(1, 2)).clamp(min=1)[:, None]


def object_windows(features: Tensor, padding: Tensor, boxes_cxcywh: Sequence[Tensor], cells: int = ROI_CELLS) -> Tensor:
    """What lies in the boxes, by RoIAlign [N, C, cells, cells], image by image; padding has no part in it.

    Args:
        features: [B, C, h, w].
        padding: bool [B, h, w], True = padding.
        boxes_cxcywh: boxes of each image [T, 4], fractions of the valid image.
        cells: along a side of a window.
    """
    rows, columns = valid_cells(padding)
    sizes = torch.stack([columns, rows, columns, rows], dim=1)
    corners = [
        cxcywh_to_xyxy(boxes.to(features.device)).clamp(0, 1).to(features.dtype) * size
        for boxes, size in zip(boxes_cxcywh, sizes, strict=True)
    ]
    # interpolation at the border reads the cell beyond it, so weigh it out
    valid = (~padding[:, None]).to(features.dtype)
    kept = features.masked_fill(padding[:, None], 0.0)
    values, weights = (roi_align(part, corners, cells, sampling_ratio=2, aligned=True) for part in (kept, valid))
    windows: Tensor = values / weights.clamp(min=1e-3)
    return windows


def object_vectors(features: Tensor, padding: Tensor, boxes_cxcywh: Sequence[Tensor]) -> Tensor:
    """Mean [N, C] of what lies in each box; arguments as of ``object_windows``."""
    return object_windows(features, padding, boxes_cxcywh).mean(dim=(2, 3))


# ----------------------------------------------------------------------------------------------------------------------
# On a detector.


class SpatialPyramidNeck(Head):
    """Spatial pyramids on the feature maps that a detector's encoder reads; it predicts nothing of its own.

    Args:
        sizes: what it is built for.
        levels: indices of the levels with a pyramid; None for the coarsest alone, as usual.
        pools: sides of the max pools, odd.
        taps: as in ``SpatialPyramid``.
        combine: as in ``SpatialPyramid``.
        residual: add what comes of the taps to the features, starting at 0, so that the features of a trained detector
            are as they were at first. Otherwise it takes their place.

    Raises:
        ValueError: as of ``SpatialPyramid``; levels that are not there; a backbone without a detector.
    """

    name = "spatial_pyramid"
    needs = frozenset({"levels", "queries"})
    is_neck = True
    takes_unlabelled = True

    def __init__(
        self,
        sizes: FeatureSizes,
        levels: Sequence[int] | None = None,
        pools: Sequence[int] = SIZES["same_size"],
        taps: Sequence[str] | None = None,
        combine: Combine = "sum",
        residual: bool = True,
    ) -> None:
        super().__init__()
        coarsest = len(sizes.level_channels) - 1
        self.levels = checked_taps((coarsest,) if levels is None else levels, coarsest + 1, "levels")
        self.residual = residual
        self.init_args = {
            "levels": None if levels is None else list(levels),
            "pools": list(pools),
            "taps": None if taps is None else list(taps),
            "combine": combine,
            "residual": residual,
        }
        widths = [sizes.level_channels[index] for index in self.levels]
        self.pyramids = nn.ModuleList(
            SpatialPyramid(width, width, "same_size", pools, taps, combine, starts_at_zero=residual) for width in widths
        )

    def pass_level(self, index: int, level: Level) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The level's features with those of its pyramid, and its internal layers to look at; see ``Head``."""
        if index not in self.levels:
            return level.features, None
        pyramid: Any = self.pyramids[self.levels.index(index)]
        layers = pyramid.layers(level.features, level.mask)
        found = pyramid.combined(layers, level.mask).to(level.features.dtype)
        return (level.features + found if self.residual else found), layers

    def forward(self, features: Features) -> None:
        """Nothing: its work is done on the way."""

    def losses(self, outputs: Any, features: Features, targets: Sequence[Target]) -> HeadLosses:  # noqa: ANN401
        """None of its own: it learns from what reads the features."""
        watched = torch.stack([features.levels[index].features.sum() for index in self.levels])
        return HeadLosses(0.0 * watched.sum(), {}, {})

    def predictions(self, outputs: Any, features: Features) -> dict[str, Tensor]:  # noqa: ANN401
        """Nothing beside the detector's."""
        return {}
