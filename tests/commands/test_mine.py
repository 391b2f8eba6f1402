"""`simdetr mine`: its preview leaves proposals alone, and neither needs a config."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from simdetr import pipeline
from simdetr.commands.main import main
from simdetr.data.images import open_images
from simdetr.detectors import DeformableDETR
from simdetr.exchange.weights import checkpoint_config, save_detector
from simdetr.mining import FittedEncoder
from simdetr.mining.clustering_config import ClusteringConfig
from simdetr.mining.store import ProposalStore, StoreError
from simdetr.reports import preview_page
from simdetr.reports.rival_recall import mine_rivals
from simdetr.training.run_folder import RunMismatchError
from tests.conftest import TINY_DETECTOR

SMALL = "--mining.image_size 64".split()


def mine(*words):
    main(["mine", *map(str, words), *SMALL])


def refused(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        mine(*words)
    assert caught.value.code == 1
    return " ".join(capsys.readouterr().err.split())


def test_preview_prints_and_writes_and_stores_no_proposals(scenes, tmp_path, capsys):
    run = tmp_path / "run"
    truth = scenes / "instances.json"
    mine("--images", scenes, "--out", run, "--preview", 50, "--truth", truth, "--num-ranks", 2)
    said = capsys.readouterr().out
    for expected in ("12 of 12 mined", "images/s", "2 processes", "AR@1 10 25 100", str(run / "preview/index.html")):
        assert expected in said
    assert [path.name for path in run.iterdir()] == ["preview"]
    record = json.loads((run / "preview" / "preview.json").read_text(encoding="utf-8"))
    assert record["images"]["previewed"] == record["recall"]["images"] == 12
    assert record["settings"]["mining"]["image_size"] == 64
    assert "Recall" in (run / "preview" / "index.html").read_text(encoding="utf-8")


def test_preview_beside_a_mined_run_changes_nothing_of_it(scenes, tiny_config, tmp_path, capsys):
    mine("--images", scenes, "--out", tmp_path)  # without a config
    assert len(ProposalStore(tmp_path / "proposals")) == 12
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "proposals").iterdir()}
    mine("--images", scenes, "--out", tmp_path, "--config", tiny_config, "--preview", 3, "--mining.seed", 7)
    assert "3 of 12 mined" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "proposals").iterdir()} == before


def test_the_record_comes_back_from_python(scenes, tmp_path):
    record = preview_page.preview(scenes, tmp_path, count=2, options=["--mining.image_size=64"])
    assert record == json.loads((tmp_path / "preview" / "preview.json").read_text(encoding="utf-8"))
    assert record["recall"] is None and record["images"]["previewed"] == 2


def test_mistakes_are_one_line(scenes, tmp_path, capsys, monkeypatch):
    words = ["--images", scenes, "--out", tmp_path / "run"]
    assert "preview: expected at least 1 image, got 0" in refused(capsys, *words, "--preview", 0)
    assert "truth: expected --preview" in refused(capsys, *words, "--truth", scenes / "instances.json")
    assert "encoder: expected a folder" in refused(capsys, *words, "--preview", 2, "--encoder", "resnet5")
    assert "num_ranks: expected at least 1" in refused(capsys, *words, "--preview", 2, "--num-ranks", 0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave torchrun or srun out" in refused(capsys, *words, "--preview", 2)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# `simdetr rivals` on a mined run: same encoder and images as ours, stores per method, the table, the report.


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


def test_of_each_image_the_best_boxes_are_kept(run, scenes, tiny_config, tmp_path):
    shutil.copytree(run, tmp_path / "own", ignore=shutil.ignore_patterns("rivals"))
    rows = mine_rivals(scenes, tmp_path / "own", [tiny_config], methods=["random"], max_boxes=30)
    assert [row["boxes_per_image"] for row in rows if row["stage"] == "random boxes"] == [30]
    with pytest.raises(StoreError, match="max_boxes"):
        mine_rivals(scenes, tmp_path / "own", [tiny_config], methods=["random"])


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


# ----------------------------------------------------------------------------------------------------------------------
# `simdetr encoder fit` from the command line: what it prints and writes, and its errors.


CONFIG = Path(__file__).parents[2] / "configs" / "encoder" / "resnet18.yaml"
SMALL_FIT = (
    "--model",
    "test_resnet",
    "--image_size",
    "64",
    "--batch_size",
    "4",
    "--max_steps",
    "1",
    "--num_workers",
    "0",
)
SMALL_FIT += (
    "--precision",
    "32-true",
    "--probe_images",
    "3",
    "--device",
    "cpu",
    "--mining.image_size",
    "64",
)
SMALL_FIT += (
    "--objective_args.hidden_dim",
    "16",
    "--objective_args.output_dim=16",
    "--objective_args.local_dim=8",
)


def fit(*arguments: object) -> None:
    main(["encoder", "fit", *map(str, arguments)])


def test_recipe_shrunk_by_options_fits_probes_and_says_where(scenes, tmp_path, capsys):
    truth = scenes / "instances.json"
    fit("--config", CONFIG, *SMALL_FIT, "--images", scenes, "--out", tmp_path / "e", "--truth", truth)
    printed = capsys.readouterr().out
    assert "AR@25" in printed and "spread" in printed and f"encoder: {tmp_path / 'e'}" in printed
    record = json.loads((tmp_path / "e" / "encoder.json").read_text())
    settings = record["settings"]
    assert (settings["model"], settings["batch_size"], settings["weight_decay"]) == ("test_resnet", 4, 1e-4)
    assert settings["objective_args"]["crop_scale"] == [0.2, 1.0] and settings["objective_args"]["hidden_dim"] == 16
    assert [row["step"] for row in record["probe"]] == [0, 1]
    assert FittedEncoder(tmp_path / "e").record == record


def test_epochs_on_the_command_line_replace_the_steps_of_a_config(scenes, tmp_path):
    (tmp_path / "steps.yaml").write_text("max_steps: 50\nobjective: vicreg\n")
    options = [word for word in SMALL_FIT if "local_dim" not in word]
    steps = options.index("--max_steps")
    del options[steps : steps + 2]
    config = tmp_path / "steps.yaml"
    fit("--config", config, *options, "--epochs", 1, "--images", scenes, "--out", tmp_path / "e")
    assert json.loads((tmp_path / "e" / "encoder.json").read_text())["steps"] == 3


def test_bad_input_is_one_line(scenes, tmp_path, error_of):
    command = ("encoder", "fit", *SMALL_FIT)
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    some = next((scenes / "images").iterdir())
    (tmp_path / "one" / some.name).write_bytes(some.read_bytes())
    out = ("--out", tmp_path / "e")
    assert "holds no images" in error_of(*command, "--images", tmp_path / "empty", *out)
    assert "number of images, got 4 for 1 in" in error_of(*command, "--images", tmp_path / "one", *out)
    assert "did you mean" in error_of(*command, "--model", "resnet19", "--images", scenes, *out)
    assert "batch_size: expected at least 2, got 1" in error_of(*command, "--batch_size", 1, "--images", scenes, *out)
    assert "objective: expected vicreg, dino" in error_of(*command, "--objective", "moco", "--images", scenes, *out)
    assert "does not exist" in error_of(*command, "--images", tmp_path / "nowhere", *out)
    assert not (tmp_path / "e").exists()


def test_missing_lightly_says_what_to_install(scenes, tmp_path, monkeypatch, error_of):
    monkeypatch.setitem(sys.modules, "lightly", None)  # as if it were not installed
    message = error_of("encoder", "fit", *SMALL_FIT, "--images", scenes, "--out", tmp_path / "e")
    assert "pip install 'simdetr[ssl]'" in message


def test_help_shows_types_and_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["encoder", "fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Images per step [64]." in text and "bf16-mixed" in text and "--truth" in text


def test_too_many_unreadable_images_name_the_option(own_scenes, tiny_config, tmp_path, error_of):
    min((own_scenes / "images").iterdir()).write_bytes(b"")
    words = ["mine", "--images", own_scenes, "--out", tmp_path / "run", "--config", tiny_config]
    assert "allow more with --mining.max_unreadable" in error_of(*words)
    main([str(word) for word in [*words, "--mining.max_unreadable", "0.2"]])


def test_clustering_says_how_many_classes_have_boxes(run, tmp_path, monkeypatch, capsys):
    make = pipeline.make_pseudo_labels

    def without_the_last(*arguments, **options):
        labels = make(*arguments, **options)
        return labels.rows(np.flatnonzero(labels.classes < 2))

    monkeypatch.setattr(pipeline, "make_pseudo_labels", without_the_last)
    shutil.copytree(run / "proposals", tmp_path / "proposals")
    main(["cluster", "--run", str(tmp_path), "--num_classes", "3"])
    assert "boxes in 2 of 3 pseudo-classes" in " ".join(capsys.readouterr().out.split())


# ----------------------------------------------------------------------------------------------------------------------
# `simdetr probe`: what an encoder's, or a detector's, frozen features are worth.


def test_probe_looks_at_encoders_and_detectors(scenes, tmp_path, capsys):
    run = tmp_path / "run"
    detector = DeformableDETR(3, **TINY_DETECTOR)
    save_detector(detector, checkpoint_config(detector, None), run / "stage1" / "detector")
    rows = [f"{name},{'ab'[place % 2]}" for place, name in enumerate(open_images(scenes).ids)]
    (tmp_path / "classes.csv").write_text("\n".join(["image,label", *rows]))
    words = ["probe", "--images", str(scenes), "--labels", str(tmp_path / "classes.csv"), "--image_size", "64"]
    seen = {}
    for name, encoder in {
        "colour": ["--encoder.class_path", "simdetr.mining.ColourTextureEncoder"],
        "run": ["--checkpoint", str(run)],
        "stage": ["--encoder", str(run / "stage1" / "detector")],
    }.items():
        main([*words, "--out", str(tmp_path / f"{name}.json"), *encoder])
        said = " ".join(capsys.readouterr().out.split())
        seen[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert f"accuracy {100 * seen[name]['accuracy']:.1f} %" in said and "images to learn" in said
    assert seen["run"] == seen["stage"]  # the last detector of the run
    assert seen["run"]["encoder"].startswith("detector:") and seen["colour"]["encoder"] != seen["run"]["encoder"]


def test_probe_wants_one_of_encoder_and_checkpoint(scenes, tmp_path, error_of):
    run = tmp_path
    expected = "encoder: expected either --encoder or --checkpoint"
    assert expected in error_of("probe", "--images", scenes)
    assert expected in error_of("probe", "--images", scenes, "--encoder", run, "--checkpoint", run)
