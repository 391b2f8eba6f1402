"""What ``predict``, ``relabel`` and ``evaluate`` do: images and a detector in, boxes, pictures or numbers out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from simdetr.data.images import open_images
from simdetr.data.label_files import write_result
from simdetr.data.labels import Labels
from simdetr.data.storage import check_writable, write_scores
from simdetr.reports.score_text import shown_score
from simdetr.training.throughput import Throughput

OUT = Console()


def relabel(
    images: Path,
    checkpoint: Path,
    out: Path,
    iou_threshold: float = 0.55,
    max_boxes: int = 100,
    max_unreadable: float = 1.0,
    device: str | None = None,
    **speed: Any,
) -> None:
    """Label images with a detector as self-training does: every confidence, one class per box, no overlaps.

    Args:
        images: Folder, list file or COCO JSON of images.
        checkpoint: Run folder, detector folder or checkpoint.
        out: Labels file to write, .parquet or .json.
        iou_threshold: Overlap above which the less confident of two boxes goes.
        max_boxes: Most confident boxes kept per image.
        max_unreadable: Share of unreadable images past which to stop; 1 goes on unless no image can be read.
        device: Torch device; the GPU if there is one.
        speed: How fast images go through the detector.
    """
    _write_found(
        images,
        checkpoint,
        out,
        iou_threshold=iou_threshold,
        max_boxes=max_boxes,
        max_unreadable=max_unreadable,
        device=device,
        one_class=True,
        throughput=Throughput(**speed),
    )


def evaluate_detector(
    images: Path,
    labels: Path,
    checkpoint: Path,
    out: Path | None = None,
    point_radius: float | None = None,
    max_unreadable: float = 1.0,
    device: str | None = None,
    **speed: Any,
) -> None:
    """Print COCO's AP family and class-agnostic recall of a detector.

    Args:
        images: Images to evaluate on.
        labels: COCO JSON with their boxes.
        checkpoint: Run folder, detector folder or checkpoint.
        out: JSON file to write the numbers to.
        point_radius: Of landmarks of a class closer than this part of the image's diagonal, the less confident go; 0
            keeps all. When left out, only a grid's duplicates go: those within half a subregion.
        max_unreadable: Share of unreadable images past which to stop; 1 goes on unless no image can be read, and what
            is on those counts as missed.
        device: Torch device; the GPU if there is one.
        speed: How fast images go through the detector.
    """
    if out is not None:
        check_writable(out)
    throughput = Throughput(**speed)
    from simdetr.training import inference

    scores = inference.evaluate(
        images,
        labels,
        checkpoint,
        device=device,
        point_radius=point_radius,
        max_unreadable=max_unreadable,
        throughput=throughput,
    )
    for name, value in scores.items():
        OUT.print(f"{name:>22}  {shown_score(name, value)}", highlight=False)
    if out is not None:
        write_scores(scores, out)


def predict_images(
    images: Path,
    checkpoint: Path,
    out: Path,
    pictures: Path | None = None,
    min_score: float = 0.05,
    iou_threshold: float = 1.0,
    max_boxes: int = 100,
    max_unreadable: float = 1.0,
    device: str | None = None,
    masks: bool = False,
    heat_maps: Path | None = None,
    point_radius: float | None = None,
    **speed: Any,
) -> None:
    """Detect objects in an image, a folder or a list, and write COCO JSON.

    A box may come several times, with several classes, as COCO's numbers want it; `--min_score` leaves the best ones.
    Unreadable images are listed beside it, in ``<name>_quarantine.csv``. With a COCO JSON as ``--images``, images keep
    their ids.

    Args:
        images: Image file, folder, list file or COCO JSON.
        checkpoint: Run folder, detector folder or checkpoint.
        out: File to write: .json (COCO, with scores) or .parquet.
        pictures: Folder for copies of the images with the boxes drawn on them.
        min_score: Boxes with a lower score are left out.
        iou_threshold: Of two boxes of a class that overlap more, the less confident goes; 1 keeps both.
        max_boxes: Most confident boxes kept per image.
        max_unreadable: Share of unreadable images past which to stop; 1 goes on unless no image can be read.
        device: Torch device; the GPU if there is one.
        masks: Write each object's mask too, as run lengths; for detectors that draw masks (ViDT+).
        heat_maps: Folder for copies of the images with what a localisation head looks at laid over them.
        point_radius: Of landmarks of a class closer than this part of the image's diagonal, the less confident go; 0
            keeps all. When left out, only a grid's duplicates go: those within half a subregion.
        speed: How fast images go through the detector.
    """
    throughput = Throughput(**speed)
    found = _write_found(
        images,
        checkpoint,
        out,
        min_score=min_score,
        iou_threshold=iou_threshold,
        max_boxes=max_boxes,
        max_unreadable=max_unreadable,
        device=device,
        masks=masks,
        point_radius=point_radius,
        throughput=throughput,
    )
    if pictures is not None:
        from simdetr.reports.drawing import write_pictures

        write_pictures(open_images(images), found, pictures)
    if heat_maps is not None:
        from simdetr.reports import prediction_samples

        drawn = prediction_samples.heat_maps(images, checkpoint, heat_maps, device=device, throughput=throughput)
        OUT.print(f"{drawn:,} heat maps in {heat_maps}", soft_wrap=True)


def _write_found(images: Path, checkpoint: Path, out: Path, **choices: Any) -> Labels:
    """Write what ``inference.predict`` finds, and what cannot be read beside it."""
    check_writable(out)
    from simdetr.training import inference

    quarantine = out.with_name(f"{out.stem}_quarantine.csv")
    quarantine.unlink(missing_ok=True)  # it may be of other images
    found = inference.predict(images, checkpoint, quarantine=quarantine, **choices)
    OUT.print(write_result(found, out, images), soft_wrap=True)
    return found
