"""Class paths as configs and checkpoints of before have them in, where those classes are now out.

The table has modules whose classes a config or a checkpoint can name, and the folder whose names stood for them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MOVED = {
    "simdetr.data.mosaic": "simdetr.data.augmentation",
    "simdetr.data.transforms": "simdetr.data.augmentation",
    "simdetr.detectors.neck_free_loss": "simdetr.detectors.vidt_losses",
    "simdetr.evaluation.validation": "simdetr.training.detection_task",
    "simdetr.heads.attention_tap": "simdetr.heads.attention",
    "simdetr.heads.headed_backbone": "simdetr.heads.headed",
    "simdetr.heads.headed_detector": "simdetr.heads.headed",
    "simdetr.heads.non_local_attention": "simdetr.heads.attention",
    "simdetr.proposals": "simdetr.mining",
    "simdetr.proposals.batch_mining": "simdetr.mining.batch",
    "simdetr.proposals.features": "simdetr.mining.encoders",
    "simdetr.proposals.fitted_encoder": "simdetr.mining.encoders",
    "simdetr.training.checkpoints": "simdetr.training.train",
    "simdetr.training.convergence": "simdetr.training.optimisation",
    "simdetr.training.encoder_objectives": "simdetr.encoder_training.objectives",
    "simdetr.training.epoch_sampler": "simdetr.training.sampler",
}
"""Module of before -> module of today; what is not here has stayed, or stands under its folder's new name."""

_PATH = re.compile(r"\bsimdetr(?:\.[A-Za-z_]\w*)+")


def current(text: str) -> str:
    """A text, such as a class path or a whole config, with every moved class path in it replaced."""
    return _PATH.sub(lambda found: _moved(found[0]), text)


def _moved(path: str) -> str:
    for length in range(path.count(".") + 1, 1, -1):
        parts = path.split(".")
        head = ".".join(parts[:length])
        if head in MOVED:
            return ".".join([MOVED[head], *parts[length:]])
    return path


def class_of(class_path: str, base: type, folders: Sequence[str] = ("",)) -> Any:  # noqa: ANN401 - of any class
    """The class of this package that a stored description names; it must not name arbitrary code.

    Args:
        class_path: As stored, maybe by an older version.
        base: What it has to be a class of.
        folders: Where in the package it may be.

    Raises:
        ValueError: It is none.
    """
    module_name, _, class_name = current(class_path).rpartition(".")
    allowed = f"{module_name}.".startswith(tuple(f"simdetr.{folder}" for folder in folders))
    found = getattr(importlib.import_module(module_name), class_name, None) if allowed else None
    if not (isinstance(found, type) and issubclass(found, base)):
        places = " or ".join(f"simdetr.{folder}".rstrip(".") for folder in folders)
        raise ValueError(f"class_path: expected a {base.__name__} of {places}, got {class_path!r}.")
    return found


def current_arguments(arguments: Sequence[str]) -> Iterator[str]:
    """Command-line arguments with today's class paths; a config file that holds older ones is given as its text."""
    before = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_config = name in ("--config", "-c") and equals
        file = value if is_config else argument if before in ("--config", "-c") else None
        before = argument
        if file is None or not Path(file).is_file():
            yield current(argument)
            continue
        text = Path(file).read_text(encoding="utf-8")
        new = current(text)
        yield argument if new == text else f"{name}={new}" if is_config else new
