"""Features that do not tell labelled images from unlabelled ones, learned against discriminators by gradient reversal.

A detector learns from few labelled images and works on all others. Two discriminators learn to tell from its features
whether people have labelled the image: one from its feature maps, one from the vectors of its objects. On the way back
their gradient is multiplied by -λ before it reaches the features, which thus learn to tell nothing. Forward nothing is
changed: negated features would only rename the discriminator's input. λ rises with the training, when discriminators
have something to say: λ(p) = λ_max (2 / (1 + exp(-10 p)) - 1), p the share of the training that is done.
Source: US 2022/0121872 [0059], [0088], [0102], claims 9 and 10; schedule of Ganin and Lempitsky (2015), discriminators
and consistency of Chen et al. (Domain Adaptive Faster R-CNN, 2018).
Letters: B images, C channels, h x w cells of a level, Q queries, D their channels, N objects.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simdetr.data.legal_values import check_choice
from simdetr.detectors.detector import Features, FeatureSizes
from simdetr.detectors.matcher import HungarianMatcher, Target, at_least_float32
from simdetr.heads.attention import checked_taps
from simdetr.heads.head import Head, HeadLosses, check_needs, is_labelled
from simdetr.heads.localisation_losses import check_not_negative

LOG = logging.getLogger(__name__)
Schedule = Literal["rising", "constant"]
Objects = Literal["matched", "top"]

RISE = 10.0
COLLAPSED = 0.05
"""Accuracy below which a discriminator has not lost, but is wrong on purpose: features and it run in a circle."""
LOSS_FACTOR = 2.0
"""Times the lowest loss of the task so far, from which on the adversary does it harm."""


class _Reversed(torch.autograd.Function):
    """The identity, with the gradient times -λ."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: float) -> Tensor:  # noqa: ANN401
        ctx.scale = scale
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return -ctx.scale * gradients[0], None


def reverse_gradient(values: Tensor, scale: float = 1.0) -> Tensor:
    """The same values, any shape, whose gradient is multiplied by -λ on its way back.

    Args:
        values: To look at.
        scale: λ; 0 stops the gradient.

    Raises:
        ValueError: λ below 0, which would let the features help the discriminator.
    """
    check_not_negative({"scale": scale})
    reversed_: Tensor = _Reversed.apply(values, scale)
    return reversed_


def reversal_scale(progress: float, highest: float = 0.1, schedule: Schedule = "rising") -> float:
    """λ when a share ``progress``, 0 to 1, of the training is done; ``highest`` is λ_max, at once if ``constant``.

    Raises:
        ValueError: a progress outside [0, 1], a negative λ_max, or an unknown schedule.
    """
    check_choice("schedule", schedule, Schedule)
    check_not_negative({"highest": highest})
    if not 0 <= progress <= 1:
        raise ValueError(f"progress: expected a share of the training in [0, 1], got {progress}")
    return highest if schedule == "constant" else highest * (2 / (1 + math.exp(-RISE * progress)) - 1)


class ImageDiscriminator(nn.Module):
    """From a feature map [B, C, h, w] to a logit of every cell [B, h, w]: is the image unlabelled?

    Args:
        channels: C.
        hidden: channels in between.
    """

    def __init__(self, channels: int, hidden: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, h, w]."""
        logits: Tensor = self.layers(features)[:, 0]
        return logits


class ObjectDiscriminator(nn.Module):
    """From vectors of objects [..., D] to a logit of each [...]: is its image unlabelled?

    Args:
        channels: D.
        hidden: width of both layers in between.
        dropout: probability of dropout after each of them.
    """

    def __init__(self, channels: int, hidden: int = 1024, dropout: float = 0.5) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for width in (channels, hidden):
            parts += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*parts, nn.Linear(hidden, 1))

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits [...]."""
        logits: Tensor = self.layers(vectors)[..., 0]
        return logits


# ----------------------------------------------------------------------------------------------------------------------
# Losses. An image, or object, of an unlabelled image is y = 1, of a labelled one y = 0.


class DomainLoss(NamedTuple):
    """What a discriminator says."""

    loss: Tensor  # Binary cross-entropy
    accuracy: Tensor  # Share that it tells right, without gradient


def domain_loss(logits: Tensor, unlabelled: Tensor, weights: Tensor | None = None) -> DomainLoss:
    """Mean cross-entropy and accuracy of both domains, each of which counts half; 0 where one of them is missing.

    Args:
        logits: of images or objects [N], or of the cells of images [N, ...].
        unlabelled: y, bool [N].
        weights: share in [0, 1] that each logit counts, shaped like ``logits``, such as 0 for padding; None for 1.
    """
    logits = at_least_float32(logits)
    wanted = unlabelled.to(logits.dtype).view(-1, *[1] * (logits.ndim - 1)).expand_as(logits)
    weights = torch.ones_like(logits) if weights is None else weights.to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    right = ((logits > 0) == (wanted > 0.5)).to(logits.dtype)
    per_row = [_mean_per_row(values, weights) for values in (each, right.detach())]
    sides = [unlabelled, ~unlabelled]
    present = torch.stack([side.any() for side in sides]).all()
    loss, accuracy = (
        torch.stack([(values * side).sum() / side.sum().clamp(min=1) for side in sides]).mean() * present
        for values in per_row
    )
    return DomainLoss(loss, accuracy)


