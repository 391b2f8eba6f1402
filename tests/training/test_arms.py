"""Arms by name: what each starts from, which cannot be had, and in which words that is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from simdetr.exchange.weights import checkpoint_config, save_detector
from simdetr.training.arms import (
    VARIANTS,
    ArmError,
    baseline_of,
    default_arms,
    detreg_arguments,
    read_arms,
    subject_of,
)

OUT = Path("out")


@pytest.fixture
def trained(tmp_path, make_detector):
    """A run folder of two stages, as far as arms look at it."""
    run = tmp_path / "run"
    for stage in (1, 2):
        detector = make_detector()
        save_detector(detector, checkpoint_config(detector, None), run / f"stage{stage}" / "detector")
    (run / "proposals").mkdir()
    (run / "config.yaml").write_text("data: {images: photos}\n")
    (run / "steps.jsonl").write_text("")
    return run


def test_every_arm_says_what_it_starts_from(trained):
    stage1 = trained / "stage1" / "detector"
    words = ("random", "backbone", "stage1", "stage2", "pretrained", f"checkpoint={stage1}", "class-unaware", "detreg")
    arms = {arm.name: arm for arm in read_arms(words, trained, OUT, with_weights=True)}
    assert [*arms] == ["random", "backbone", "stage1", "stage2", "pretrained", "checkpoint", "class-unaware", "detreg"]
    assert arms["random"].detector is None and arms["backbone"].detector is None
    assert arms["stage1"].detector == arms["checkpoint"].detector == stage1
    assert arms["pretrained"].detector == arms["stage2"].detector == trained / "stage2" / "detector"
    assert arms["checkpoint"].run == trained  # where it was trained, for what it cost
    assert arms["class-unaware"].variant is VARIANTS["class-unaware"]
    assert arms["detreg"].run == OUT / "pretraining" / "detreg"
    assert all(arm.says for arm in arms.values())


def test_a_place_stands_for_the_pretraining_of_a_variant(trained, tmp_path):
    (arm, _) = read_arms((f"class-unaware={trained}", "random"), tmp_path, OUT, with_weights=False)
    assert arm.variant is None and arm.detector == trained / "stage2" / "detector"


def test_defaults_are_what_a_user_has_today_and_the_last_stage(trained):
    assert default_arms(trained, with_weights=True) == ("backbone", "stage2")
    assert default_arms(trained, with_weights=False) == ("random", "stage2")
    assert default_arms(trained / "stage1" / "detector", with_weights=True) == ("backbone", "pretrained")


def test_the_last_stage_stands_for_the_pretraining_and_the_backbone_for_today(trained):
    arms = read_arms(("stage1", "random", "class-unaware", "stage2", "backbone"), trained, OUT, with_weights=True)
    assert (baseline_of(arms).name, subject_of(arms).name) == ("backbone", "stage2")
    arms = read_arms((f"checkpoint={trained}", "from-scratch"), trained, OUT, with_weights=False)
    assert (baseline_of(arms).name, subject_of(arms).name) == ("checkpoint", "from-scratch")
    arms = read_arms(("backbone", "random"), trained, OUT, with_weights=True)
    assert (baseline_of(arms).name, subject_of(arms).name) == ("backbone", "random")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("random", "backbon"), "got 'backbon'; did you mean backbone?"),
        (("random", "random"), "expected each once, got random more than once"),
        (("random",), "expected at least two to compare, got random"),
        (("random", "backbone"), "started from random weights; take random in place of backbone"),
        (("random", "checkpoint"), "expected checkpoint=FILE"),
        (("random", "stage7"), "has stage1, stage2, got stage7"),
        (("random=there", "stage1"), "random starts from no detector, got there"),
        (("random", "frozen-backbone"), "frozen-backbone keeps the backbone as it is"),
        (("random", "selective-search"), "which has not been run"),
    ],
)
def test_arms_that_cannot_be_had_are_refused_in_words(words, said, trained):
    with pytest.raises(ArmError) as error:
        read_arms(words, trained, OUT, with_weights=False)
    assert said in " ".join(str(error.value).split())


def test_a_variant_needs_a_run_folder(trained):
    with pytest.raises(ArmError, match=r"is no run folder with proposals.*class-unaware=FOLDER"):
        read_arms(("random", "class-unaware"), trained / "stage1" / "detector", OUT, with_weights=True)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_arms(("random", "checkpoint=nowhere"), trained, OUT, with_weights=True)


def test_detreg_takes_the_backbone_and_leaves_what_it_has_of_its_own():
    given = {"backbone": "resnet18", "two_stage": True, "with_box_refine": True, "objectness": True, "hidden_dim": 64}
    settings = yaml.safe_load(yaml.safe_dump({"model": {"detector": {"init_args": given}}}))
    assert detreg_arguments(settings) == {"backbone": "resnet18", "hidden_dim": 64}
