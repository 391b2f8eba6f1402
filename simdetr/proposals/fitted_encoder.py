"""Folder of ``simdetr encoder fit`` -> the frozen encoder that it holds, ready for mining.

The folder has ``encoder.safetensors``, the backbone under timm's names, and ``encoder.json``, how it was trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simdetr.proposals.features import TimmEncoder

WEIGHTS_NAME, RECORD_NAME = "encoder.safetensors", "encoder.json"


class FittedEncoder(TimmEncoder):
    """A frozen backbone that was trained on the user's own images.

    Args:
        folder: what ``simdetr encoder fit`` wrote.

    Raises:
        FileNotFoundError: when the folder holds no finished training.
        ValueError: when its record is damaged.
        PretrainedWeightsError: when its weights are.
    """

    def __init__(self, folder: str | Path) -> None:
        record = read_record(folder)
        super().__init__(
            record["model"],
            weights=Path(folder) / WEIGHTS_NAME,
            mean=tuple(record["mean"]),
            std=tuple(record["std"]),
        )
        self.record: dict[str, Any] = record


def is_fitted(folder: str | Path) -> bool:
    """Whether a training ended well in this folder: the record is written last."""
    return (Path(folder) / WEIGHTS_NAME).is_file() and (Path(folder) / RECORD_NAME).is_file()


def read_record(folder: str | Path) -> dict[str, Any]:
    """The training record of a folder: model, normalisation, objective, steps, versions, probe results.

    Raises:
        FileNotFoundError: when the folder holds no finished training.
        ValueError: when the record is damaged.
    """
    if not is_fitted(folder):
        raise FileNotFoundError(
            f"folder: expected {WEIGHTS_NAME} and {RECORD_NAME} in {folder}, which a finished `simdetr encoder fit` "
            "writes; run the same command again to finish it, or give TimmEncoder your own weights"
        )
    path = Path(folder) / RECORD_NAME
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = record["model"], record["mean"], record["std"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"folder: {path} is no record of `simdetr encoder fit` ({error}); fit it again") from error
    return record
