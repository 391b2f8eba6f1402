"""The one contract of heads: what a head reads of a detector, and what it gives back.

A head is built for ``FeatureSizes``, reads ``Features`` and knows no detector: standalone it reads a backbone's maps
(``HeadedBackbone``), else the maps and queries of a detector (``HeadedDetector``).
Letters: B images, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from simdetr.data.class_paths import class_of
from simdetr.detectors.detector import Features, FeatureSizes, Level, Neck
from simdetr.detectors.matcher import Target

Need = Literal["levels", "queries"]


class HeadLosses(NamedTuple):
    """What a head says of a batch in training."""

    total: Tensor
    """To minimise; part of the graph even where the batch has nothing to learn from, and 0 then."""
    terms: dict[str, Tensor]
    """Its parts, unweighted."""
    diagnostics: dict[str, Tensor]
    """Numbers to watch, without gradient."""


class Head(nn.Module, ABC):
    """A part that reads features and predicts something of its own.

    Attributes:
        name: prefix of its losses.
        needs: what it reads; building it for features without them is an error.
        init_args: its options, plain JSON types; with the sizes they rebuild it.
        is_neck: whether it looks at, and may change, the features on their way (``pass_level``).
        undecayed_names: parameters whose name holds one of these learn without weight decay.
        takes_unlabelled: whether images that nobody has labelled (``labelled`` False in the target) may be in a batch.
    """

    name: str
    needs: frozenset[Need]
    init_args: dict[str, Any]
    is_neck: bool = False
    undecayed_names: tuple[str, ...] = ()
    takes_unlabelled: bool = False

    def set_progress(self, progress: float) -> None:
        """Told before every training step which share of the training is done, 0 to 1, for schedules."""

    def alarms(self, epochs: Sequence[Mapping[str, float]], prefix: str) -> list[str]:
        """What it finds wrong with a training, in sentences; asked after every epoch.

        Args:
            epochs: means of the losses in each epoch so far, by name; ``loss`` is the detector's with all heads'.
            prefix: what its own terms and diagnostics are preceded by there.
        """
        return []

    @property
    def deployed(self) -> Head | None:
        """What of it a trained detector needs to predict: all of it, or None where it serves training alone."""
        return self

    def neck(self, targets: Sequence[Target] | None) -> Neck:
        """Necks only: ``pass_level`` for one batch, of which training also knows the targets."""
        return self.pass_level

    def pass_level(self, index: int, level: Level) -> tuple[Tensor, Any]:
        """Necks only: see a level, the ``index``-th from fine to coarse, on its way.

        Gives the features [B, C, h, w] to go on with, and what to find again in ``Features.taps``.
        """
        return level.features, None

    @abstractmethod
    def forward(self, features: Features) -> Any:  # noqa: ANN401
        """Raw outputs of the head, whatever its losses and predictions want."""

    @abstractmethod
    def losses(self, outputs: Any, features: Features, targets: Sequence[Target]) -> HeadLosses:  # noqa: ANN401
        """Losses of a batch.

        Args:
            outputs: of ``forward``.
            features: what they were made of.
            targets: per image ``labels`` [T], ``boxes`` [T, 4] and, where asked for, ``points`` [T, 2]; may be empty.
                Of an image that nobody has labelled, ``labelled`` is False.
        """

    @abstractmethod
    def predictions(self, outputs: Any, features: Features) -> dict[str, Tensor]:  # noqa: ANN401
        """What the head adds to a ``DetectorOutput``; standalone, ``pred_logits`` and ``pred_boxes`` are among it."""


def check_needs(head: Head, sizes: FeatureSizes) -> None:
    """Raise a ValueError where a head is built for features that lack what it reads."""
    if "queries" in head.needs and sizes.query_channels is None:
        raise ValueError(
            f"{type(head).__name__} reads the queries of a decoder, but a backbone alone has none; put it on a "
            "detector (simdetr.heads.HeadedDetector), or choose the variant that reads feature maps."
        )


def is_labelled(target: Target) -> bool:
    """Whether people have labelled the image of a target, which may show nothing; so they have if it does not say."""
    return bool(target.get("labelled", True))


def check_finite(name: str, values: Tensor) -> None:
    """Raise a ValueError that names the first element of ``values`` that is not finite, any shape.

    Looked at on the CPU only, where it costs nothing, and not in exported or compiled graphs, which cannot; there and
    on other devices the loss would tell.
    """
    graph = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    if graph or values.device.type != "cpu" or bool(torch.isfinite(values).all()):
        return
    first = tuple(int(i) for i in torch.nonzero(~torch.isfinite(values))[0])
    raise ValueError(f"{name}: expected finite values, got {float(values[first])} at index {first}")


def check_images(images: Tensor, mask: Tensor | None, module: nn.Module) -> None:
    """Raise a ValueError for images that are none, or whose device or type is not that of the module.

    The module has the weights that are to read them.
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images: expected [B, 3, H, W] with no side 0, got {list(images.shape)}")
    weights = next(module.parameters())
    for name, given in (("images", images), ("mask", mask)):
        if given is not None and given.device.type != weights.device.type:
            raise ValueError(
                f"{name}: expected on the detector's device {weights.device}, got {given.device}; move it there"
            )
    if images.dtype != weights.dtype and not torch.is_autocast_enabled(images.device.type):
        raise ValueError(
            f"images: expected the detector's type {weights.dtype}, got {images.dtype}; convert one of them"
        )


def check_targets(targets: Sequence[Target], batch: int, num_classes: int) -> None:
    """Raise a ValueError for targets that do not fit the batch or the classes; labels on the CPU only."""
    if len(targets) != batch:
        raise ValueError(f"targets: expected one per image ({batch}), got {len(targets)}")
    for index, target in enumerate(targets):
        labels = target["labels"]
        if labels.device.type != "cpu":
            continue
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if len(wrong):
            raise ValueError(
                f"labels of image {index} of the batch: expected 0 to {num_classes - 1}, got {int(wrong.min())}; "
                "number classes from 0 and link num_classes to the data"
            )


def prefixed(name: str, losses: HeadLosses) -> dict[str, Tensor]:
    """Terms and diagnostics under the head's name, for the log."""
    return {f"{name}_{key}": value for key, value in (losses.terms | losses.diagnostics).items()}


def described(part: Any) -> dict[str, Any]:  # noqa: ANN401
    """A built part as configs have it: ``class_path``, and the ``init_args`` that it keeps."""
    return {"class_path": f"{type(part).__module__}.{type(part).__qualname__}", "init_args": dict(part.init_args)}


def factory(part: Any, base: type) -> Callable[[Any], Any]:  # noqa: ANN401
    """A function of the one argument that a description lacks (sizes, or number of classes) to a ``base``.

    ``part`` is such a function, or a description; of simdetr's classes only: a checkpoint must not name arbitrary code.
    """
    if not isinstance(part, Mapping):
        made: Callable[[Any], Any] = part
        return made
    found, arguments = class_of(part["class_path"], base), dict(part.get("init_args") or {})
    return lambda first: found(first, **arguments)
