"""Every format is told from the others by names alone."""

from __future__ import annotations

import pytest
import torch

from simdetr.detectors import DeformableDETR, ViDT
from simdetr.exchange.formats import FORMATS, OWN, recognise
from simdetr.exchange.parameter_names import drop_copies, to_official, to_official_vidt, to_transformers


@pytest.fixture(scope="module")
def state():
    with torch.device("meta"):
        return DeformableDETR(91).state_dict()


def detr(state):
    return {
        name.replace("cross_attn", "multihead_attn"): None
        for name in to_official(state)
        if "sampling_offsets" not in name and "attention_weights" not in name
    }


def vidt(state):
    with torch.device("meta"):
        return to_official_vidt(ViDT(91).state_dict())


FILES = {
    "simdetr": lambda state: state,
    "Deformable DETR": to_official,
    "DETReg": lambda state: {**to_official(state), "feature_embed.layers.0.weight": None},
    "DETR": lambda state: {**detr(state), "transformer.decoder.layers.0.multihead_attn.in_proj_weight": None},
    "UP-DETR": lambda state: {**detr(state), "patch2query.weight": None, "feature_align.layers.0.bias": None},
    "ViDT": vidt,
    "transformers' Deformable DETR": lambda state: to_transformers(drop_copies(state)),
}


@pytest.mark.parametrize("title", FILES)
def test_format_is_recognised(title, state):
    assert recognise(FILES[title](state)).title == title


def test_transformers_names_in_memory_too(state):
    assert recognise(to_transformers(state, "memory")).title == "transformers' Deformable DETR"


def test_every_format_is_tested():
    assert [known.title for known in FORMATS] == list(dict.fromkeys(known.title for known in FORMATS))
    assert {known.title for known in FORMATS} == set(FILES)


def test_everything_else_has_our_names():
    assert recognise(["conv1.weight"]) is recognise([]) is OWN
    assert recognise(["layer1.0.conv1.weight", "fc.bias"]) is OWN
