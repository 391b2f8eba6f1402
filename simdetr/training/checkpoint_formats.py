"""Whose checkpoint it is: names of tensors in, one of the known formats out, which gives our names and the detector.

A format is recognised by names that only it has. What none of them fits is read as simdetr's own names; tensors decide
then what is kept. Source: specs/detectors.md A', B and part 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from simdetr.detectors.detr_names import from_detr
from simdetr.detectors.state_dict_names import from_official, from_transformers
from simdetr.detectors.vidt_names import from_official_vidt
from simdetr.training.architectures import Architecture, deformable_detr_of, vidt_of

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class CheckpointFormat:
    """A way to name the tensors of a detector.

    Attributes:
        title: What a user calls it.
        marks: Every checkpoint of this format has, for each mark, a name that starts with it.
        rename: The file's tensors under our names; the state dict of the detector they are for decides where several
            places are possible.
        architecture: The detector of a state dict in our names, given what is known of its arguments; None where no
            detector of simdetr is the same.
        is_partial: The tensors are of another detector, so that only some of them have a place.
    """

    title: str
    marks: tuple[str, ...]
    rename: Callable[[State, State], dict[str, Tensor]]
    architecture: Callable[[State, Mapping[str, Any]], Architecture] | None = None
    is_partial: bool = False


_RESNET, _DETR_ATTENTION = "backbone.0.body.", "transformer.decoder.layers.0.multihead_attn."
_DEFORMABLE_ATTENTION = "transformer.encoder.layers.0.self_attn.sampling_offsets."


def _official(state: State, own: State) -> dict[str, Tensor]:
    return from_official(state)


def _hugging_face(state: State, own: State) -> dict[str, Tensor]:
    return from_transformers(state)


def _vidt(state: State, own: State) -> dict[str, Tensor]:
    return from_official_vidt(state)


def _as_they_are(state: State, own: State) -> dict[str, Tensor]:
    return dict(state)


OWN = CheckpointFormat("simdetr", (), _as_they_are)
FORMATS = (
    CheckpointFormat("UP-DETR", (_RESNET, _DETR_ATTENTION, "patch2query."), from_detr, is_partial=True),
    CheckpointFormat("DETR", (_RESNET, _DETR_ATTENTION), from_detr, is_partial=True),
    CheckpointFormat(
        "DETReg", (_RESNET, _DEFORMABLE_ATTENTION, "feature_embed."), _official, architecture=deformable_detr_of
    ),
    CheckpointFormat("Deformable DETR", (_RESNET, _DEFORMABLE_ATTENTION), _official, architecture=deformable_detr_of),
    CheckpointFormat("ViDT", ("backbone.det_token", "backbone.patch_embed."), _vidt, architecture=vidt_of),
    CheckpointFormat(
        "transformers' Deformable DETR",
        ("model.backbone.", "model.encoder.layers.0.self_attn.sampling_offsets.", "model.level_embed"),
        _hugging_face,
    ),
    OWN,
)
"""Known formats; the first that fits is taken."""


def recognise(names: Collection[str]) -> CheckpointFormat:
    """The format of a file with these names of tensors."""
    return next(known for known in FORMATS if all(any(name.startswith(mark) for name in names) for mark in known.marks))
