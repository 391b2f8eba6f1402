"""What reading a label file met: problems that were repaired or dropped, what was changed, images nobody looked at."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from simdetr.data.annotations import LabelError

LEFT_OUT = "image of which no box can be used, left out: it would teach that it is empty"
UNDECIDED = (
    "image without boxes in Label Studio's export to another format, which has the tasks that nobody touched among "
    "them, left out (its own JSON tells them from empty ones)"
)
_EXAMPLES_PER_KIND = 5
_MOST_CHARACTERS = 300  # of an example: files may hold anything


@dataclass
class LabelReport:
    """What reading a label file met, beside the boxes.

    Attributes:
        path: the file or folder.
        format: name of the format it was read as, such as ``"coco"``.
        strict: whether the first problem is raised as a `LabelError`.
        counts: number of problems by kind, such as ``"box clipped"``: what is wrong in the file, and was repaired or
            dropped.
        notes: number of things by kind that are no fault of the file and come out otherwise than they stand there, such
            as ``"rotated box, the upright box around it taken"``.
        examples: the first few places of each kind of problem and note.
        unlabelled: ids of images that the file knows of and nobody has labelled, and of those whose boxes could not
            be used; they are not among the labels, since an image there without boxes says that it shows no object.
    """

    path: Path
    format: str = "coco"
    strict: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    unlabelled: list[str] = field(default_factory=list)
    _counted: set[str] = field(default_factory=set, repr=False)  # those of them that are counted by kind

    @property
    def total(self) -> int:
        """Number of problems of all kinds."""
        return self.counts.total()

    def add(self, kind: str, where: str) -> None:
        """Count a problem at a place such as ``annotation 17``; raise it when strict."""
        if self.strict:
            raise LabelError(f"{self.path}: {where}: {kind} (strict)")
        self._count(self.counts, kind, where)

    def leave_out(self, image_id: str) -> None:
        """Count an image as unlabelled, since none of the boxes that the file has of it can be used."""
        self.add(LEFT_OUT, image_id)
        self.unlabelled.append(image_id)
        self._counted.add(image_id)

    def doubt(self, image_id: str) -> None:
        """Count an image without boxes as unlabelled, where the tool that wrote it so may never have shown it."""
        self.note(UNDECIDED, image_id)
        self.unlabelled.append(image_id)
        self._counted.add(image_id)

    def note(self, kind: str, where: str) -> None:
        """Count something that comes out otherwise than it stands in the file, which is no fault of it."""
        self._count(self.notes, kind, where)

    def _count(self, counter: Counter[str], kind: str, where: str) -> None:
        counter[kind] += 1
        if counter[kind] <= _EXAMPLES_PER_KIND:
            self.examples.setdefault(kind, []).append(where[:_MOST_CHARACTERS])

    def lines(self) -> list[str]:
        """One line per kind of problem: count, kind and examples."""
        return self._lines(self.counts)

    def note_lines(self) -> list[str]:
        """One line per kind of note, and one on images that nobody has labelled."""
        lines = self._lines(self.notes)
        others = [image_id for image_id in self.unlabelled if image_id not in self._counted]
        if others:
            first = ", ".join(others[:_EXAMPLES_PER_KIND])
            lines.append(f"{len(others)} × image without labels, left out: {first}")
        return lines

    def _lines(self, counter: Counter[str]) -> list[str]:
        return [f"{count} × {kind}: {', '.join(self.examples[kind])}" for kind, count in sorted(counter.items())]
