"""Detectors on disk: a folder with ``model.safetensors`` and ``config.json`` out; that, or any checkpoint, in.

A folder rebuilds the detector, its categories and image sizes without any other code or config. Read are folders of
simdetr and of transformers, single .safetensors files, Lightning checkpoints and the .pth files of other projects.
Nothing is unpickled: safetensors, or ``torch.load(weights_only=True)``. A checkpoint gives a detector every tensor
whose name and shape agree; heads for other classes are new, and listed.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from simdetr.data.annotations import Category
from simdetr.data.class_paths import class_of
from simdetr.data.pretrained_weights import counted
from simdetr.data.storage import atomic_path, write_json
from simdetr.detectors.detector import Detector
from simdetr.exchange.formats import (
    OWN,
    CheckpointFormat,
    config_from_transformers,
    images_from_transformers,
    numbered_categories,
    recognise,
)
from simdetr.exchange.parameter_names import add_objectness, fit_to, fold_objectness, is_of_queries, restore_copies

LOG = logging.getLogger(__name__)
WEIGHTS_NAME, CONFIG_NAME, PREPROCESSOR_NAME = "model.safetensors", "config.json", "preprocessor_config.json"
_TOLD = {"nheads": "num_heads", "num_queries": "num_queries", "dilation": "dilation"}
"""Options of the original that tensors do not tell, and our arguments of that meaning."""
_DOWNLOADS = {"pretrained_backbone": False, "pretrained": None}
"""Arguments of detectors that say where weights come from, and what says nowhere."""
_LEAST_FITTING = 0.5
_MADE_UP = re.compile(r"class \d+|LABEL_\d+")
"""Names that simdetr's and transformers' imports give to classes of which they know only the number."""


@dataclass(frozen=True)
class LoadedDetector:
    """A detector ready for inference, with what it was trained for.

    Attributes:
        detector: In evaluation mode.
        image_settings: How images are prepared for it.
        reference_points: Rule of every class, see `simdetr.data.reference_points`.
    """

    detector: Detector
    categories: tuple[Category, ...]
    image_settings: dict[str, Any]
    reference_points: dict[str, str] | None = None


def checkpoint_config(detector: Detector, data: Any) -> dict[str, Any]:  # noqa: ANN401
    """What rebuilds ``detector``, as plain JSON types; ``data`` gives categories and image settings, or None."""
    rules = getattr(data, "reference_points", None)
    return {
        "class_path": class_path_of(detector),
        "init_args": detector.init_args,
        "categories": [asdict(category) for category in data.categories] if data is not None else [],
        "image_settings": dict(data.image_settings) if data is not None else {},
        **({"reference_points": dict(rules.table)} if rules is not None else {}),
    }


def class_path_of(detector: nn.Module) -> str:
    """The dotted name of its class."""
    return f"{type(detector).__module__}.{type(detector).__qualname__}"


def save_detector(detector: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write ``model.safetensors`` and ``config.json``; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / WEIGHTS_NAME) as temporary:
        save_model(detector, str(temporary))
    write_json(folder / CONFIG_NAME, config, indent=2)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None where there is none."""
    content: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return content


