from __future__ import annotations

import json

import pytest
import yaml

from simdetr.training.run_folder import RunFolder, RunMismatchError, made_once
from simdetr.training.weights import CONFIG_NAME, WEIGHTS_NAME

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
    assert rows[0]["seconds"] >= 0


def test_a_file_is_made_once(tmp_path):
    made = []
    for _ in range(2):
        made_once(tmp_path / "a", lambda: (made.append(1), (tmp_path / "a").touch()))
    assert made == [1]


def test_other_ranks_wait_for_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("simdetr.training.run_folder.leads", lambda: False)
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            (tmp_path / "a").touch()

    monkeypatch.setattr("time.sleep", sleep)
    made_once(tmp_path / "a", lambda: pytest.fail("only the first rank makes files"), poll_s=0.5)
    assert naps == [0.5] * 3
