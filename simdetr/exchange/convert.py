"""Detectors between simdetr and other projects: a checkpoint in, a file or folder of another format out.

What each format is for: a detector folder (safetensors and JSON) for simdetr, a folder for transformers, a .pth for the
original's code. Tensors are copied bit by bit. Deformable DETR is written under transformers' names, with equal
outputs, without transformers itself; the folder is a checkpoint for every command. Detectors that are transformers' own
write and read themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from simdetr.data.annotations import Category
from simdetr.data.storage import atomic_path, write_json
from simdetr.detectors import DeformableDETR, TransformersDetector, ViDT
from simdetr.exchange.formats import (
    MODEL_TYPE,
    config_to_transformers,
    images_from_transformers,
    images_to_transformers,
    label_names,
)
from simdetr.exchange.parameter_names import drop_copies, plain_heads, to_official, to_official_vidt, to_transformers
from simdetr.exchange.weights import (
    CONFIG_NAME,
    PREPROCESSOR_NAME,
    WEIGHTS_NAME,
    LoadedDetector,
    checkpoint_config,
    load_detector,
    read_checkpoint,
    read_json,
    rebuild,
    save_detector,
)

_GROUPS, _EPSILON, _STAGES = 32, 1e-5, 5
_SHARED = ("model.", "class_embed.", "bbox_embed.")
"""Where transformers' Deformable DETR has its tensors; subclasses of ours may have more."""
_PROCESSORS = {
    MODEL_TYPE: "DeformableDetrImageProcessor",
    "conditional_detr": "ConditionalDetrImageProcessor",
    "dab_detr": "ConditionalDetrImageProcessor",
    "detr": "DetrImageProcessor",
}
"""Image processors that prepare images as we do, by model type; other families squash images to one size."""


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
        What was written, in one line; the other functions return the same.

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
    """Write a detector folder, ``model.safetensors`` and ``config.json``."""
    _check_apart(checkpoint, out)
    return _write_folder(load_detector(checkpoint), out)


def export_transformers(checkpoint: Path, out: Path) -> str:
    """Write a folder for transformers, see ``write_transformers_folder``."""
    _check_apart(checkpoint, out)
    return write_transformers_folder(load_detector(checkpoint), out)


def export_official(checkpoint: Path, out: Path) -> str:
    """Write a .pth that the code of the original Deformable DETR, DETReg or ViDT loads; its entry is ``model``.

    An entry beside it, which the original ignores, keeps what rebuilds the detector here.

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


def write_transformers_folder(loaded: LoadedDetector, folder: Path) -> str:
    """Write ``model.safetensors`` and ``config.json``, and ``preprocessor_config.json`` where it can say what we do.

    If transformers has no detector that computes the same, this is a ValueError.
    """
    detector = loaded.detector
    if isinstance(detector, TransformersDetector):
        names = dict(enumerate(label_names(loaded.categories, detector.num_classes)))
        detector.model.config.id2label = names
        detector.model.config.label2id = {name: number for number, name in names.items()}
        detector.model.save_pretrained(folder)
        model_type = str(detector.model.config.model_type)
    elif isinstance(detector, DeformableDETR):
        check_same_outputs(detector)
        _write_deformable_detr(detector, loaded.categories, folder)
        model_type = MODEL_TYPE
    else:
        raise ValueError(
            f"checkpoint: transformers has no {type(detector).__name__}; expected a DeformableDETR or a "
            "TransformersDetector. Export to safetensors instead."
        )
    if model_type not in _PROCESSORS:
        return (
            f"{model_type} in {folder}, without preprocessor_config.json: the image processor of its family resizes "
            "to a fixed square, as simdetr does not. Prepare images as simdetr did: short side "
            f"{loaded.image_settings.get('short_side')}, long side at most {loaded.image_settings.get('max_side')} px."
        )
    images = {"image_processor_type": _PROCESSORS[model_type], **images_to_transformers(loaded.image_settings)}
    write_json(folder / PREPROCESSOR_NAME, images, indent=2)
    return f"{model_type} with {detector.num_classes} classes in {folder}"


def _write_deformable_detr(detector: DeformableDETR, categories: tuple[Category, ...], folder: Path) -> None:
    tensors = {
        name: tensor.contiguous()
        for name, tensor in to_transformers(drop_copies(plain_heads(detector.state_dict()))).items()
        # transformers' batch norm is frozen, and counts nothing
        if name.startswith(_SHARED) and not name.endswith("num_batches_tracked")
    }
    with atomic_path(folder / WEIGHTS_NAME) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    write_json(folder / CONFIG_NAME, config_to_transformers(all_arguments(detector), categories), indent=2)


def all_arguments(detector: DeformableDETR) -> dict[str, Any]:
    """Arguments of ``DeformableDETR`` that build this detector; subclasses keep only those that they were given."""
    parameters = signature(DeformableDETR).parameters
    return {name: detector.init_args.get(name, parameter.default) for name, parameter in parameters.items()}


def check_same_outputs(detector: DeformableDETR) -> None:
    """Raise ValueError for a detector that transformers' Deformable DETR would compute otherwise."""
    arguments, body = all_arguments(detector), detector.backbone.body
    info: Any = body.feature_info
    norms = [module for module in body.modules() if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d)]
    has_other_norms = any(isinstance(module, BatchNormAct2d | FrozenBatchNormAct2d) for module in body.modules())
    problems = {
        f"backbone={arguments['backbone']!r}: expected a ResNet": has_other_norms
        or len(info.info) != _STAGES
        or not norms
        or any(norm.eps != _EPSILON for norm in norms),
        f"hidden_dim={arguments['hidden_dim']}: expected a multiple of {_GROUPS}": arguments["hidden_dim"] % _GROUPS,
        "exclude_invalid_proposals=True: expected False": arguments["exclude_invalid_proposals"],
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(
                f"{problem}, for transformers' Deformable DETR would give other outputs. Export to safetensors or onnx "
                "instead."
            )


def model_type_of(folder: Path) -> str | None:
    """The kind of model in a folder of transformers; None for everything else."""
    return (read_json(folder / CONFIG_NAME) or {}).get("model_type")


def read_transformers_folder(folder: Path) -> LoadedDetector:
    """A detector of any family of transformers, which ``save_pretrained`` wrote, behind ``TransformersDetector``."""
    if not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"checkpoint: expected {WEIGHTS_NAME} in {folder}; pickled weights are not read.")
    names: dict[str, str] = (read_json(folder / CONFIG_NAME) or {}).get("id2label") or {"0": "class 0", "1": "class 1"}
    detector = TransformersDetector(len(names), str(folder), pretrained=str(folder))
    categories = tuple(Category(int(number), name) for number, name in names.items())
    images = images_from_transformers(read_json(folder / PREPROCESSOR_NAME) or {})
    return LoadedDetector(detector.eval(), categories, images)
