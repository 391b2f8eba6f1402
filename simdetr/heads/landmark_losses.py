"""Class loss and class-weighted point loss of landmarks: class scores and point errors in, losses per sample out.

Source: US 11,544,507, Equations 1-7. Letters: N samples, M classes. Classes are numbered 0..M-1, and the
class M, the last column of softmax scores, is the background that the document calls class 0. p are scores, P^C is the
probability of the true class C, u the class loss, S the point error, λ the weight of points:

    eq4   u + λ · P^C · S              Equations 1 to 4
    eq5   u + λ · S                    no coupling, to compare with
    eq6   u + λ · exp(-u) · S          equal to eq4 where u = -log P^C
    eq7   u + λ · exp(-u) · S²

The document writes 5 to 7 without λ; here it weighs all of them alike, so that they can be compared. Background has no
point: there the loss is u alone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simdetr.data.legal_values import check_choice
from simdetr.detectors.matcher import at_least_float32

Mode = Literal["eq4", "eq5", "eq6", "eq7"]
WeightGradient = Literal["auto", "coupled", "detached"]
ClassWeight = Literal["softmax", "sigmoid"]
Unit = Literal["fraction", "pixel", "cell"]

LOG = logging.getLogger(__name__)


class SampleLosses(NamedTuple):
    """Losses of N samples, each [N]."""

    total: Tensor  # What is minimised, Equation 1
    class_loss: Tensor  # u, Equation 2
    point_loss: Tensor  # The coupled point error without λ, Equation 4; 0 for background
    probability: Tensor  # P^C, Equation 3; without gradient
    error: Tensor  # S, whatever the equation; 0 for background, without gradient
    reversed: Tensor  # bool; whether, coupled, the point error would outweigh the class loss and un-learn the class


@dataclass(frozen=True)
class LandmarkRule:
    """How class and point are weighed against each other.

    Attributes are those of ``LandmarkHead``. ``weight_gradient`` is of the weight of the point error, P^C or exp(-u):
    where λ · P^C · S > 1 it un-learns the class. ``class_weight`` says what P^C is of: ``softmax`` scores with a column
    for background, u = -log P^C; or ``sigmoid`` scores, each class on its own, u = binary cross-entropy of all.

    Raises:
        ValueError: an unknown option, a negative λ, a β that is not positive.
    """

    mode: Mode = "eq4"
    point_weight: float = 0.5
    beta: float = 0.1
    weight_gradient: WeightGradient = "auto"
    class_weight: ClassWeight = "softmax"
    unit: Unit = "cell"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, Mode)
        check_choice("weight_gradient", self.weight_gradient, WeightGradient)
        check_choice("class_weight", self.class_weight, ClassWeight)
        check_choice("unit", self.unit, Unit)
        if not self.point_weight >= 0:
            raise ValueError(f"point_weight (lambda) must be at least 0, got {self.point_weight}")
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}; 0.1 is the default")
        if self.weight_gradient == "coupled" and self.mode != "eq5" and self._may_reverse():
            LOG.warning(
                "weight_gradient 'coupled' with point_weight %g and errors in the unit %r: a point error can outweigh "
                "the class loss, and training then un-learns the class. Keep point_weight * (2 - beta) at 1 or less "
                "in fractions of the image, or take 'auto'; reversal_rate counts such samples.",
                self.point_weight,
                self.unit,
            )

    def _may_reverse(self) -> bool:
        """Whether λ · S or λ · S² can exceed 1 for points within the image."""
        worst = 2 - self.beta if self.beta < 1 else 1 / self.beta
        return self.unit != "fraction" or self.point_weight * (worst**2 if self.mode == "eq7" else worst) > 1


def point_error(points: Tensor, targets: Tensor, beta: float) -> Tensor:
    """S [...], the smooth L1 distance of points [..., 2] summed over x and y; ``beta`` is in their unit.

    It is 0, and without gradient, where the target is unknown (NaN).
    """
    targets = torch.where(targets.isnan(), points.detach(), targets)
    return F.smooth_l1_loss(points, targets, beta=beta, reduction="none").sum(dim=-1)


def landmark_losses(logits: Tensor, classes: Tensor, errors: Tensor, rule: LandmarkRule) -> SampleLosses:
    """Equations 1 to 7 for each sample.

    Scores p are [N, M + 1] with background last for softmax, [N, M] for sigmoid; true classes C int64 [N], M for
    background; errors S [N], without meaning for background.
    """
    loss, probability = _class_terms(logits, classes, rule.class_weight)
    num_classes = logits.shape[-1] - (rule.class_weight == "softmax")
    # chosen, not multiplied by 0: the error of background may be anything
    errors = torch.where(classes < num_classes, errors, 0.0)
    effective = errors.square() if rule.mode == "eq7" else errors
    weight = {"eq4": probability, "eq5": torch.ones_like(loss)}.get(rule.mode, torch.exp(-loss))
    # in eq5 nothing is coupled that could be reversed
    outweighed = (rule.point_weight * weight * effective > 1) & (rule.mode != "eq5")
    if rule.weight_gradient == "detached":
        weight = weight.detach()
    elif rule.weight_gradient == "auto":
        weight = torch.where(outweighed, weight.detach(), weight)
    point_loss = weight * effective
    total = loss + rule.point_weight * point_loss
    return SampleLosses(total, loss, point_loss, probability.detach(), errors.detach(), outweighed)


def background_loss(logits: Tensor, rule: LandmarkRule) -> Tensor:
    """Class loss u of scores [..., M + 1] or [..., M] whose true class is the background; [...]."""
    if rule.class_weight == "softmax":
        return -logits.log_softmax(dim=-1)[..., -1]
    return F.softplus(logits).sum(dim=-1)


def record_logits(logits: Tensor) -> Tensor:
    """Softmax scores [..., M + 1] as a detector's logits [..., M], float32 or wider.

    Of each row one class at most, as the document reports one class per landmark: the sigmoid of the most probable
    class's logit is the confidence that there is a landmark at all, 1 - P^background; all other classes, and all of a
    row whose most probable class is the background, are -inf, which is no detection.
    """
    logits = at_least_float32(logits)
    foreground, background = logits[..., :-1], logits[..., -1:]
    confidence = foreground.logsumexp(dim=-1, keepdim=True) - background
    best, place = foreground.max(dim=-1, keepdim=True)
    records = torch.full_like(foreground, -torch.inf)
    return records.scatter(-1, place, torch.where(best > background, confidence, -torch.inf))


def _class_terms(logits: Tensor, classes: Tensor, class_weight: ClassWeight) -> tuple[Tensor, Tensor]:
    """Class loss u and P^C, both [N]."""
    if class_weight == "softmax":
        log_probability = logits.log_softmax(dim=-1).gather(-1, classes[:, None])[:, 0]
        return -log_probability, log_probability.exp()
    count = logits.shape[-1]
    wanted = F.one_hot(classes, count + 1)[:, :count].to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(dim=-1)
    true = logits.gather(-1, classes.clamp(max=count - 1)[:, None])[:, 0].sigmoid()
    return loss, torch.where(classes < count, true, torch.exp(-loss))
