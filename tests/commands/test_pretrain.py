from __future__ import annotations

import pytest

from simdetr.commands.main import main
from simdetr.training.run_folder import RunFolder


def test_pretrain_ends_with_what_to_do_next(run, scenes, tiny_config, capsys):
    main(["pretrain", "--images", str(scenes), "--out", str(run), "--config", str(tiny_config)])  # finished long ago
    folder = RunFolder(run)
    said = capsys.readouterr().out
    assert f"detector: {folder.detector(1)}; fine-tune it with simdetr finetune --init {run}" in said
    assert f"report: {folder.report}" in said


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("pretrain", ["--encoder", "Folder of ``simdetr encoder fit``", "--num_ranks", "--proposals"]),
        ("finetune", ["--init", "Run folder, detector folder or checkpoint to start from", "--auto_batch"]),
        ("evaluate", ["--precision {fp32,bf16}", "Images per forward pass"]),
        ("compare", ["--fractions", "Parts of the labelled images to train on"]),
    ],
)
def test_help_has_the_options_of_the_function_that_gets_them(command, options, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(words in said for words in options)
