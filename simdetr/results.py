"""Results of a command in, files for other tools out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile

from simdetr.data.atomic_files import atomic_path
from simdetr.data.coco import write_coco
from simdetr.data.labels import Labels, write_labels


def check_writable(out: Path) -> None:
    """Fail before the work if its result could not be written.

    Raises:
        OSError: The folder cannot be made or written to, or ``out`` is a folder.
    """
    if out.is_dir():
        raise IsADirectoryError(f"out: expected a file name such as {out / 'labels.json'}, got the folder {out}.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise OSError(f"out: {out.parent} cannot be written to ({error}); choose another place.") from error


def write_result(labels: Labels, out: Path) -> str:
    """Write labels as COCO JSON, or as Parquet if ``out`` ends so.

    Returns:
        What was written, in one line.
    """
    (write_labels if out.suffix == ".parquet" else write_coco)(labels, out)
    return f"{len(labels.boxes_xyxy):,} boxes on {len(labels):,} images in {out}"


def write_scores(scores: Mapping[str, float], out: Path) -> None:
    """Write scores as JSON."""
    with atomic_path(out) as temporary:
        temporary.write_text(json.dumps(json_ready(scores), indent=1), encoding="utf-8")


def json_ready(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Scores with None in place of nan, which JSON does not know."""
    return {name: None if math.isnan(value) else value for name, value in scores.items()}
