"""The iterations of a clustering as they go by: one file that a killed clustering goes on from, and a word to the user.

In: centroids and history after every iteration. Out: a safetensors file, whole at any time, which also is the result's
centroids in the end; one call per iteration.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from simdetr.data.atomic_files import atomic_path
from simdetr.proposals.kmeans_ranks import from_first, rank

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Iteration:
    """One pass over all rows.

    Attributes:
        number: 0 assigns rows to the starts.
        inertia: of the centroids that the pass began with.
        empty: clusters without any row; they start anew elsewhere.
        seconds: of the pass and of what led to its centroids.
    """

    number: int
    inertia: float
    empty: int
    seconds: float


History = tuple[Iteration, ...]


@dataclass(frozen=True)
class Journal:
    """Keeps a clustering; only the first rank writes and tells.

    Attributes:
        path: of the file; nothing is kept without one.
        data: what is clustered, in words; a file of other data or other settings is not gone on from.
        tell: called after every iteration.
    """

    path: Path | None = None
    data: str = ""
    tell: Callable[[Iteration], None] | None = None

    def restore(self, settings: str) -> tuple[Tensor, History] | None:
        """The centroids to go on with and the iterations done, the same on every rank; None to begin."""
        return from_first(self._read(settings) if rank() == 0 else None)

    def keep(self, centroids: Tensor, history: History, settings: str) -> None:
        """Replace the file by the state before the next iteration."""
        if self.path is None or rank() > 0:
            return
        notes = {"made_of": self._made_of(settings), "history": json.dumps([asdict(step) for step in history])}
        with atomic_path(self.path) as temporary:
            save_file({"centroids": centroids.cpu().contiguous()}, temporary, notes)

    def report(self, iteration: Iteration) -> None:
        """Tell the user of an iteration."""
        if self.tell is not None and rank() == 0:
            self.tell(iteration)

    def _read(self, settings: str) -> tuple[Tensor, History] | None:
        if self.path is None or not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                notes, centroids = file.metadata() or {}, file.get_tensor("centroids")
            history = tuple(Iteration(**step) for step in json.loads(notes["history"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            _log.warning("%s cannot be read (%s); the clustering begins anew", self.path, error)
            return None
        if notes.get("made_of") != self._made_of(settings):
            _log.info("%s is of other regions or settings; the clustering begins anew", self.path)
            return None
        _log.info("going on after iteration %d of %s", history[-1].number, self.path)
        return centroids, history

    def _made_of(self, settings: str) -> str:
        return f"{self.data}; {settings}"
