"""What runs may be told."""

from __future__ import annotations

import pytest

from simdetr.app.refusals import FieldRefusal
from simdetr.app.run_parameters import AutolabelParameters, OrderParameters, checked
from simdetr.app.tables import RunKind
from simdetr.labelling.autolabel import AutolabelSettings
from simdetr.labelling.image_selection import STRATEGIES


@pytest.mark.parametrize("kind", list(RunKind))
def test_everything_has_a_default(kind):
    checked(kind, {})


@pytest.mark.parametrize(
    ("kind", "given", "place"),
    [
        (RunKind.TRAIN, {"max_steps": 0}, "max_steps"),
        (RunKind.TRAIN, {"epochs": 3}, "epochs"),
        (RunKind.TRAIN, {"init": "../detector"}, "init"),
        (RunKind.DETECT, {"min_score": 2}, "min_score"),
        (RunKind.ORDER, {"strategy": "alphabet"}, "strategy"),
        (RunKind.ORDER, {"encoder": "a;b"}, "encoder"),
    ],
)
def test_what_cannot_be_is_named_by_its_place(kind, given, place):
    with pytest.raises(FieldRefusal) as error:
        checked(kind, given)
    assert error.value.place[:3] == ("body", "parameters", place)


@pytest.mark.parametrize(
    "option",
    [
        "--trainer.default_root_dir=/tmp",
        "--model.init_weights=a.pth",
        "--data.images=/etc",
        "--model.lr=1e-4\n--trainer.callbacks=[x]",
        "--trainer.callbacks=[{}]",
        "--config=a.yaml",
        "--data.short_sides=/etc/passwd",
    ],
)
def test_options_name_no_code_and_no_files(option):
    with pytest.raises(FieldRefusal):
        checked(RunKind.TRAIN, {"options": [option]})
    checked(
        RunKind.TRAIN, {"options": ["--model.lr=1e-4", "--data.short_sides=[48, 64]", "--trainer.precision=bf16-mixed"]}
    )


def test_the_choices_are_those_of_the_engine():
    assert set(AutolabelSettings.__dataclass_fields__) <= set(AutolabelParameters.model_fields)
    defaults = AutolabelSettings()
    for name in AutolabelSettings.__dataclass_fields__:
        assert AutolabelParameters.model_fields[name].default == getattr(defaults, name), name
    for name in STRATEGIES:
        OrderParameters(strategy=name)
