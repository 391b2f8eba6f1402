"""Detectors on disk: a folder with ``model.safetensors`` and ``config.json``, or a Lightning checkpoint.

In: a detector with its categories and image sizes. Out: files that rebuild it without any other code or config.
Nothing is unpickled: safetensors, or ``torch.load(weights_only=True)``. A head whose classes differ is replaced and
listed; everything else is kept.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from simdetr.data.atomic_files import atomic_path
from simdetr.data.labels import Category
from simdetr.detectors.detector import Detector
from simdetr.detectors.state_dict_names import from_official

LOG = logging.getLogger(__name__)
WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"


@dataclass(frozen=True)
class LoadReport:
    """What loading weights did: names of tensors kept, replaced (shape differs), missing and unexpected."""

    path: Path
    kept: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def log(self) -> None:
        """One line of counts, and the names of what was not kept."""
        LOG.info("%s: %d tensors kept, %d replaced", self.path, len(self.kept), len(self.replaced))
        for what in ("replaced", "missing", "unexpected"):
            if names := getattr(self, what):
                LOG.info("  %s: %s", what, ", ".join(names))


@dataclass(frozen=True)
class LoadedDetector:
    """A detector ready for inference, with the categories it names and the image sizes it was trained for."""

    detector: Detector
    categories: tuple[Category, ...]
    image_settings: dict[str, Any]


def checkpoint_config(detector: Detector, data: Any) -> dict[str, Any]:  # noqa: ANN401
    """What rebuilds ``detector``, as plain JSON types; ``data`` gives categories and image settings, or None."""
    return {
        "class_path": f"{type(detector).__module__}.{type(detector).__qualname__}",
        "init_args": detector.init_args,
        "categories": [asdict(category) for category in data.categories] if data is not None else [],
        "image_settings": dict(data.image_settings) if data is not None else {},
    }


def save_detector(detector: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write ``model.safetensors`` and ``config.json``; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / WEIGHTS_NAME) as temporary:
        save_model(detector, str(temporary))
    with atomic_path(folder / CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(config, indent=2), encoding="utf-8")


def is_saved(folder: Path) -> bool:
    """Whether ``save_detector`` ended well in this folder: it writes the config last."""
    return (folder / WEIGHTS_NAME).is_file() and (folder / CONFIG_NAME).is_file()


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and, where present, the config of a detector folder, a .safetensors file or a Lightning checkpoint.

    Raises:
        FileNotFoundError: Nothing there, with the accepted forms.
        ValueError: The file is damaged, or is no such file.
    """
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"weights: expected a folder with {WEIGHTS_NAME}, a .safetensors file or a .ckpt, got {path}, which does "
            "not exist."
        )
    try:
        if path.suffix == ".safetensors":
            beside = path.with_name(CONFIG_NAME)
            config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else None
            return load_file(str(path)), config
        with torch.serialization.safe_globals([argparse.Namespace]):  # the original's options
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"it holds a {type(checkpoint).__name__}")
    except Exception as error:  # a damaged file fails in any way
        reason = (str(error).strip() or "it ends too early").splitlines()[0]
        raise ValueError(
            f"weights: {path} cannot be read as a detector ({reason}); the file is damaged, or is no .safetensors file "
            "and no checkpoint of tensors."
        ) from error
    return averaged_state(checkpoint), checkpoint.get("simdetr")


def averaged_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The detector's tensors of a Lightning checkpoint (the averaged ones if EMA was on) or of a plain state dict.

    Checkpoints of the original Deformable DETR are given our names.
    """
    state: dict[str, Tensor] = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    prefix = "detector."
    if any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return from_official(state) if any(name.startswith("backbone.0.") for name in state) else state


def load_weights(detector: nn.Module, path: Path) -> LoadReport:
    """Copy every tensor whose name and shape agree; leave the others as initialised and list them.

    Raises:
        ValueError: No tensor agrees: the file is of another detector.
    """
    state, _ = read_state(path)
    own = detector.state_dict()
    # a module that stands under two names (shared heads) is stored once by safetensors: its other name is no loss
    stored_at = {own[name].data_ptr() for name in state if name in own and own[name].numel() > 0}
    kept = [name for name, value in state.items() if name in own and own[name].shape == value.shape]
    replaced = [name for name, value in state.items() if name in own and own[name].shape != value.shape]
    report = LoadReport(
        path=path,
        kept=kept,
        replaced=replaced,
        missing=[name for name in own if name not in state and own[name].data_ptr() not in stored_at],
        unexpected=[name for name in state if name not in own],
    )
    if not kept:
        raise ValueError(
            f"init_weights: no tensor of {path} fits {type(detector).__name__}; it holds {len(state)} tensors such as "
            f"{next(iter(state), 'none')!r}. Use weights of the same detector and backbone."
        )
    detector.load_state_dict({name: state[name] for name in kept}, strict=False)
    return report


def load_detector(path: Path) -> LoadedDetector:
    """Rebuild a detector from a folder or checkpoint written by simdetr, in evaluation mode.

    Raises:
        ValueError: The file carries no config, or tensors are missing.
    """
    _, config = read_state(path)
    if config is None:
        raise ValueError(
            f"checkpoint: {path} holds weights but no {CONFIG_NAME}; expected a folder or .ckpt written by simdetr. "
            "Build the detector in Python and call simdetr.training.load_weights instead."
        )
    detector = build_detector(config)
    report = load_weights(detector, path)
    if report.missing or report.replaced:
        raise ValueError(
            f"checkpoint: {path} does not fit its own config: missing {report.missing[:5]}, other shape "
            f"{report.replaced[:5]}. The file is damaged or was edited."
        )
    categories = tuple(Category(**category) for category in config["categories"])
    return LoadedDetector(detector.eval(), categories, config["image_settings"])


def build_detector(config: dict[str, Any]) -> Detector:
    """Construct the class a config names, with new weights.

    Raises:
        ValueError: The class is not one of simdetr's detectors (a config must not name arbitrary code), or does not
            take the arguments.
    """
    module_name, _, class_name = config["class_path"].rpartition(".")
    allowed = module_name == "simdetr.detectors" or module_name.startswith("simdetr.detectors.")
    found = getattr(importlib.import_module(module_name), class_name, None) if allowed else None
    if not (isinstance(found, type) and issubclass(found, Detector)):
        raise ValueError(f"class_path: expected a class of simdetr.detectors, got {config['class_path']!r}.")
    # its weights are in the file: there is nothing to download
    arguments = {name: value for name, value in config["init_args"].items() if name != "pretrained_backbone"}
    try:
        return found(**arguments)
    except TypeError as error:
        raise ValueError(f"init_args: {found.__name__} does not take the arguments of the file ({error}).") from error