def _mean_per_row(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean [N] of values [N, ...]."""
    if values.ndim == 1:
        return values * weights
    return (values * weights).flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1).clamp(min=1e-6)


def consistency_loss(cells: Sequence[Tensor], valid: Sequence[Tensor], objects: Tensor, image: Tensor) -> Tensor:
    """Mean of |mean over the cells of p_image - p_object| over the objects; 0 without any.

    Args:
        cells: logits of each level [B, h, w]; the levels' means are averaged.
        valid: bool of each level [B, h, w], False = padding.
        objects: logits [N].
        image: the image of each, int64 [N].
    """
    means = [
        _mean_per_row(at_least_float32(found).sigmoid(), kept.float()) for found, kept in zip(cells, valid, strict=True)
    ]
    apart = torch.stack(means).mean(dim=0)[image] - at_least_float32(objects).sigmoid()
    return apart.abs().sum() / max(1, len(objects))


def adversary_alarms(accuracies: Mapping[str, float], task_losses: Sequence[float]) -> list[str]:
    """What is wrong with a training, in sentences; nothing if all is well.

    Args:
        accuracies: of the last epoch, of each discriminator by what it judges.
        task_losses: of the detector, one per epoch.
    """
    found = [
        f"the discriminator of {name}s is right on {accuracy:.1%} only: it is wrong on purpose, and features chase it; "
        "lower highest_scale"
        for name, accuracy in accuracies.items()
        if accuracy < COLLAPSED
    ]
    if len(task_losses) > 1 and task_losses[-1] >= LOSS_FACTOR * min(task_losses[:-1]):
        found.append(
            f"the task's loss rose from {min(task_losses[:-1]):.4g} to {task_losses[-1]:.4g}: alignment does harm; "
            "lower highest_scale or the weights"
        )
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Which queries of a decoder are objects.


class ChosenQueries(NamedTuple):
    """N queries of a batch."""

    image: Tensor  # int64 [N]
    query: Tensor  # int64 [N]


@torch.no_grad()
def top_queries(logits: Tensor, image: Tensor, count: int, total: int | None = None) -> ChosenQueries:
    """The most confident queries of some images.

    Args:
        logits: of the classes [B, Q, K].
        image: which images, int64 [n].
        count: most of each image.
        total: most of all; first the best of every image, then the second best, the more confident first.
    """
    count = min(count, logits.shape[1])
    scores, query = logits[image].amax(dim=2).topk(count, dim=1)
    owner = image[:, None].expand_as(query)
    if total is None or total >= query.numel():
        return ChosenQueries(owner.flatten(), query.flatten())
    # whole columns (ranks) come first, and within the last of them the most confident
    order = torch.cat([column.argsort(descending=True) + place * len(image) for place, column in enumerate(scores.T)])
    kept = order[:total]
    return ChosenQueries(owner.T.flatten()[kept], query.T.flatten()[kept])


# ----------------------------------------------------------------------------------------------------------------------
# On a detector.


class DomainAdversary(Head):
    """Both discriminators on a detector: of its feature maps, and of its decoder's last states.

    Batches hold labelled and unlabelled images, as many of both (``data.unlabelled``); targets of the latter say
    ``labelled`` False, and the detector's own loss looks at the former alone. A batch of one domain teaches nothing.
    It predicts nothing: inference and export leave it out.

    Args:
        sizes: what it is built for.
        highest_scale: λ_max.
        schedule: of λ: ``rising`` from 0 with the progress of the training, or ``constant``.
        image_weight: of the loss of images; 0 builds no discriminator for them.
        object_weight: of the loss of objects, likewise.
        consistency_weight: of the loss that asks both to agree, see ``consistency_loss``; its gradient is not reversed.
        levels: indices of the levels that tell of images, fine to coarse; None for all.
        objects: objects of labelled images are the queries ``matched`` with their boxes, and as many of the most
            confident ones of unlabelled images; or the ``top`` most confident ones of all images.
        num_objects: most objects of an image.
        image_hidden: channels of the discriminator of images.
        object_hidden: width of the discriminator of objects.
        dropout: of the discriminator of objects.

    Raises:
        ValueError: options outside their range or unknown, or features that lack what it reads.
    """

    name = "domain"
    takes_unlabelled = True

    def __init__(
        self,
        sizes: FeatureSizes,
        highest_scale: float = 0.1,
        schedule: Schedule = "rising",
        image_weight: float = 1.0,
        object_weight: float = 1.0,
        consistency_weight: float = 0.0,
        levels: Sequence[int] | None = None,
        objects: Objects = "matched",
        num_objects: int = 20,
        image_hidden: int = 512,
        object_hidden: int = 1024,
        dropout: float = 0.5,
    ) -> None:
        self.init_args = {name: v for name, v in locals().items() if name not in ("self", "__class__", "sizes")}
        super().__init__()
        self.levels = checked_taps(levels, len(sizes.level_channels), "levels")
        self.init_args["levels"] = None if levels is None else list(levels)
        check_choice("schedule", schedule, Schedule)
        check_choice("objects", objects, Objects)
        weights = ("highest_scale", "image_weight", "object_weight", "consistency_weight")
        check_not_negative({name: self.init_args[name] for name in weights})
        if image_weight == object_weight == 0:
            raise ValueError("image_weight and object_weight are both 0; set at least one")
        if consistency_weight > 0 and 0 in (image_weight, object_weight):
            raise ValueError(
                f"consistency_weight: expected 0 with only one discriminator, got {consistency_weight}; both have to "
                "be there to agree"
            )
        for name in ("num_objects", "image_hidden", "object_hidden"):
            if self.init_args[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {self.init_args[name]}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.needs = frozenset({"levels", "queries"})
        check_needs(self, sizes)
        self.highest_scale, self.schedule, self.progress = highest_scale, schedule, 0.0
        self.image_weight, self.object_weight = image_weight, object_weight
        self.consistency_weight, self.objects, self.num_objects = consistency_weight, objects, num_objects
        channels = [sizes.level_channels[index] for index in self.levels] if image_weight > 0 else []
        self.image_discriminators = nn.ModuleList(ImageDiscriminator(width, image_hidden) for width in channels)
        self.object_discriminator: ObjectDiscriminator | None = None
        if object_weight > 0:
            assert sizes.query_channels is not None
            self.object_discriminator = ObjectDiscriminator(sizes.query_channels, object_hidden, dropout)
        self.matcher = HungarianMatcher()
        self._has_warned = False

    def set_progress(self, progress: float) -> None:
        """λ follows it."""
        self.progress = progress

    def alarms(self, epochs: Sequence[Mapping[str, float]], prefix: str) -> list[str]:
        """Those of ``adversary_alarms``; the task's loss is all but the adversary's own."""
        last = epochs[-1] if epochs else {}
        accuracies = {name: last[key] for name in ("image", "object") if (key := f"{prefix}{name}_accuracy") in last}
        own = [
            sum(weight * epoch.get(f"{prefix}{name}", 0.0) for name, weight in self._weights.items())
            for epoch in epochs
        ]
        return adversary_alarms(accuracies, [epoch["loss"] - part for epoch, part in zip(epochs, own, strict=True)])

    @property
    def _weights(self) -> dict[str, float]:
        """Of the terms of its loss."""
        return {"image": self.image_weight, "object": self.object_weight, "consistency": self.consistency_weight}

    @property
    def scale(self) -> float:
        """λ at this point of the training."""
        return reversal_scale(self.progress, self.highest_scale, self.schedule)

    @property
    def deployed(self) -> None:
        """Nothing: it serves training alone."""

    def forward(self, features: Features) -> list[Tensor]:
        """Logits of the cells [B, h, w] of each of its levels, in training; nothing in evaluation mode."""
        return self._of_cells(features, reverse=True) if self.training else []

    def _of_cells(self, features: Features, *, reverse: bool) -> list[Tensor]:
        maps = [features.levels[index].features for index in self.levels]
        pairs = zip(self.image_discriminators, maps, strict=False)  # no discriminators, no pairs
        return [judge(self._scaled(found, reverse=reverse)) for judge, found in pairs]

    def _scaled(self, values: Tensor, *, reverse: bool) -> Tensor:
        """The same, whose gradient is multiplied by -λ, or by λ."""
        turned = reverse_gradient(values, self.scale)
        return turned if reverse else reverse_gradient(turned, 1.0)

    def losses(self, outputs: list[Tensor], features: Features, targets: Sequence[Target]) -> HeadLosses:
        """L_img and L_obj, which the discriminators reduce, and the features before them raise.

        Returns:
            Terms ``image``, ``object`` and, where asked for, ``consistency``; ``image_accuracy``, ``object_accuracy``,
            ``scale``, λ, and ``alarm``, 1 where a discriminator's accuracy has collapsed. Terms are 0 and accuracies
            left out where a batch has one domain only, those of objects also where it has no objects.

        Raises:
            ValueError: not one target per image.
        """
        batch = len(features.levels[0].features)
        if len(targets) != batch:
            raise ValueError(f"targets: expected one per image ({batch}), got {len(targets)}")
        flags = [not is_labelled(target) for target in targets]
        both = any(flags) and not all(flags)
        if not both and not self._has_warned:
            self._has_warned = True
            which = "unlabelled" if all(flags) else "labelled"
            LOG.warning(
                "%s: all images of a batch are %s, so it teaches the discriminators nothing; give data.unlabelled",
                type(self).__name__,
                which,
            )
        device = features.levels[0].features.device
        unlabelled = torch.tensor(flags, device=device)
        valid = [~features.levels[index].mask for index in self.levels]
        attached = 0.0 * torch.stack([weights.sum() for weights in self.parameters()]).sum()
        attached = attached + 0.0 * sum(logits.sum() for logits in outputs)
        terms: dict[str, Tensor] = {}
        accuracies: dict[str, Tensor] = {}
        if outputs:
            found = [domain_loss(logits, unlabelled, kept) for logits, kept in zip(outputs, valid, strict=True)]
            terms["image"] = torch.stack([level.loss for level in found]).mean()
            accuracies["image_accuracy"] = torch.stack([level.accuracy for level in found]).mean()
        chosen = self._objects(features, targets, unlabelled) if both else None
        if self.object_discriminator is not None:
            terms["object"] = attached.detach()
            if chosen is not None and len(chosen.image):
                logits = self.object_discriminator(self._scaled(self._states(features, chosen), reverse=True))
                terms["object"], accuracies["object_accuracy"] = domain_loss(logits, unlabelled[chosen.image])
        if self.consistency_weight > 0:
            terms["consistency"] = attached.detach()
            if chosen is not None and len(chosen.image):
                terms["consistency"] = self._consistency(features, valid, chosen)
        total = attached + sum(self._weights[name] * term for name, term in terms.items())
        if not both:
            return HeadLosses(
                total, {name: term.detach() for name, term in terms.items()}, {"scale": self._number(total)}
            )
        collapsed = [accuracy < COLLAPSED for accuracy in accuracies.values()]
        alarm = torch.stack(collapsed).any() if collapsed else torch.zeros_like(total.detach())
        watched = {**accuracies, "scale": self._number(total), "alarm": alarm.to(total.dtype)}
        return HeadLosses(total, {name: term.detach() for name, term in terms.items()}, watched)

    def _number(self, like: Tensor) -> Tensor:
        return torch.full_like(like.detach(), self.scale)

    def _states(self, features: Features, chosen: ChosenQueries) -> Tensor:
        """States [N, D] of queries after the decoder."""
        assert features.queries is not None
        return features.queries.states[-1][chosen.image, chosen.query]

    def _objects(self, features: Features, targets: Sequence[Target], unlabelled: Tensor) -> ChosenQueries:
        """Queries of objects, as many of unlabelled images as of labelled ones."""
        assert features.queries is not None
        logits, boxes = features.queries.logits[-1], features.queries.boxes[-1]
        others = torch.nonzero(unlabelled).flatten()
        labelled = torch.nonzero(~unlabelled).flatten()
        if self.objects == "top":
            both = [top_queries(logits, images, self.num_objects) for images in (labelled, others)]
            total = min(len(found.image) for found in both)
            both = [top_queries(logits, images, self.num_objects, total) for images in (labelled, others)]
        else:
            known = [_first(target, self.num_objects) for target in targets]
            pairs = self.matcher(logits.detach(), boxes.detach(), known)
            image = torch.cat([torch.full_like(query, index) for index, (query, _) in enumerate(pairs)])
            query = torch.cat([query for query, _ in pairs])
            matched = ChosenQueries(image.to(logits.device), query.to(logits.device))
            each = -(-len(image) // len(others))
            both = [matched, top_queries(logits, others, each, len(image))]
        return ChosenQueries(*(torch.cat(side) for side in zip(*both, strict=True)))

    def _consistency(self, features: Features, valid: Sequence[Tensor], chosen: ChosenQueries) -> Tensor:
        """Of logits whose gradient is not reversed: features shall help to agree."""
        assert self.object_discriminator is not None
        cells = self._of_cells(features, reverse=False)
        objects = self.object_discriminator(self._scaled(self._states(features, chosen), reverse=False))
        return consistency_loss(cells, valid, objects, chosen.image)

    def predictions(self, outputs: Any, features: Features) -> dict[str, Tensor]:  # noqa: ANN401
        """Nothing beside the detector's."""
        return {}


def _first(target: Target, count: int) -> Target:
    """The objects of a labelled target, at most so many, and none of an unlabelled one."""
    count = count if is_labelled(target) else 0
    return {name: target[name][:count] for name in ("labels", "boxes")}
