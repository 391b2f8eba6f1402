"""How many labels an arm is fine-tuned on: parts of the labelled images or shots per class in, label files out.

Both are drawn as `simdetr split` draws them, by seed and file names alone: every arm of a seed learns from the same
boxes. Where there are no validation images, a part of the labelled ones is held out, the same for all seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simdetr.data.coco import load_coco, write_coco
from simdetr.data.images import open_images
from simdetr.data.label_files import format_of, read_with_report
from simdetr.data.labels import Labels
from simdetr.data.protocols import first_images, hash_order, split
from simdetr.data.storage import write_json

HELD_OUT_SEED = 0
MOST_HELD_OUT = 0.9


@dataclass(frozen=True)
class LabelBudget:
    """So many labels.

    Attributes:
        kind: ``fraction`` of the labelled images with all their boxes, or ``shots``: boxes per class.
        amount: How many.
    """

    kind: str
    amount: float

    @property
    def value(self) -> float | str:
        """As rows have it."""
        return self.amount if self.kind == "fraction" else f"{self.amount:g}-shot"

    @property
    def name(self) -> str:
        """In names of folders."""
        return f"{self.amount:g}" if self.kind == "fraction" else f"{self.amount:g}-shot"

    @property
    def title(self) -> str:
        """For people."""
        return f"{100 * self.amount:g} %" if self.kind == "fraction" else f"{self.amount:g}-shot"

    def file(self, labels: Path, folder: Path, seed: int) -> Path:
        """The labels of a seed: those that are drawn from, or a file of its own in ``folder``."""
        if self.kind == "fraction":
            return labels
        drawn = folder / f"shots-{self.amount:g}-seed{seed}.json"
        if not drawn.is_file():
            split(coco_file(labels, folder / "labels.json"), folder, "shots", amounts=[self.amount], seeds=[seed])
        return drawn

    def options(self) -> tuple[str, ...]:
        """Of a training on that file."""
        return (f"--data.label_fraction={self.amount}",) if self.kind == "fraction" else ()

    def drawn(self, labels: Labels, seed: int) -> Labels:
        """What a training learns from, of the labels in its `file`."""
        if self.kind == "fraction" and self.amount < 1:
            chosen = set(first_images(labels.image_ids, self.amount, seed))
            return labels.select(name for name in labels.image_ids if name in chosen)
        return labels


def read_budgets(fractions: Sequence[float] | None, shots: Sequence[int]) -> tuple[LabelBudget, ...]:
    """The budgets that are asked for; without any, 1 and 10 % of the labelled images.

    Raises:
        ValueError: A number out of range, or given twice.
    """
    parts = (0.01, 0.1) if fractions is None and not shots else tuple(fractions or ())
    for name, amounts in (("fractions", parts), ("shots", shots)):
        if len(set(amounts)) < len(amounts):
            raise ValueError(f"{name}: expected each once, got {list(amounts)}")
    wrong = [part for part in parts if not 0 < part <= 1]
    if wrong:
        raise ValueError(f"fractions: expected numbers in (0, 1], got {wrong[0]:g}; 0.01 is 1 %.")
    if any(count < 1 or count != int(count) for count in shots):
        raise ValueError(f"shots: expected whole numbers of boxes per class, at least 1, got {list(shots)}")
    budgets = [LabelBudget("fraction", float(part)) for part in parts]
    return (*budgets, *(LabelBudget("shots", int(count)) for count in shots))


def coco_file(labels: Path, made: Path) -> Path:
    """The COCO file of labels: the user's own, or ``made`` from those of another tool."""
    kind = format_of(labels)
    if kind.name == "coco":
        return kind.file_of(labels)
    if not made.is_file():
        write_coco(read_with_report(labels, masks=True)[0], made)
    return made


def hold_out(labels: Path, images: str, share: float, folder: Path) -> tuple[Path, Path]:
    """Label files to train and to validate on, drawn from one: COCO files in ``folder``.

    Args:
        labels: All labels.
        images: Their images.
        share: Part of the labelled images to validate on, in (0, 0.9].
        folder: Where the two go.

    Raises:
        ValueError: ``share`` out of range, or too few images to leave some on both sides.
    """
    if not 0 < share <= MOST_HELD_OUT:
        raise ValueError(f"holdout: expected a part of the labelled images in (0, {MOST_HELD_OUT}], got {share:g}")
    train, val = folder / "train.json", folder / "val.json"
    (folder / "labels.json").unlink(missing_ok=True)  # of labels that may have changed since
    content = load_coco(coco_file(labels, folder / "labels.json"))
    order = hash_order((image["file_name"] for image in content["images"]), HELD_OUT_SEED)
    count = round(share * len(order))
    if not 0 < count < len(order):
        raise ValueError(
            f"holdout: {share:g} of {len(order)} labelled images leaves none to train or to validate on; give "
            "--val_images and --val_labels"
        )
    held = set(order[-count:])
    for path, wanted in ((train, False), (val, True)):
        kept = [image for image in content["images"] if (image["file_name"] in held) == wanted]
        ids = {image["id"] for image in kept}
        boxes = [entry for entry in content["annotations"] if entry.get("image_id") in ids]
        write_json(path, content | {"images": kept, "annotations": boxes})
    read_with_report(val, images=open_images(images))  # says what is wrong before any work
    return train, val
