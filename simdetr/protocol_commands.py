"""What ``simdetr split`` does: a label file in, those of a few-label protocol out.

Heavy packages are imported inside the function, so that ``simdetr --help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console

OUT = Console()


def split(
    labels: Path,
    out: Path,
    protocol: Literal["fractions", "shots", "classes", "rf20-vl-fsod"],
    amounts: tuple[float, ...] | None = None,
    seeds: tuple[int, ...] = tuple(range(10)),
    novel: tuple[str, ...] | int = (),
) -> None:
    """Draw few labels from many: fractions, shots per class, base and novel classes; the same everywhere.

    Args:
        labels: COCO JSON to draw from.
        out: Folder of the new COCO files; each says in ``info`` how it was drawn.
        protocol: ``fractions`` (1, 2, 5, 10, 100 % of the images), ``shots`` (1, 5, 10, 30 boxes per class),
            ``rf20-vl-fsod`` (10 boxes per class) or ``classes`` (base and novel ones).
        amounts: Other fractions, such as ``[0.01]``, or other numbers of boxes, such as ``[3, 10]``.
        seeds: One draw each; smaller draws of a seed lie inside its larger ones.
        novel: With ``classes``, the names of the novel ones, such as ``[cat, dog]``, or how many to draw.
    """
    from simdetr.data import protocols
    from simdetr.data.coco import load_coco

    for path in protocols.split(labels, out, protocol, amounts=amounts, seeds=seeds, novel=novel):
        drawn = load_coco(path)
        short = drawn["info"][protocols.RECORD].get("short_classes", {})
        fewer = ", ".join(f"{name} ({count})" for name, count in short.items())
        line = f"{path}: {len(drawn['images']):,} images, {len(drawn['annotations']):,} boxes"
        OUT.print(line + (f"; classes with fewer: {fewer}" if fewer else ""), soft_wrap=True, markup=False)
