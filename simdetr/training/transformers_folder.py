"""Folders of transformers: a detector in, what ``AutoModelForObjectDetection.from_pretrained`` loads out; and back.

Deformable DETR is written under transformers' names, with equal outputs; transformers itself is not needed for it, and
the folder is a checkpoint for every command (``checkpoint_files`` reads it). Detectors that are transformers' own write
and read themselves. Source: specs/detectors.md part 1.
"""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from simdetr.data.atomic_files import atomic_path
from simdetr.data.labels import Category
from simdetr.detectors import DeformableDETR, TransformersDetector
from simdetr.detectors.state_dict_names import drop_copies, plain_heads, to_transformers
from simdetr.training.checkpoint_files import CONFIG_NAME, PREPROCESSOR_NAME, WEIGHTS_NAME
from simdetr.training.transformers_config import (
    MODEL_TYPE,
    config_to_transformers,
    images_from_transformers,
    images_to_transformers,
    label_names,
)
from simdetr.training.weights import LoadedDetector

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


def write_transformers_folder(loaded: LoadedDetector, folder: Path) -> str:
    """Write ``model.safetensors`` and ``config.json``, and ``preprocessor_config.json`` where it can say what we do.

    Args:
        loaded: a ``DeformableDETR`` or ``TransformersDetector``, its categories and image settings.
        folder: where to; it is made.

    Returns:
        What was written, in one line.

    Raises:
        ValueError: transformers has no detector that computes the same.
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
    _write_json(images, folder / PREPROCESSOR_NAME)
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
    _write_json(config_to_transformers(all_arguments(detector), categories), folder / CONFIG_NAME)


def _write_json(content: dict[str, Any], path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")


def all_arguments(detector: DeformableDETR) -> dict[str, Any]:
    """Arguments of ``DeformableDETR`` that build this detector; subclasses keep only those that they were given."""
    parameters = signature(DeformableDETR).parameters
    return {name: detector.init_args.get(name, parameter.default) for name, parameter in parameters.items()}


def check_same_outputs(detector: DeformableDETR) -> None:
    """Raise for a detector that transformers' Deformable DETR would compute otherwise.

    Raises:
        ValueError: the argument that has no counterpart there.
    """
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
    config = folder / CONFIG_NAME
    return json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None


def read_transformers_folder(folder: Path) -> LoadedDetector:
    """A detector of any family of transformers, behind ``TransformersDetector``.

    Args:
        folder: what ``save_pretrained`` wrote, with ``model.safetensors``.

    Raises:
        FileNotFoundError: there is no ``model.safetensors``; pickled weights are not read.
    """
    if not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"checkpoint: expected {WEIGHTS_NAME} in {folder}; pickled weights are not read.")
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    names: dict[str, str] = config.get("id2label") or {"0": "class 0", "1": "class 1"}
    detector = TransformersDetector(len(names), str(folder), pretrained=str(folder))
    preprocessor = folder / PREPROCESSOR_NAME
    images = json.loads(preprocessor.read_text(encoding="utf-8")) if preprocessor.is_file() else {}
    categories = tuple(Category(int(number), name) for number, name in names.items())
    return LoadedDetector(detector.eval(), categories, images_from_transformers(images))
