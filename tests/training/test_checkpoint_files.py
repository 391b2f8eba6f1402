"""What is read, what is refused, and that nothing is unpickled."""

from __future__ import annotations

import argparse

import pytest
import torch

from simdetr.exchange.weights import WEIGHTS_NAME, averaged_state, checkpoint_config, read_checkpoint, save_detector


@pytest.fixture
def saved(make_detector, tmp_path):
    detector = make_detector(3)
    save_detector(detector, checkpoint_config(detector, None), tmp_path / "detector")
    return detector, tmp_path / "detector"


def test_damaged_files_give_one_clear_error(saved, tmp_path):
    _, folder = saved
    whole = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(whole[: len(whole) // 2])
    checkpoint = tmp_path / "half.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:900])
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.ckpt")
    for path in (folder, checkpoint, tmp_path / "empty.ckpt", tmp_path / "text.ckpt", tmp_path / "list.ckpt"):
        with pytest.raises(ValueError, match=r"weights: .* cannot be read as a detector .*damaged"):
            read_checkpoint(path)


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("owned").touch, ())

    torch.save({"state_dict": {"a": Evil()}}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="cannot be read as a detector"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "owned").exists()


def test_a_missing_file_names_the_accepted_forms(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with model\.safetensors"):
        read_checkpoint(tmp_path / "nothing")


def test_prefixes_of_other_trainers_go(saved, tmp_path):
    state = saved[0].state_dict()
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "ddp.pth")
    assert read_checkpoint(tmp_path / "ddp.pth").tensors.keys() == state.keys()
    lightning = {f"detector.{name}": value for name, value in state.items()} | {"criterion.x": torch.zeros(1)}
    assert averaged_state({"state_dict": lightning}).keys() == state.keys()


def test_the_originals_options_are_read_and_nothing_else_of_them(saved, tmp_path):
    options = argparse.Namespace(nheads=2, num_queries=8, dilation=True, lr=0.1, output_dir="x")
    torch.save({"model": saved[0].state_dict(), "args": options}, tmp_path / "model.pth")
    assert read_checkpoint(tmp_path / "model.pth").known == {"num_heads": 2, "num_queries": 8, "dilation": True}


def test_config_of_a_file(saved, tmp_path):
    detector, folder = saved
    for path in (folder, folder / WEIGHTS_NAME):
        config = read_checkpoint(path).config({"dropout": 0.0})
        assert config["init_args"] == {**detector.init_args, "dropout": 0.0}
    torch.save(detector.state_dict(), tmp_path / "bare.pth")
    assert read_checkpoint(tmp_path / "bare.pth").config() is None


def test_names_of_tensors_that_nothing_was_made_of(saved, tmp_path):
    torch.save({"a": torch.arange(6.0), "b": torch.zeros(2)}, tmp_path / "some.pth")
    checkpoint = read_checkpoint(tmp_path / "some.pth")
    assert checkpoint.names_without({"part": checkpoint.tensors["a"].chunk(3)[2]}) == ["b"]


def test_what_is_no_checkpoint_is_refused_in_our_words(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"cannot be read as a detector \(it holds more than tensors\)"):
        read_checkpoint(tmp_path / "module.pth")
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileNotFoundError, match="photos, which holds no checkpoint"):
        read_checkpoint(tmp_path / "photos")
