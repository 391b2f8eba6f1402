"""Detectors between simdetr and other projects: a checkpoint in, a file or folder of another format out.

What each format is for: a detector folder (safetensors and JSON) for simdetr, a folder for transformers, a .pth for the
original's code. Tensors are copied bit by bit. Source: specs/detectors.md part 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from simdetr.data.atomic_files import atomic_path
from simdetr.data.labels import Category
from simdetr.detectors import DeformableDETR, ViDT
from simdetr.detectors.state_dict_names import plain_heads, to_official
from simdetr.detectors.vidt_names import to_official_vidt
from simdetr.training.checkpoint_files import CONFIG_NAME, WEIGHTS_NAME, read_checkpoint
from simdetr.training.transformers_config import MODEL_TYPE
from simdetr.training.transformers_folder import model_type_of, read_transformers_folder, write_transformers_folder
from simdetr.training.weights import LoadedDetector, checkpoint_config, load_detector, rebuild, save_detector


def import_checkpoint(
    checkpoint: Path,
    out: Path,
    known: Mapping[str, Any] | None = None,
    categories: Sequence[Category] = (),
    image_settings: Mapping[str, Any] | None = None,
) -> str:
    """Write the detector of another project's checkpoint as a detector folder of ours.

    Args:
        checkpoint: What ``read_checkpoint`` reads, or a folder of any detector of transformers.
        out: Folder to write.
        known: Arguments of the detector that its tensors do not tell.
        categories: Names of the classes, see ``name_classes``; the checkpoint's own when left out.
        image_settings: ``short_side`` and others to put over those of the checkpoint, or of the publications.

    Returns:
        What was written, in one line.

    Raises:
        ValueError: The tensors do not tell the detector, or do not fit what was told.
    """
    _check_apart(checkpoint, out)
    if model_type_of(checkpoint) in (None, MODEL_TYPE):
        loaded = rebuild(read_checkpoint(checkpoint), known)
    else:
        loaded = read_transformers_folder(checkpoint)
    if categories:
        loaded = replace(loaded, categories=name_classes(categories, loaded.detector.num_classes))
    return _write_folder(replace(loaded, image_settings={**loaded.image_settings, **(image_settings or {})}), out)


def name_classes(categories: Sequence[Category], num_classes: int) -> tuple[Category, ...]:
    """One category for every class: in their order, or, where there are fewer, class k by the id k.

    The original detectors number their classes by the ids of COCO, which has 80 between 1 and 90.

    Raises:
        ValueError: neither fits.
    """
    if len(categories) == num_classes:
        return tuple(categories)
    by_id = {category.id: category for category in categories}
    if len(categories) > num_classes or not set(by_id) <= set(range(num_classes)):
        raise ValueError(
            f"labels: expected {num_classes} categories, or fewer with ids below that, got {len(categories)} with ids "
            f"such as {list(by_id)[:3]}; give the labels that the detector was trained on."
        )
    return tuple(by_id.get(number, Category(number, f"unused {number}")) for number in range(num_classes))


def export_safetensors(checkpoint: Path, out: Path) -> str:
    """Write a detector folder: ``model.safetensors`` and ``config.json``.

    Returns:
        What was written, in one line.
    """
    _check_apart(checkpoint, out)
    return _write_folder(load_detector(checkpoint), out)


def export_transformers(checkpoint: Path, out: Path) -> str:
    """Write a folder for transformers, see ``write_transformers_folder``."""
    _check_apart(checkpoint, out)
    return write_transformers_folder(load_detector(checkpoint), out)


def export_official(checkpoint: Path, out: Path) -> str:
    """Write a .pth that the code of the original Deformable DETR, DETReg or ViDT loads; its entry is ``model``.

    An entry beside it, which the original ignores, keeps what rebuilds the detector here.

    Returns:
        What was written, in one line.

    Raises:
        ValueError: The detector has no original.
    """
    loaded = load_detector(checkpoint)
    detector, config = loaded.detector, checkpoint_config(loaded.detector, loaded)
    if isinstance(detector, DeformableDETR):
        state = to_official(plain_heads(detector.state_dict()))
        if detector.object_embed is not None:
            config["init_args"] = config["init_args"] | {"objectness": False}
    elif isinstance(detector, ViDT):
        state = to_official_vidt(detector.state_dict())
    else:
        raise ValueError(
            f"checkpoint: {type(detector).__name__} has no original with other names; expected a DeformableDETR or a "
            "ViDT. Export to safetensors instead."
        )
    with atomic_path(out) as temporary:
        torch.save({"model": state, "simdetr": config}, temporary)
    return f"{len(state)} tensors of {type(detector).__name__} under the original's names in {out}"


def _write_folder(loaded: LoadedDetector, out: Path) -> str:
    detector = loaded.detector
    save_detector(detector, checkpoint_config(detector, loaded), out)
    return f"{type(detector).__name__} with {detector.num_classes} classes in {out} ({WEIGHTS_NAME}, {CONFIG_NAME})"


def _check_apart(source: Path, out: Path) -> None:
    """Raise where the result would overwrite what it is made of."""
    if out.resolve() == (source.parent if source.name == WEIGHTS_NAME else source).resolve():
        raise ValueError(f"out: {out} holds the checkpoint itself; give another folder.")
