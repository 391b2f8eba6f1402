"""What ``simdetr rivals`` does: a run folder in, other methods' proposals and a printed table out.

Heavy packages are imported inside the function, so that ``simdetr --help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

OUT = Console()


def rivals(
    images: Path,
    run: Path,
    config: tuple[str, ...] = (),
    methods: tuple[str, ...] = (),
    truth: Path | None = None,
    device: str | None = None,
    options: tuple[str, ...] = (),
) -> None:
    """Mine the images of a run with other methods too, and print what each of them finds beside ours.

    Args:
        images: The run's images.
        run: Run folder with mined proposals.
        config: YAML files that it was mined with; the run's own config.yaml when left out.
        methods: Some of ["selective_search", "lost", "token_cut", "mask_cut", "random"]; all when left out.
        truth: COCO JSON with boxes for these images, for recall.
        device: Torch device; the GPU if there is one.
        options: ``--section.name=value`` strings; dotted options on the command line end here.
    """
    from simdetr import pipeline
    from simdetr.evaluation.rival_recall import rival_table

    rows = pipeline.mine_rivals(images, run, config, methods=methods, truth=truth, device=device, options=options)
    judged = max(row["images"] for row in rows)
    OUT.print(f"Boxes per image and, with truth, recall in percent, on {judged:,} images; sizes at 25 boxes:\n")
    OUT.print(rival_table(rows), markup=False, highlight=False, soft_wrap=True)
    OUT.print(f"\nproposals: {run / 'rivals'}", highlight=False, soft_wrap=True)
    shown = f" --truth {truth}" if truth is not None else ""
    OUT.print(f"pictures: simdetr report --run {run} --images {images}{shown}", highlight=False, soft_wrap=True)
