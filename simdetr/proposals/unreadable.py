"""Notes of a store's shards in, ``quarantine.csv`` and a stop past a fraction out (design.md section 11).

Every process counts what the shards of all processes say, so that none needs to hear of the others; the list is put
together from the shards once they are all there.
"""

from __future__ import annotations

from collections.abc import Mapping

from simdetr.data.locations import write_whole
from simdetr.data.quarantine import check_fraction, to_csv
from simdetr.proposals.store import ProposalStore, StoreError

QUARANTINE = "quarantine.csv"


class UnreadableImages:
    """The unreadable images of a store, whoever found them.

    Args:
        store: may be in use by other processes.
        max_fraction: share of all images that may be unreadable.
    """

    def __init__(self, store: ProposalStore, max_fraction: float) -> None:
        self._store, self._max_fraction = store, max_fraction
        self._known: dict[int, dict[str, str]] = {}  # by shard

    def check(self, found: Mapping[str, str] | None = None) -> dict[str, str]:
        """Count those of all shards so far.

        Args:
            found: reasons by id of those of a shard that is not written yet.

        Returns:
            Reasons by id, in the order of the source.

        Raises:
            TooManyUnreadableError: there are too many; ``quarantine.csv`` lists them.
        """
        for shard in self._store.written():
            if shard not in self._known:
                self._known[shard] = self._store.unreadable([shard])
        reasons = {name: text for shard in sorted(self._known) for name, text in self._known[shard].items()}
        reasons |= found or {}
        path = self._store.folder / QUARANTINE
        try:
            check_fraction(reasons, self._store.manifest.num_images, self._max_fraction, path)
        except RuntimeError:
            self.write(reasons)
            raise
        return reasons

    def write(self, reasons: Mapping[str, str]) -> None:
        """Write ``quarantine.csv`` unless it says so already; all processes write the same."""
        path, content = self._store.folder / QUARANTINE, to_csv(reasons)

        def is_there() -> bool:
            return path.exists() and path.read_bytes() == content

        if not reasons or is_there():
            return
        try:
            write_whole(path, content)
        except OSError as error:
            if not is_there():  # else another process has written it, and tidied up this one's temporary file
                raise StoreError(f"cannot write {path}: {error}; make room and run the same command again") from error
