from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import yaml

from simdetr.data.label_files import write_labels
from simdetr.exchange.weights import CONFIG_NAME, WEIGHTS_NAME
from simdetr.training.run_folder import (
    CHECKPOINTS,
    OF_A_TRAINING,
    OF_MINED_LABELS,
    RESUME,
    RunFolder,
    RunInUseError,
    RunMismatchError,
)

CONFIG = {"clustering": {"num_classes": 4, "seed": 0}, "data": {"images": "a", "short_sides": [1, 2]}, "model": {}}


def changed(**sections):
    return yaml.safe_dump({name: {**CONFIG[name], **sections.get(name, {})} for name in CONFIG})


def test_paths_are_those_of_the_design(tmp_path):
    run = RunFolder(tmp_path)
    assert run.labels(0) == tmp_path / "stage0" / "labels.parquet"
    assert run.detector(2) == tmp_path / "stage2" / "detector"
    assert run.report == tmp_path / "report" / "index.html"


def test_the_same_settings_claim_a_folder_again(tmp_path):
    run = RunFolder(tmp_path / "new")
    run.claim(changed())
    before = run.config.stat().st_mtime_ns
    run.claim(changed())
    assert run.config.stat().st_mtime_ns == before


def test_other_settings_are_refused_and_named(tmp_path):
    run = RunFolder(tmp_path)
    run.claim(changed())
    with pytest.raises(RunMismatchError) as caught:
        run.claim(changed(clustering={"num_classes": 8}, data={"mosaic": 0.5}))
    message = str(caught.value)
    assert "clustering.num_classes is 4 there, 8 asked" in message
    assert "data.mosaic is 'not set' there, 0.5 asked" in message
    assert "seed" not in message
    assert "choose another out" in message
    assert yaml.safe_load(run.config.read_text()) == yaml.safe_load(changed())


def test_the_same_place_under_another_name_is_no_other_setting(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "others").mkdir()
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.claim(f"data:\n  images: {tmp_path / 'photos'}\n  kind: photos\n")
    monkeypatch.chdir(tmp_path)
    run.claim("data:\n  images: photos\n  kind: photos\n")
    for images, kind in (("others", "photos"), ("gone", "photos"), ("photos", "0")):
        with pytest.raises(RunMismatchError):
            run.claim(f"data:\n  images: {images}\n  kind: {kind}\n")


def test_options_that_came_after_a_run_began_do_not_keep_it_from_going_on(tmp_path):
    run = RunFolder(tmp_path)
    run.claim(changed(model={"lr": 0.1}))
    run.claim(changed(model={"lr": 0.1, "new_lr": None}))
    with pytest.raises(RunMismatchError, match=r"model\.new_lr is 'not set' there, 0\.5 asked"):
        run.claim(changed(model={"lr": 0.1, "new_lr": 0.5}))


def test_settings_of_work_to_come_may_change(tmp_path):
    run = RunFolder(tmp_path)
    run.claim(changed())
    run.claim(changed(model={"lr": 0.5}), ("clustering", "data.images"))
    assert yaml.safe_load(run.config.read_text())["model"] == {"lr": 0.5}
    with pytest.raises(RunMismatchError, match=r"data\.images is 'a' there, 'b' asked"):
        run.claim(changed(data={"images": "b"}), ("clustering", "data.images"))
    run.claim(changed(clustering={"num_classes": 8}), ())


def test_half_written_detectors_do_not_count(tmp_path):
    run = RunFolder(tmp_path)
    run.detector(1).mkdir(parents=True)
    (run.detector(1) / WEIGHTS_NAME).touch()
    assert not run.has_detector(1)
    (run.detector(1) / CONFIG_NAME).touch()
    assert run.has_detector(1)
    assert run.stages() == [1]


def test_only_steps_that_end_are_recorded(tmp_path):
    run = RunFolder(tmp_path)
    with run.step("mine", "proposals") as step:
        step.count = 12
    with pytest.raises(RuntimeError, match="broken"), run.step("cluster", "classes"):
        raise RuntimeError("broken")
    rows = [json.loads(line) for line in run.steps.read_text().splitlines()]
    assert [(row["name"], row["count"], row["what"]) for row in rows] == [("mine", 12, "proposals")]


def settings(**changes):
    trainer = {"devices": 8, "accumulate_grad_batches": 1, "num_nodes": 1, "max_steps": 90}
    data = {"batch_size": 2, "num_workers": 0, "images": "a"}
    whole = {"data": data, "trainer": trainer, "self_training": {"stages": 2, "iou_threshold": 0.55}}
    for name, value in changes.items():
        section, _, setting = name.partition("__")
        whole[section][setting] = value
    return yaml.safe_dump(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__num_workers": 4},
        {"self_training__stages": 3},
        {"trainer__devices": 4},  # steps of another size, which the data module warns of
        {"trainer__devices": [0, 1, 2, 3], "data__batch_size": 4},
        {"trainer__devices": 4, "trainer__accumulate_grad_batches": 2},
        {"trainer__devices": "auto"},
        {"trainer__strategy": "ddp", "trainer__logger": False},
    ],
)
def test_what_does_not_change_the_result_may_change(tmp_path, changes):
    run = RunFolder(tmp_path)
    run.claim(settings())
    run.claim(settings(**changes))
    assert run.config.read_text() == settings(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__batch_size": 4}, "data.batch_size is 2 there, 4 asked"),
        ({"trainer__devices": "auto", "data__batch_size": 4}, "data.batch_size is 2 there, 4 asked"),
        ({"trainer__devices": 4, "data__batch_size": 8}, "data.batch_size is 2 there, 8 asked"),
        ({"trainer__max_steps": 100}, "trainer.max_steps is 90 there, 100 asked"),
        ({"self_training__iou_threshold": 0.5}, "self_training.iou_threshold is 0.55 there"),
    ],
)
def test_what_changes_the_result_may_not(tmp_path, changes, named):
    run = RunFolder(tmp_path)
    run.claim(settings())
    with pytest.raises(RunMismatchError, match=named):
        run.claim(settings(**changes))


