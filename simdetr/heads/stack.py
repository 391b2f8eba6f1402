"""Several heads on one detector: necks one after the other, losses added, predictions put together.

The labelling document's trainer has three parts at once: where objects recur, internal layers of a spatial pyramid, and
features that do not tell labelled images from unlabelled ones (US 2022/0121872, Figs. 2 and 5). Letters: B images, C
channels, h x w cells of a level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simdetr.detectors.detector import Features, FeatureSizes, Level, Neck
from simdetr.detectors.matcher import Target
from simdetr.heads.head import Head, HeadLosses, described, factory


class HeadStack(Head):
    """Heads in order. A neck sees what the necks before it have left, a head what all of them have.

    Args:
        sizes: what they are built for.
        heads: the heads, each made for the sizes; in a config their classes and options.

    Raises:
        ValueError: no heads, or two of one name, whose losses could not be told apart.
    """

    name = "heads"

    def __init__(self, sizes: FeatureSizes, heads: Sequence[Callable[[FeatureSizes], Head]]) -> None:
        super().__init__()
        parts: list[Head] = [factory(part, Head)(sizes) for part in heads]
        names = [part.name for part in parts]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"heads: expected one or more, each of its own kind, got {names}")
        self.sizes, self.heads = sizes, nn.ModuleList(parts)
        self.init_args = {"heads": [described(part) for part in parts]}
        self.needs = frozenset().union(*(part.needs for part in parts))
        self.is_neck = any(part.is_neck for part in parts)
        self.undecayed_names = tuple(
            f"heads.{index}.{name}" for index, part in enumerate(parts) for name in part.undecayed_names
        )
        # one that takes them for background would unlearn what the others learn
        self.takes_unlabelled = all(part.takes_unlabelled for part in parts)

    @property
    def parts(self) -> list[Any]:
        """The heads."""
        return list(self.heads)

    def set_progress(self, progress: float) -> None:
        """Tell all."""
        for part in self.parts:
            part.set_progress(progress)

    def alarms(self, epochs: Sequence[Mapping[str, float]], prefix: str) -> list[str]:
        """Ask all."""
        return [alarm for part in self.parts for alarm in part.alarms(epochs, f"{prefix}{part.name}_")]

    @property
    def deployed(self) -> Head | None:
        """Those that predict, or None."""
        kept = [found for part in self.parts if (found := part.deployed) is not None]
        if not kept:
            return None
        same = len(kept) == len(self.parts) and all(a is b for a, b in zip(kept, self.parts, strict=True))
        return self if same else HeadStack(self.sizes, [_made(part) for part in kept])

    def neck(self, targets: Sequence[Target] | None) -> Neck:
        """The necks one after the other; each has its own note of a level."""
        necks = [part.neck(targets) if part.is_neck else None for part in self.parts]

        def pass_level(index: int, level: Level) -> tuple[Tensor, list[Any]]:
            notes = []
            for look in necks:
                changed, note = (level.features, None) if look is None else look(index, level)
                level = level._replace(features=changed)
                notes.append(note)
            return level.features, notes

        return pass_level

    def _read_by(self, place: int, features: Features) -> Features:
        """Features with the notes of one head alone."""
        own = [notes[place] for notes in features.taps] if self.parts[place].is_neck else []
        return features._replace(taps=own)

    def forward(self, features: Features) -> list[Any]:
        """Raw outputs of each."""
        return [part(self._read_by(place, features)) for place, part in enumerate(self.parts)]

    def losses(self, outputs: list[Any], features: Features, targets: Sequence[Target]) -> HeadLosses:
        """Their losses added; terms and diagnostics under their names."""
        found = [
            part.losses(output, self._read_by(place, features), targets)
            for place, (part, output) in enumerate(zip(self.parts, outputs, strict=True))
        ]
        terms, watched = (
            {
                f"{part.name}_{key}": value
                for part, losses in zip(self.parts, found, strict=True)
                for key, value in getattr(losses, kind).items()
            }
            for kind in ("terms", "diagnostics")
        )
        return HeadLosses(torch.stack([losses.total for losses in found]).sum(), terms, watched)

    def predictions(self, outputs: list[Any], features: Features) -> dict[str, Tensor]:
        """Their predictions put together; a later head's take the place of an earlier one's."""
        found: dict[str, Tensor] = {}
        for place, (part, output) in enumerate(zip(self.parts, outputs, strict=True)):
            found |= part.predictions(output, self._read_by(place, features))
        return found


def _made(part: Head) -> Callable[[FeatureSizes], Head]:
    """A factory of a head that is there already."""
    return lambda _: part
