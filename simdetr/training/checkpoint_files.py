"""Files with detectors: a path in, tensors, their format and what rebuilds the detector out.

Reads folders of simdetr and of transformers (``model.safetensors`` and ``config.json``), single .safetensors files,
Lightning checkpoints and the .pth files of other projects. Nothing is unpickled: safetensors, or
``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from simdetr.training.checkpoint_formats import OWN, CheckpointFormat, recognise
from simdetr.training.transformers_config import config_from_transformers

LOG = logging.getLogger(__name__)
WEIGHTS_NAME, CONFIG_NAME, PREPROCESSOR_NAME = "model.safetensors", "config.json", "preprocessor_config.json"

_PUBLISHED_IMAGES = {
    "short_side": 800,
    "max_side": 1333,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
"""How the original detectors prepare images for evaluation (specs/detectors.md A9)."""
_TOLD = {"nheads": "num_heads", "num_queries": "num_queries", "dilation": "dilation"}
"""Options of the original that tensors do not tell, and our arguments of that meaning."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a file.

    Attributes:
        path: The file.
        tensors: Its tensors under the names that they have there.
        format: Whose names they are.
        stored: What rebuilds the detector, as ``checkpoint_config`` gives it, if something beside the tensors says so.
        known: Arguments of the detector that the original's options tell.
    """

    path: Path
    tensors: dict[str, Tensor]
    format: CheckpointFormat = OWN
    stored: dict[str, Any] | None = None
    known: dict[str, Any] = field(default_factory=dict)

    def state(self, own: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Its tensors under our names; ``own`` is the state dict of the detector that they are for."""
        return self.format.rename(self.tensors, own or {})

    def names_without(self, used: Mapping[str, Tensor]) -> list[str]:
        """Names in the file of the tensors that no part of is among ``used``."""
        places = {tensor.untyped_storage().data_ptr() for tensor in used.values()}
        return [name for name, value in self.tensors.items() if value.untyped_storage().data_ptr() not in places]

    def config(self, known: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What rebuilds the detector: stored beside the tensors, or read off them; None if nothing tells.

        Args:
            known: Arguments of the detector to put over what the file tells.

        Raises:
            UnknownArchitectureError: It is a detector of ours, but tensors do not tell enough to build it.
        """
        if self.stored is not None:
            return {**self.stored, "init_args": {**self.stored["init_args"], **(known or {})}}
        if self.format.architecture is None:
            return None
        found = self.format.architecture(self.state(), {**self.known, **(known or {})})
        if found.assumed:
            LOG.info("%s: assumed, for the tensors do not tell: %s", self.path, ", ".join(found.assumed))
        names = [{"id": number, "name": f"class {number}"} for number in range(found.init_args["num_classes"])]
        return {
            "class_path": found.class_path,
            "init_args": found.init_args,
            "categories": names,
            "image_settings": dict(_PUBLISHED_IMAGES),
        }


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a detector folder, a folder of transformers, a .safetensors file or a checkpoint of tensors.

    Raises:
        FileNotFoundError: Nothing there, with the accepted forms.
        ValueError: The file is damaged, or is no such file; or a folder of transformers holds another detector.
    """
    given = path
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"weights: expected a folder with {WEIGHTS_NAME}, a .safetensors file, a .ckpt or a .pth, got {given}, "
            f"which {'holds no checkpoint' if given.is_dir() else 'does not exist'}."
        )
    try:
        if path.suffix == ".safetensors":
            config, preprocessor = (_read_json(path.with_name(name)) for name in (CONFIG_NAME, PREPROCESSOR_NAME))
            content: dict[str, Any] = {"model": load_file(str(path))}
        else:
            config = preprocessor = None
            with torch.serialization.safe_globals([argparse.Namespace]):  # the original's options
                content = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(content, dict):
                raise TypeError(f"it holds a {type(content).__name__}")
    except Exception as error:  # a damaged file fails in any way
        # torch's own text offers to unpickle it all the same
        unsafe = "weights_only" in str(error)
        reason = "it holds more than tensors" if unsafe else (str(error).strip() or "it ends too early").splitlines()[0]
        raise ValueError(
            f"weights: {path} cannot be read as a detector ({reason}); the file is damaged, or is no .safetensors file "
            "and no checkpoint of tensors."
        ) from error
    own_folder = config is not None and "class_path" in config
    tensors = content["model"] if own_folder else averaged_state(content)  # names are the detector's own already
    stored = config if config is not None else content.get("simdetr")
    if stored is not None and "class_path" in stored:
        # of what we wrote, only an original's .pth has other names than ours
        return Checkpoint(path, tensors, recognise(tensors) if config is None and "model" in content else OWN, stored)
    if stored is not None and "model_type" in stored:
        stored = config_from_transformers(stored, preprocessor or {}, tensors, path)
        return Checkpoint(path, tensors, recognise(tensors), stored)
    return Checkpoint(path, tensors, recognise(tensors), None, _told(content.get("args")))


def averaged_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The detector's tensors of a Lightning checkpoint (the averaged ones if EMA was on) or of a plain state dict."""
    state: Mapping[str, Any] = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    if any(name.startswith("detector.") for name in state):  # the criterion may have tensors beside it
        state = {name: value for name, value in state.items() if name.startswith("detector.")}
    for prefix in ("detector.", "module."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _told(options: object) -> dict[str, Any]:
    """Arguments of ours among the options that an original keeps beside its tensors."""
    given = vars(options) if isinstance(options, argparse.Namespace) else {}
    return {ours: given[theirs] for theirs, ours in _TOLD.items() if theirs in given}