def test_a_file_is_made_once(tmp_path):
    made = []
    for _ in range(2):
        RunFolder(tmp_path).made_once(tmp_path / "a", lambda: (made.append(1), (tmp_path / "a").touch()))
    assert made == [1]


def test_other_ranks_wait_for_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("simdetr.training.run_folder.leads", lambda: False)
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            (tmp_path / "a").touch()

    monkeypatch.setattr("time.sleep", sleep)
    make = lambda: pytest.fail("only the first rank makes files")  # noqa: E731
    RunFolder(tmp_path).made_once(tmp_path / "a", make, poll_s=0.5)
    assert naps == [0.5] * 3


def test_a_second_command_on_a_run_is_refused_and_takes_nothing_away(tmp_path, monkeypatch):
    monkeypatch.setattr("simdetr.training.run_folder.LEAST_WAIT_S", 0.1)
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    with first.led():
        with pytest.raises(RunInUseError, match="another command works on"), second.led():
            pytest.fail("both would train")
        assert second.has_leader()
    assert not second.has_leader()
    with second.led():
        assert first.has_leader()


RANK = """
import os, pathlib, sys, time
from simdetr.training.run_folder import RunFolder
folder = pathlib.Path(sys.argv[1])

def make():
    (folder / "begun").touch()
    while not (folder / "go on").exists():
        time.sleep(0.05)
    (folder / "labels").touch()

run = RunFolder(folder)
with run.led():
    (folder / f"at-work-{os.environ['RANK']}").touch()
    run.made_once(folder / "labels", make, poll_s=0.05, patience_s=0.5)
print("done")
"""


def appears(path, process):
    while not path.exists() and process.poll() is None:
        time.sleep(0.02)
    return path.exists()


@pytest.mark.parametrize("how", ["dies", "ends"])
def test_the_others_notice_when_the_first_process_is_killed(tmp_path, how):
    def start(rank):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path)],
            env=environment | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first = second = start(0)
    try:
        assert appears(tmp_path / "begun", first)
        second = start(1)
        assert appears(tmp_path / "at-work-1", second)
        if how == "ends":
            (tmp_path / "go on").touch()
            assert second.communicate(timeout=600)[0] == "done\n"
            assert first.wait(timeout=600) == 0
            return
        time.sleep(3)  # longer than its patience
        assert second.poll() is None  # the first one is alive
        first.kill()
        output, message = second.communicate(timeout=600)
        assert (second.returncode, output) == (1, "")
        assert "LeaderLostError" in message
        assert "has died or was never there" in message
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_what_may_change_depends_on_what_is_left_to_train(tmp_path, make_labels):
    run = RunFolder(tmp_path)
    assert run.settled(1) == ((), ())
    run.stage(0).mkdir()
    write_labels(make_labels({"a": [(0, 0, 9, 9, 0)]}), run.labels(0))
    assert run.settled(1) == (OF_MINED_LABELS, ())
    run.stage(1).mkdir()  # a training that died in its first step
    assert run.settled(1) == (OF_MINED_LABELS, ())

    def leave(folder, *names):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).touch()

    leave(run.stage(1) / CHECKPOINTS, RESUME)
    assert run.settled(1) == (None, ())
    leave(run.detector(1), WEIGHTS_NAME, CONFIG_NAME)
    assert run.settled(1) == (None, ())  # all is done
    assert run.settled(2) == (None, OF_A_TRAINING)
    leave(run.stage(2) / CHECKPOINTS, RESUME)
    assert run.settled(2) == (None, ())


def test_free_settings_may_change_within_settled_ones_and_are_told(tmp_path, caplog):
    run = RunFolder(tmp_path)
    run.claim(changed(data={"batch_size": 8}))
    with caplog.at_level("INFO"):
        run.claim(changed(data={"batch_size": 4}), None, ("data.batch_size",))
    assert "data.batch_size 8 -> 4" in caplog.text
    with pytest.raises(RunMismatchError, match=r"data\.images"):
        run.claim(changed(data={"batch_size": 4, "images": "b"}), None, ("data.batch_size",))


def test_contents_are_kept_until_work_begins_and_checked_from_then_on(tmp_path):
    run = RunFolder(tmp_path)
    run.claim_contents({"data.labels": "x"}, begun=False)
    run.claim_contents({"data.labels": "y"}, begun=False)
    run.claim_contents({"data.labels": "y", "data.val_labels": "z"}, begun=True)
    with pytest.raises(RunMismatchError, match=r"on other labels \(data\.labels changed since\).*another out"):
        run.claim_contents({"data.labels": "x", "data.val_labels": "z"}, begun=True)


def test_a_run_of_before_there_was_a_record_goes_on(tmp_path):
    run = RunFolder(tmp_path)
    run.claim_contents({"data.labels": "x"}, begun=True)
    run.claim_contents({"data.labels": "y"}, begun=True)
    assert not run.contents.exists()  # what it began with is not known, so nothing is kept as if it were
