"""What a trained head found on validation images: the files of a run in, pictures and numbers for its report out.

The folder ``predictions`` of a run: ``labels.parquet`` (boxes, points, scores), ``scores.json`` and, of localisation
heads, ``heat_maps/``. `simdetr.fit_results` writes it at the end of ``simdetr fit``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from PIL import Image

from simdetr.data.images import ImageSource, UnreadableImageError, read_image
from simdetr.data.labels import Labels, read_labels
from simdetr.evaluation.drawing import draw_labels, picture_path
from simdetr.evaluation.report import Sample
from simdetr.evaluation.score_text import shown_score

FOLDER, MIN_SCORE, MAX_BOXES = "predictions", 0.3, 15
LEFT_OUT = ("AR", "recall50", "AP7", "APs", "APm", "APl")
"""Beginnings of scores that the page leaves to the file; AR@100 is shown."""


def prediction_scores(run_dir: Path) -> dict[str, str]:
    """Name and text of the scores of a run that its page shows; empty if it has none."""
    path = run_dir / FOLDER / "scores.json"
    if not path.is_file():
        return {}
    scores = json.loads(path.read_text(encoding="utf-8"))
    shown = {name: value for name, value in scores.items() if name == "AR@100" or not name.startswith(LEFT_OUT)}
    return {name: shown_score(name, math.nan if value is None else value).strip() for name, value in shown.items()}


def prediction_samples(run_dir: Path, source: ImageSource, truth: Labels | None, count: int) -> list[Sample]:
    """Images with what the run's detector found on them, beside what people labelled and the score map.

    Args:
        run_dir: The run's folder.
        source: Where its validation images are.
        truth: Human labels of some of them.
        count: Images shown, spread evenly over those that have predictions.
    """
    path = run_dir / FOLDER / "labels.parquet"
    if not path.is_file():
        return []
    found = read_labels(path)
    ids = [name for name in found.image_ids if name in source]
    samples = []
    for name in ids[:: max(1, len(ids) // count)][:count]:
        try:
            image = read_image(source.record(name))
        except UnreadableImageError:
            continue
        own = found.of(name)
        good = int((own.scores >= MIN_SCORE).sum())
        shown = max(1, min(good, MAX_BOXES)) if len(own) else 0
        pictures = [(f"predicted: best {shown} of {len(own)}", draw_labels(image, own, found.categories, shown))]
        if truth is not None and name in truth:
            human = truth.of(name)
            drawn = draw_labels(image, human, truth.categories, MAX_BOXES)
            pictures.append((f"labelled by people: {len(human)}", drawn))
        heat_map = picture_path(run_dir / FOLDER / "heat_maps", name)
        if heat_map.is_file():
            with Image.open(heat_map) as picture:
                pictures.append(("what the head looks at", picture.convert("RGB")))
        samples.append(Sample(name, pictures))
    return samples
