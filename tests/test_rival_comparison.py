"""`simdetr rivals` on a mined run: same encoder and images as ours, stores per method, the table, the report."""

from __future__ import annotations

import json

import pytest

from simdetr import pipeline
from simdetr.commands.main import main
from simdetr.mining.pseudo_labels import ClusteringConfig
from simdetr.mining.store import ProposalStore, StoreError
from simdetr.reports.rival_recall import mine_rivals
from simdetr.training.run_folder import RunMismatchError

METHODS = ["lost", "random"]


@pytest.fixture
def run(tmp_path, scenes, tiny_config):
    pipeline.mine_proposals(scenes, tmp_path / "run", [tiny_config])
    return tmp_path / "run"


def test_command_mines_prints_and_the_report_shows(run, scenes, tiny_config, capsys):
    truth = scenes / "instances.json"
    words = f"rivals --images {scenes} --run {run} --config {tiny_config} --truth {truth}".split()
    main([*words, "--methods", json.dumps(METHODS)])
    said = capsys.readouterr().out
    assert all(name in said for name in ("ours", "LOST", "random boxes", "AR@25", "large", "12 images"))
    for method in METHODS:
        store = ProposalStore(run / "rivals" / method)
        assert store.manifest.config["method"] == method
        assert store.manifest.encoder == ProposalStore(run / "proposals").manifest.encoder
        assert len(store) == 12
    pipeline.cluster_proposals(run, ClusteringConfig(num_classes=2))
    page = pipeline.report(run, scenes, truth=truth).read_text(encoding="utf-8")
    part = page[page.index('<section id="rivals">') :]
    assert part.count('class="sample"') == 4
    assert part.count("<figure><img") == 4 * 3


def test_rows_come_back_and_a_second_call_mines_nothing(run, scenes, tiny_config):
    first = mine_rivals(scenes, run, [tiny_config], methods=["random"])
    times = {path: path.stat().st_mtime_ns for path in (run / "rivals").rglob("*.parquet")}
    again = mine_rivals(scenes, run, [tiny_config], methods=["random"])
    assert first == again and [row["stage"] for row in first] == ["ours", "random boxes"]
    assert first[1] == {"stage": "random boxes", "images": 12, "boxes_per_image": 100}
    assert {path: path.stat().st_mtime_ns for path in (run / "rivals").rglob("*.parquet")} == times


def test_a_pretraining_knows_its_own_config(tmp_path, scenes, tiny_config):
    """config.yaml of a run is enough; without it the settings would be the defaults."""
    from simdetr.recipe import Recipe
    from simdetr.training.run_folder import RunFolder

    recipe = Recipe((str(tiny_config),), (f"--data.images={scenes}", "--mining.seed=3"))
    RunFolder(tmp_path).claim(recipe.resolved()[1])
    pipeline.mine_proposals(scenes, tmp_path, [tiny_config], options=["--mining.seed=3"])
    mine_rivals(scenes, tmp_path, methods=["random"])
    settings = ProposalStore(tmp_path / "rivals/random").manifest.config
    assert (settings["image_size"], settings["seed"]) == (64, 3)


def test_other_settings_are_refused_before_any_work(run, scenes, tiny_config):
    with pytest.raises(RunMismatchError, match="image_size is 64 there, 96 asked"):
        mine_rivals(scenes, run, [tiny_config], options=["--mining.image_size=96"])
    with pytest.raises(RunMismatchError, match="encoder is 'colour-texture"):
        mine_rivals(scenes, run, [tiny_config], options=["--encoder.init_args.frequencies=8"])
    with pytest.raises(RunMismatchError, match="images is"):
        mine_rivals(next(scenes.rglob("*.jpg")), run, [tiny_config])
    with pytest.raises(ValueError, match="methods: expected some of"):
        mine_rivals(scenes, run, [tiny_config], methods=["random", "nothing"])
    assert not (run / "rivals").exists()


def test_a_run_without_proposals_is_named(tmp_path, scenes, tiny_config):
    with pytest.raises(StoreError, match="simdetr mine"):
        mine_rivals(scenes, tmp_path, [tiny_config])
