"""Configs of transformers in, object detectors of transformers out, and what their adapter must know of them.

Everything that depends on transformers' families stands here. Nothing is downloaded unless a hub id is given.
Source: transformers (Apache-2.0); specs/detectors.md part 1.
"""

from __future__ import annotations

import json
from inspect import signature
from typing import Any, Literal

from torch import nn

BoxesOf = Literal["auto", "valid", "canvas"]

_BLIND_TO_PADDING = ("rt_detr", "d_fine", "deimv2", "pp_doclayout")
"""Starts of the names of families that take a mask of padding and do not look at it."""
_NOT_ARCHITECTURE = (
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "torch_dtype",
    "transformers_version",
)
"""Settings that say nothing about the network: classes come from the data, weights are float32."""
_TRANSLATED = ("backbone", "backbone_kwargs", "use_pretrained_backbone", "use_timm_backbone")
"""Settings that configs take and turn into ``backbone_config``."""
_FIXED_SIZES = ("anchor_image_size", "eval_size")
"""Settings that tie evaluation to one image size; images come in any."""


def resolve_config(config: dict[str, Any] | str) -> dict[str, Any]:
    """All settings of an architecture as plain JSON types, from some of them or from where they are stored.

    Args:
        config: settings with ``model_type``, or a folder or hub id.

    Raises:
        ImportError: transformers is missing.
        ValueError: no detector is of that type, or it has no such setting, or refuses a value.
    """
    transformers = import_transformers()
    if isinstance(config, str):
        try:
            given = transformers.AutoConfig.from_pretrained(config).to_dict()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"config: {config!r} is neither a folder with a config.json of transformers nor a model of its hub "
                f"({_first_line(error)})."
            ) from error
    else:
        given = dict(config)
    default = _default_settings(given.get("model_type"))
    unknown = sorted(set(given) - set(default) - {*_NOT_ARCHITECTURE, *_TRANSLATED})
    if unknown and not isinstance(config, str):  # stored configs carry what older versions knew
        raise ValueError(
            f"config: {default['model_type']} has no setting {', '.join(unknown)}; it has {', '.join(sorted(default))}."
        )
    wanted = {name: value for name, value in given.items() if name not in (*unknown, *_NOT_ARCHITECTURE)}
    made = _plain(_config_of(wanted))
    return {name: None if name in _FIXED_SIZES else made[name] for name in default if name in made}


def build_model(settings: dict[str, Any], num_classes: int, pretrained: str | None) -> Any:  # noqa: ANN401
    """The object detector of these settings, float32, in training mode.

    Args:
        settings: as ``resolve_config`` returns them.
        num_classes: K.
        pretrained: folder or hub id of weights; tensors of another shape, such as class heads, stay new.

    Raises:
        ValueError: the parts do not fit together, or there are no such weights.
    """
    auto = import_transformers().AutoModelForObjectDetection
    config = _config_of(settings, num_labels=num_classes)
    try:
        if pretrained is None:
            model = auto.from_config(config)
        else:
            model = auto.from_pretrained(pretrained, config=config, ignore_mismatched_sizes=True)
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        what = "config" if pretrained is None else f"pretrained: {pretrained!r}"
        raise ValueError(
            f"{what}: no {settings['model_type']} could be built ({_first_line(error)}). Sizes such as those of "
            "backbone_config and encoder_in_channels must agree, and weights must be of the same architecture."
        ) from error
    return model.float().train()


def backbone_names(model: nn.Module) -> tuple[str, str]:
    """Dotted names, within a model, of its backbone and of the feature network in it.

    A model without backbone (YOLOS is one transformer) gives everything but its heads for both.
    """
    named = [name for name, _ in model.named_modules() if name.split(".")[-1] == "backbone"]
    if not named:
        base = str(getattr(model, "base_model_prefix", ""))
        return base, base
    backbone = body = min(named, key=len)
    while inner := [part for part in ("conv_encoder", "model", "_backbone") if part in _children(model, body)]:
        body = f"{body}.{inner[0]}"
    return backbone, body


def sides_multiple(settings: dict[str, Any]) -> int:
    """Pixels that image sides must be multiples of: the coarsest stride of a pyramid that is added up, or a patch."""
    strides = settings.get("feat_strides") or settings.get("patch_size") or 1
    return max(strides) if isinstance(strides, list) else int(strides)


def boxes_are_of(model: nn.Module, boxes_of: BoxesOf) -> Literal["valid", "canvas"]:
    """What a model's boxes are fractions of, where the user leaves it open.

    Raises:
        ValueError: boxes of the valid image are asked of a model that takes no mask.
    """
    config: Any = model.config
    takes_mask = "pixel_mask" in signature(model.forward).parameters
    if boxes_of == "valid" and not takes_mask:
        raise ValueError(
            f"boxes_of: {config.model_type} takes no mask of padding, so its boxes are of the canvas; choose auto."
        )
    if boxes_of == "auto":
        return "valid" if takes_mask and not config.model_type.startswith(_BLIND_TO_PADDING) else "canvas"
    return boxes_of


def import_transformers() -> Any:  # noqa: ANN401
    """The library, which is optional.

    Raises:
        ImportError: it is missing, with what to do.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "detectors of transformers need it installed: pip install simdetr[transformers]", name="transformers"
        ) from error
    return transformers


def _default_settings(model_type: str | None) -> dict[str, Any]:
    """Every setting of a family of detectors, with its default."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as FAMILIES

    if model_type not in FAMILIES:
        raise ValueError(
            f"config: model_type must be one of {', '.join(FAMILIES)}, which transformers can detect objects with; "
            f"got {model_type!r}."
        )
    plain = _plain(_config_of({"model_type": model_type}))
    return {name: value for name, value in plain.items() if name not in _NOT_ARCHITECTURE}


def _config_of(settings: dict[str, Any], **more: Any) -> Any:  # noqa: ANN401
    """Transformers' config of settings; it never asks for weights of the backbone."""
    transformers = import_transformers()
    arguments = {name: value for name, value in settings.items() if name != "model_type"}
    try:
        config = transformers.AutoConfig.for_model(settings["model_type"], **arguments, **more)
    except Exception as error:  # checks of transformers raise their own types
        raise ValueError(f"config: {settings['model_type']} refuses its settings ({error}).") from error
    parts: list[Any] = [config, getattr(config, "backbone_config", None)]
    for part in parts:
        if getattr(part, "use_pretrained_backbone", False):
            part.use_pretrained_backbone = False
    return config


def _plain(config: Any) -> dict[str, Any]:  # noqa: ANN401
    """All settings of a config as JSON types."""
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    if isinstance(backbone := plain.get("backbone_config"), dict):
        plain["backbone_config"] = {name: value for name, value in backbone.items() if name not in _NOT_ARCHITECTURE}
    return plain


def _children(model: nn.Module, name: str) -> set[str]:
    return {child for child, _ in model.get_submodule(name).named_children()}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