def is_saved(folder: Path) -> bool:
    """Whether ``save_detector`` ended well in this folder: it writes the config last."""
    return (folder / WEIGHTS_NAME).is_file() and (folder / CONFIG_NAME).is_file()


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a file.

    Attributes:
        tensors: Under the names that they have there.
        format: Whose names they are.
        stored: As of ``checkpoint_config``, if something beside the tensors rebuilds the detector.
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

        ``known`` arguments go over what the file tells. If it is one of ours, but its tensors do not tell enough, this
        is an UnknownArchitectureError.
        """
        if self.stored is not None:
            return {**self.stored, "init_args": {**self.stored["init_args"], **(known or {})}}
        if self.format.architecture is None:
            return None
        found = self.format.architecture(self.state(), {**self.known, **(known or {})})
        if found.assumed:
            LOG.info("%s: assumed, for the tensors do not tell: %s", self.path, ", ".join(found.assumed))
        return {
            "class_path": found.class_path,
            "init_args": found.init_args,
            "categories": numbered_categories(found.init_args["num_classes"]),
            "image_settings": images_from_transformers({}),  # the published ones
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
            config, preprocessor = (read_json(path.with_name(name)) for name in (CONFIG_NAME, PREPROCESSOR_NAME))
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
    stored = config if config is not None else content.get("simdetr") or {}
    if config is not None and "class_path" in config:
        return Checkpoint(path, content["model"], OWN, stored)
    tensors = averaged_state(content)
    if "class_path" in stored:  # of what we wrote, only an original's .pth has other names than ours
        return Checkpoint(path, tensors, recognise(tensors) if "model" in content else OWN, stored)
    if "model_type" in stored:
        stored = config_from_transformers(stored, preprocessor or {}, tensors, path)
        return Checkpoint(path, tensors, recognise(tensors), stored)
    args = content.get("args")
    options = vars(args) if isinstance(args, argparse.Namespace) else {}
    known = {ours: options[theirs] for theirs, ours in _TOLD.items() if theirs in options}
    return Checkpoint(path, tensors, recognise(tensors), None, known)


def averaged_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The detector's tensors of a Lightning checkpoint (the averaged ones if EMA was on) or of a plain state dict."""
    state: Mapping[str, Any] = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    if any(name.startswith("detector.") for name in state):  # the criterion may have tensors beside it
        state = {name: value for name, value in state.items() if name.startswith("detector.")}
    for prefix in ("detector.", "module."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class LoadReport:
    """What loading weights did.

    Attributes:
        source: Whose format the file is.
        kept: Names of the detector's tensors that were set.
        replaced: Names whose shape in the file differs, or which speak of other classes; they stay as initialised.
        missing: Names that the file does not have; they stay as initialised.
        unexpected: Names of the file that the detector has no place for.
        image_settings: How images were prepared for the file's detector, as far as it says.
        reason: Why tensors were replaced whose shape agrees, or in which part learned queries were kept, if so.
    """

    path: Path
    source: str = "simdetr"
    kept: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    image_settings: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    def summary(self) -> str:
        """One line: the counts, and the first names of what was not kept."""
        others = (counted(kind, getattr(self, kind)) for kind in ("replaced", "missing", "unexpected"))
        parts = ", ".join([f"{len(self.kept)} tensors kept", *others])
        return f"{self.path} ({self.source}): {parts}{f'; {self.reason}' if self.reason else ''}"

    def log(self) -> None:
        """Log the summary."""
        LOG.info("%s", self.summary())


def load_weights(detector: Detector, path: Path, class_names: Sequence[str] | None = None) -> LoadReport:
    """Copy every tensor whose name and shape agree; leave the others as initialised and list them.

    Args:
        detector: Any detector of ``simdetr.detectors``.
        path: What ``read_checkpoint`` reads.
        class_names: The detector's classes; if the file's are others, however many, what speaks of single classes comes
            along for the classes of the same name and stays as initialised for the others. None, or a file that does
            not name its classes, leaves that to the shapes.

    Raises:
        ValueError: Most tensors do not agree: the file is of another detector.
    """
    return copy_weights(detector, read_checkpoint(path), class_names)


def copy_weights(detector: Detector, checkpoint: Checkpoint, class_names: Sequence[str] | None = None) -> LoadReport:
    """``load_weights`` for a file that was read already."""
    whole = detector  # with a head that the file does not know
    if checkpoint.stored is None or checkpoint.stored.get("class_path") != class_path_of(detector):
        detector = detector.core
    own = detector.state_dict()
    given = checkpoint.state(own)
    if not any("object_embed." in name for name in own):
        given = fold_objectness(given)
    restored = restore_copies(given, own)
    state = fit_to(restored, own)
    other_classes = _other_classes(checkpoint, class_names)
    others = class_tensors(detector) & state.keys() if other_classes else set()
    present = add_objectness({name: value for name, value in state.items() if name not in others}, own)
    shared = _shared_classes(checkpoint, class_names) if others else {}
    widened = {name for name in others if shared and _is_by_class(state[name], own[name], checkpoint, class_names)}
    present |= {name: _rows_of_classes(own[name], state[name], shared) for name in widened}
    fitting = {name for name, value in present.items() if name in own and own[name].shape == value.shape}
    # a module that stands under two names (shared heads) is stored once by safetensors: its other name is no loss
    stored_at = {own[name].data_ptr() for name in state if name in own and own[name].numel() > 0}
    unused = checkpoint.names_without(given) if checkpoint.format.is_partial else []
    resized = [  # learned queries, cut or filled up
        f"{name} is {[*value.shape]} here, {[*restored[name].shape]} in the file, and their common part is kept"
        for name, value in state.items()
        if is_of_queries(name) and value.shape != restored[name].shape
    ]
    report = LoadReport(
        path=checkpoint.path,
        source=checkpoint.format.title,
        kept=[name for name in own if name in fitting and name in state],
        replaced=[name for name in own if name in state and name not in fitting],
        missing=[name for name in own if name not in state and own[name].data_ptr() not in stored_at],
        unexpected=[*(name for name in given if name not in own), *unused],
        image_settings=dict((checkpoint.stored or {}).get("image_settings") or {}),
        reason="; ".join([*([other_classes] if others else []), *([_kept(shared)] if widened else []), *resized]),
    )
    _check_fit(detector, report, is_partial=checkpoint.format.is_partial or detector.takes_backbones)
    detector.load_state_dict({name: present[name] for name in fitting}, strict=False)
    return _within(report, detector, whole)


def _within(report: LoadReport, core: Detector, whole: Detector) -> LoadReport:
    """What loading a detector did to the one with a head that it is part of, by its names; the head is missing."""
    if core is whole:
        return report
    prefix = next(name for name, module in whole.named_modules() if module is core) + "."
    lists = (report.kept, report.replaced, report.missing)
    kept, replaced, missing = ([prefix + name for name in names] for names in lists)
    missing += [name for name in whole.state_dict() if not name.startswith(prefix)]
    return replace(report, kept=kept, replaced=replaced, missing=missing)


def _shared_classes(checkpoint: Checkpoint, class_names: Sequence[str] | None) -> dict[int, int]:
    """Row of a class here to its row in the file, for the classes that both name."""
    stored = {str(category["name"]): row for row, category in enumerate((checkpoint.stored or {})["categories"])}
    return {row: stored[name] for row, name in enumerate(class_names or ()) if name in stored}


def _is_by_class(given: Tensor, own: Tensor, checkpoint: Checkpoint, class_names: Sequence[str] | None) -> bool:
    """Whether both tensors have a row for each class of their own, and agree in all else."""
    counts = len((checkpoint.stored or {})["categories"]), len(class_names or ())
    return (given.shape[:1], own.shape[:1]) == ((counts[0],), (counts[1],)) and given.shape[1:] == own.shape[1:]


def _rows_of_classes(own: Tensor, given: Tensor, shared: Mapping[int, int]) -> Tensor:
    """A tensor of classes as initialised, with the file's rows for the classes that both know."""
    rows = own.clone()
    rows[list(shared.keys())] = given[list(shared.values())].to(rows)
    return rows


def _kept(shared: Mapping[int, int]) -> str:
    return f"the rows of the {len(shared)} classes that both know are kept"


def _other_classes(checkpoint: Checkpoint, class_names: Sequence[str] | None) -> str:
    """How a file's classes differ from those wanted; empty if they are the same, or if one side is not known."""
    stored = [str(category["name"]) for category in (checkpoint.stored or {}).get("categories") or []]
    if class_names is None or all(map(_MADE_UP.fullmatch, stored)) or stored == list(class_names):
        return ""
    met, wanted = (f"{len(names)} ({', '.join(names[:3])}, …)" for names in (stored, list(class_names)))
    return f"what speaks of single classes is new, for the file's are {met} and the data's {wanted}"


def class_tensors(detector: Detector) -> set[str]:
    """Names of a detector's tensors that speak of single classes: those whose shapes change with their number."""
    arguments = without_downloads(detector.init_args) | {"num_classes": detector.num_classes + 1}
    with torch.random.fork_rng(devices=[]):
        wider = type(detector).from_init_args(arguments).state_dict()
    return {name for name, value in detector.state_dict().items() if wider[name].shape != value.shape}


def _check_fit(detector: Detector, report: LoadReport, *, is_partial: bool) -> None:
    """Raise for weights of another architecture; of those that fit in part, the whole backbone must."""
    expected = "all tensors of its backbone" if is_partial else f"{_LEAST_FITTING:.0%} of its tensors"
    kept, total = len(report.kept), len(report.kept) + len(report.replaced) + len(report.missing)
    body = detector.get_submodule(detector.body_name).named_parameters(detector.body_name)
    fits = {name for name, _ in body} <= set(report.kept) if is_partial else kept >= _LEAST_FITTING * total
    if not fits:
        raise ValueError(
            f"init_weights: expected {expected}, but {kept} of the {total} tensors of {type(detector).__name__} are in "
            f"{report.summary()}. It is of another detector, backbone or size; for a backbone alone use "
            "--model.backbone_weights."
        )


def load_detector(path: Path) -> LoadedDetector:
    """Rebuild a detector from what ``read_checkpoint`` reads, see ``rebuild``."""
    return rebuild(read_checkpoint(path))


def rebuild(checkpoint: Checkpoint, known: Mapping[str, Any] | None = None) -> LoadedDetector:
    """The detector of a file, in evaluation mode, without parts that serve training alone.

    Args:
        checkpoint: The file.
        known: Arguments to put over what it tells.

    Raises:
        ValueError: Nothing tells which detector it is, or tensors are missing.
    """
    config = checkpoint.config(known)
    if config is None:
        raise ValueError(
            f"checkpoint: {checkpoint.path} holds weights but no {CONFIG_NAME}, and its names "
            f"({checkpoint.format.title}) do not tell the detector; expected a folder or .ckpt written by simdetr. Use "
            "it as --init of `simdetr finetune` with a --config that names the detector."
        )
    detector = build_detector(config)
    report = copy_weights(detector, checkpoint)
    if checkpoint.format is not OWN:
        report.log()
    if report.missing or report.replaced:
        raise ValueError(
            f"checkpoint: {checkpoint.path} does not fit its own config: missing {report.missing[:5]}, other shape "
            f"{report.replaced[:5]}. The file is damaged or was edited."
        )
    categories = tuple(Category(**category) for category in config["categories"])
    return LoadedDetector(
        detector.eval().deployed.eval(), categories, config["image_settings"], config.get("reference_points")
    )


def build_detector(config: Mapping[str, Any]) -> Detector:
    """Construct the class a config names, with new weights; a ValueError if it does not take the arguments."""
    found = detector_class(config["class_path"])
    try:
        return found.from_init_args(without_downloads(config["init_args"]))
    except TypeError as error:
        raise ValueError(f"init_args: {found.__name__} does not take the arguments of the file ({error}).") from error


def detector_class(class_path: str) -> type[Detector]:
    """The detector that a config names; a ValueError for a class of anything else, see ``class_of``."""
    found: type[Detector] = class_of(class_path, Detector, ("detectors.", "heads."))
    return found


def brings_weights(init_args: Mapping[str, Any]) -> bool:
    """Whether a detector with these arguments starts from weights that its library keeps, in whole or in part."""
    return any(
        brings_weights(value) if isinstance(value, Mapping) else bool(value) and name in _DOWNLOADS
        for name, value in init_args.items()
    )


def without_downloads(init_args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a detector whose weights come from a file: nothing has to be fetched only to be overwritten."""
    parts = {name: without_downloads(value) for name, value in init_args.items() if isinstance(value, Mapping)}
    return {name: parts.get(name, _DOWNLOADS.get(name, value)) for name, value in init_args.items()}
