"""Landmark head: class and class-specific reference point of landmarks, the class learned before the place.

In: queries of a detector, or feature maps of a backbone. Out: classes and points; in training the losses of US
11,544,507, Equations 1 to 7 (``landmark_losses``), whose point error counts as much as the class is already known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from simdetr.data.legal_values import check_choice
from simdetr.detectors.detector import Features, FeatureSizes
from simdetr.detectors.losses import global_mean_count
from simdetr.detectors.matcher import Target
from simdetr.heads.head import Head, HeadLosses, check_needs, check_targets
from simdetr.heads.landmark_grid import GridLandmarks, GridOutputs, PointOutput, Selection
from simdetr.heads.landmark_losses import ClassWeight, LandmarkRule, Mode, Unit, WeightGradient
from simdetr.heads.landmark_queries import QueryLandmarks, QueryOutputs
from simdetr.heads.landmark_targets import LandmarkTargets

Variant = Literal["query", "grid"]
Reduction = Literal["landmarks", "sum"]


class LandmarkHead(Head):
    """Classes and reference points, by query of a detector or by subregion of the image.

    Training needs ``points`` in the targets (``data.reference_points``). A landmark without point learns its class
    only, one without box has no extent: it lies in one subregion, and matching does without its box.

    Args:
        sizes: of the features it reads.
        variant: ``query``, one landmark per query of a decoder; ``grid``, as the document has it, several per subregion
            of one feature map, for backbones alone.
        mode: which equation: ``eq4`` the document's, ``eq5`` without coupling, ``eq6``, ``eq7``.
        point_weight: λ, weight of the point error.
        beta: error from which smooth L1 grows linearly, in ``unit``.
        unit: of point errors: ``cell`` of the grid, ``fraction`` of the image, ``pixel`` (rounded up to the finest
            map's stride). Errors are a small part of the image: measured in ``fraction`` they hardly count beside the
            class loss, and all equations are nearly one.
        weight_gradient: whether the class learns from the point error: ``coupled`` literally, ``auto`` unless that
            would un-learn it, ``detached`` never.
        class_weight: query variant: ``softmax``, own classes with background; ``sigmoid``, the detector's classes,
            which then learn from both losses. The grid has classes of its own.
        reduction: divide the losses by the number of landmarks of all processes, or not (``sum``, literally).
        background_weight: query variant: weight of the class loss of unmatched queries. An image has a few landmarks
            and hundreds of queries; at weight 1 background would be most of what is learned. 0.1 is DETR's.
        shared: query variant: one set of weights for all predictions of the decoder.
        match_boxes: query variant: match by the detector's boxes too, where landmarks have a box.
        grid: rows and columns of subregions; of the query variant only what ``cell`` means, best about the size of a
            landmark.
        anchors: grid variant: anchor nodes per subregion, 1 or 5.
        level: grid variant: which feature map, fine to coarse; None for the coarsest that is at least as large as the
            grid.
        point_output: grid variant: points as ``offset`` from the anchor node, or ``absolute``.
        selection: grid variant: which subregions are trained: those of landmarks and as many of the background
            (``balanced``), ``all``, or only ``positive``.
        top_anchors: grid variant: how many anchor nodes of a subregion are trained, the most confident ones; 1 for the
            best, None for all.
        anchor_threshold: grid variant: confidence below which an anchor node is not trained; 0 for all.

    Raises:
        ValueError: an unknown option, a value outside its range, or features that lack what the variant reads.
    """

    name = "landmark"

    def __init__(
        self,
        sizes: FeatureSizes,
        variant: Variant = "query",
        mode: Mode = "eq4",
        point_weight: float = 0.5,
        beta: float = 0.1,
        unit: Unit = "cell",
        weight_gradient: WeightGradient = "auto",
        class_weight: ClassWeight = "softmax",
        reduction: Reduction = "landmarks",
        background_weight: float = 0.1,
        shared: bool = False,
        match_boxes: bool = True,
        grid: Sequence[int] = (4, 5),
        anchors: int = 5,
        level: int | None = None,
        point_output: PointOutput = "offset",
        selection: Selection = "balanced",
        top_anchors: int | None = None,
        anchor_threshold: float = 0.0,
    ) -> None:
        own = {name: value for name, value in locals().items() if name not in ("self", "__class__", "sizes")}
        super().__init__()
        self.init_args = own | {"grid": list(grid)}
        check_choice("variant", variant, Variant)
        check_choice("reduction", reduction, Reduction)
        check_choice("point_output", point_output, PointOutput)
        check_choice("selection", selection, Selection)
        self.needs = frozenset(["queries"] if variant == "query" else ["levels"])
        check_needs(self, sizes)
        rule = LandmarkRule(mode, point_weight, beta, weight_gradient, class_weight, unit)
        _check_ranges(self.init_args, len(sizes.level_channels))
        self.num_classes, self.point_weight, self.reduction = sizes.num_classes, point_weight, reduction
        cells = (grid[0], grid[1])
        self.variant: QueryLandmarks | GridLandmarks
        if variant == "query":
            self.variant = QueryLandmarks(sizes, rule, cells, shared, match_boxes, background_weight)
        else:
            self.variant = GridLandmarks(
                sizes, rule, cells, anchors, level, point_output, selection, top_anchors, anchor_threshold
            )

    def forward(self, features: Features) -> QueryOutputs | GridOutputs:
        """Class scores and points, see the variants."""
        outputs: QueryOutputs | GridOutputs = self.variant(features)
        return outputs

    def losses(self, outputs: Any, features: Features, targets: Sequence[Target]) -> HeadLosses:  # noqa: ANN401
        """Class and point losses; ``points`` of the targets are NaN, boxes without area, where they are unknown.

        Returns:
            ``loss_class`` and ``loss_point``, summed over the decoder's predictions; the total is the first plus λ
            times the second. ``reversal_rate``, the part of the landmarks' samples where λ · P^C · S > 1,
            ``true_probability``, their mean P^C, and ``point_error``, their mean S.

        Raises:
            ValueError: targets that do not fit the batch or the classes, or lack points.
        """
        check_targets(targets, len(features.levels[0].features), self.num_classes)
        wanted = LandmarkTargets.of(targets, outputs.points.device)
        # 0 · Σ keeps the graph where there is nothing to learn, and spreads NaN to the loss
        attached = 0.0 * (outputs.logits.sum() + outputs.points.sum())
        divisor = global_mean_count(sum(wanted.counts), outputs.points.device) if self.reduction == "landmarks" else 1.0
        if not sum(wanted.counts):
            terms = dict.fromkeys(("loss_class", "loss_point"), torch.zeros_like(attached))
            watched = dict.fromkeys(("reversal_rate", "true_probability", "point_error"), torch.zeros_like(attached))
            return HeadLosses(attached, terms, watched)
        losses, weight, is_landmark, others = self.variant.samples(outputs, features, wanted)
        class_loss = ((weight * losses.class_loss).sum() + others) / divisor
        point_loss = (weight * losses.point_loss).sum() / divisor
        positive = weight * is_landmark
        count = positive.sum().clamp(min=1)
        seen = {"reversal_rate": losses.reversed, "true_probability": losses.probability, "point_error": losses.error}
        watched = {name: (positive * values).sum() / count for name, values in seen.items()}
        total = class_loss + self.point_weight * point_loss + attached
        return HeadLosses(total, {"loss_class": class_loss.detach(), "loss_point": point_loss.detach()}, watched)

    def predictions(self, outputs: Any, features: Features) -> dict[str, Tensor]:  # noqa: ANN401
        """Points and classes beside a detector's predictions, or a detector's predictions standalone.

        Query variant: ``pred_points`` [B, Q, 2] and, with own classes, ``point_logits`` [B, Q, M]. Grid variant, on a
        backbone: ``pred_logits`` [B, G · A, M], ``pred_boxes`` [B, G · A, 4], cxcywh without size at the point,
        ``pred_points`` [B, G · A, 2] and ``point_cells`` [B, 2], the size of a subregion. Logits are those of
        ``record_logits``: one class per row, with confidence 1 less the background's probability.
        """
        return self.variant.predictions(outputs, features)


def _check_ranges(options: dict[str, Any], num_levels: int) -> None:
    """Raise a ValueError for numbers that mean nothing."""
    top, grid, own_scores = options["top_anchors"], options["grid"], options["variant"] == "grid"
    levels = range(-num_levels, num_levels)
    wrong = {
        "background_weight must be at least 0": options["background_weight"] < 0,
        "grid must be rows and columns, both at least 1": len(grid) != 2 or min(grid) < 1,
        "anchors must be 1 (the centre) or 5 (and four around it)": options["anchors"] not in (1, 5),
        f"level must be None or {-num_levels} to {num_levels - 1}": options["level"] not in (None, *levels),
        "top_anchors must be None (all) or at least 1": top is not None and top < 1,
        "anchor_threshold must be 0 to 1": not 0 <= options["anchor_threshold"] <= 1,
        "class_weight must be 'softmax' for the variant 'grid', which has class scores of its own": (
            own_scores and options["class_weight"] != "softmax"
        ),
    }
    for text, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"{text}, got {options[text.split()[0]]!r}")
