"""Settings come from YAML and options, and bad ones are named."""

from __future__ import annotations

import pytest

from simdetr.encoder_training.fit import EncoderFitConfig, read_settings


def test_options_go_over_files_and_later_files_over_earlier_ones(tmp_path):
    (tmp_path / "a.yaml").write_text("objective: dino\nobjective_args: {hidden_dim: 8, output_dim: 4}\nbatch_size: 8\n")
    (tmp_path / "b.yaml").write_text("batch_size: 16\nmining: {image_size: 224}\n")
    options = ("--batch_size=32", "--objective_args.output_dim=6", "--views.cj_strength=0.25")
    read = read_settings([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")], options)
    assert (read.objective, read.batch_size, read.mining.image_size) == ("dino", 32, 224)
    assert read.objective_args == {"hidden_dim": 8, "output_dim": 6}
    assert read.views == {"cj_strength": 0.25}
    assert read_settings() == EncoderFitConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batchsize=8"], "config: .*batchsize"),
        (["--lr=fast"], r"config: (.|\n)*lr(.|\n)*fast"),
        (["--batch_size=1"], "batch_size: expected at least 2, got 1; the losses compare"),
        (["--image_size=100"], "image_size: expected a multiple of 32, got 100; try 96"),
        (["--image_size=0"], "image_size: expected at least 32, got 0"),
        (["--max_steps=0"], "max_steps: expected at least 1, got 0"),
        (["--warmup=1"], "warmup, lr: expected 0 <= warmup < 1 and lr > 0, got 1.0"),
        (["--precision=fp8"], "precision"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        read_settings([], options)


def test_what_changes_no_weight_is_free():
    first = EncoderFitConfig(num_workers=0, probe_every_steps=3)
    assert first.settled() == EncoderFitConfig().settled()
    assert first.settled() != EncoderFitConfig(lr=1.0).settled()
