"""Losses of weakly supervised localisation: embeddings, attention and class logits in, scalars out.

Source: KR 10-2022-0050617, equations 2 to 4.
Letters: B images, E channels of an embedding, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simdetr.detectors.matcher import Target
from simdetr.heads.attention import BACKGROUND, DROPPED, FOREGROUND, Tap

Distance = Literal["euclidean", "cosine"]
Reduction = Literal["mean", "sum"]
ClassLoss = Literal["softmax", "bce"]


class ImageClasses(NamedTuple):
    """Which classes the images show."""

    shown: Tensor  # float32 [B, K], 1 where an image shows a class
    labelled: Tensor  # bool [B]: images with a label at all; the others teach nothing


def check_not_negative(values: Mapping[str, float]) -> None:
    """Raise a ValueError for margins and weights below 0."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def image_classes(targets: Sequence[Target], num_classes: int, device: torch.device) -> ImageClasses:
    """Image-level labels of the objects' ones, however many objects of a class there are."""
    counts = [len(target["labels"]) for target in targets]
    shown = torch.zeros(len(targets), num_classes, device=device)
    if sum(counts):
        images = torch.arange(len(targets)).repeat_interleave(torch.tensor(counts))
        shown[images.to(device), torch.cat([target["labels"] for target in targets]).to(device)] = 1.0
    return ImageClasses(shown, torch.tensor([count > 0 for count in counts], device=device))


def check_one_class(targets: Sequence[Target]) -> None:
    """Raise a ValueError for images of several classes, which a softmax cannot learn."""
    for index, target in enumerate(targets):
        labels = target["labels"]
        if len(labels) > 1 and bool((labels != labels[0]).any()):
            raise ValueError(
                f"labels of image {index} of the batch: expected one class for class_loss='softmax', got "
                f"{sorted(set(labels.tolist()))}; choose class_loss='bce' for images of several classes"
            )


def class_loss(logits: Tensor, classes: ImageClasses, kind: ClassLoss) -> Tensor:
    """Cross-entropy of image logits [B, K], mean over the labelled images.

    ``softmax`` is for one class per image, ``bce`` takes each class on its own and the mean over the classes.
    """
    if kind == "softmax":
        each = F.cross_entropy(logits.float(), classes.shown, reduction="none")
    else:
        each = F.binary_cross_entropy_with_logits(logits.float(), classes.shown, reduction="none").mean(dim=1)
    return mean_where(each, classes.labelled)


def log_odds(logits: Tensor) -> Tensor:
    """Logarithm of p / (1 − p) of softmax probabilities p, from logits [B, K]; of p = 1, that of the number below."""
    logs = F.log_softmax(logits, dim=1).clamp(max=-torch.finfo(logits.dtype).eps)
    return logs - torch.log(-torch.expm1(logs))


def contrastive_loss(taps: Sequence[Tap], labelled: Tensor, margin: float, distance: Distance) -> Tensor:
    """L_ca, mean over the taps, of the labelled images without an empty mask; 0 where nothing was embedded."""
    found = [
        contrastive_attention_loss(tap.embeddings, tap.usable & labelled, margin, distance)
        for tap in taps
        if tap.embeddings is not None
    ]
    return torch.stack(found).mean() if found else taps[0].raw.new_zeros(())


def contrastive_attention_loss(embeddings: Tensor, usable: Tensor, margin: float, distance: Distance) -> Tensor:
    """Equation 2: the rest of the foreground shall be nearer to the whole foreground than to the background.

    L_ca = mean of max(0, d(z_dfg, z_fg) − d(z_dfg, z_bg) + m) over the images that are usable, bool [B]. Embeddings
    [B, 3, E] are unit vectors in the order of ``foreground_masks``.
    """
    dropped, foreground, background = (embeddings[:, part] for part in (DROPPED, FOREGROUND, BACKGROUND))
    near, far = distances(dropped, foreground, distance), distances(dropped, background, distance)
    return mean_where((near - far + margin).clamp(min=0), usable)


def distances(first: Tensor, second: Tensor, distance: Distance) -> Tensor:
    """Distances [B] in [0, 2] of unit vectors [B, E]; 1 − the cosine, or euclidean, with gradient 0 of equal ones."""
    if distance == "cosine":
        return 1 - (first * second).sum(dim=1)
    apart: Tensor = torch.linalg.vector_norm(first - second, dim=1)
    return apart


def foreground_consistency_loss(
    early: Tensor, late: Tensor, early_padding: Tensor, late_padding: Tensor, usable: Tensor, reduction: Reduction
) -> Tensor:
    """Equation 3: early attention A_i [B, h, w] shall agree with late attention A_j [B, h', w'].

    ‖A_i − A_j‖² as mean or sum over the valid positions of A_i, and mean over the images that are usable, bool [B].
    A_j is resized to A_i and gets no gradient.
    """
    wanted = _resized(late.detach(), late_padding, early.shape[1:])
    squares = (early - wanted).square().masked_fill(early_padding, 0.0).sum(dim=(1, 2))
    if reduction == "mean":
        squares = squares / (~early_padding).sum(dim=(1, 2))
    return mean_where(squares, usable)


def _resized(values: Tensor, padding: Tensor, size: torch.Size) -> Tensor:
    """Bilinear resize [B, *size] that mixes valid positions only."""
    if values.shape[1:] == size:
        return values
    valid = (~padding).to(values.dtype)
    mixed, share = F.interpolate(torch.stack([values * valid, valid], 1), tuple(size), mode="bilinear").unbind(dim=1)
    return mixed / share.clamp(min=torch.finfo(share.dtype).eps)


def mean_where(values: Tensor, usable: Tensor) -> Tensor:
    """Mean of those values [B] that are usable, bool [B]; 0, and part of the graph, if none is."""
    return values.masked_fill(~usable, 0.0).sum() / usable.sum().clamp(min=1)
