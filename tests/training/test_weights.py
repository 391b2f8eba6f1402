from __future__ import annotations

import json
from typing import ClassVar

import pytest
import torch

from simdetr.data.labels import Category
from simdetr.training.weights import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    build_detector,
    checkpoint_config,
    load_detector,
    load_weights,
    read_state,
    save_detector,
)


class Data:
    categories = (Category("seven", "cat"), Category(9, "dog"), Category(12, "cow"))
    image_settings: ClassVar = {"short_side": 64, "max_side": 80, "mean": [0.5] * 3, "std": [0.2] * 3}


@pytest.fixture
def saved(make_detector, tmp_path):
    detector = make_detector(3)
    save_detector(detector, checkpoint_config(detector, Data), tmp_path / "detector")
    return detector, tmp_path / "detector"


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_round_trip(saved):
    detector, folder = saved
    loaded = load_detector(folder)
    assert states_equal(loaded.detector.state_dict(), detector.state_dict())
    assert loaded.categories == Data.categories
    assert loaded.image_settings == Data.image_settings
    assert not loaded.detector.training


@pytest.mark.parametrize("form", ["folder", "safetensors", "ckpt", "plain"])
def test_every_form_gives_every_tensor(form, saved, make_detector, tmp_path):
    detector, folder = saved
    path = {"folder": folder, "safetensors": folder / WEIGHTS_NAME}.get(form, tmp_path / "weights.ckpt")
    state = detector.state_dict()
    if form == "ckpt":
        lightning = {f"detector.{name}": value for name, value in state.items()} | {"criterion.x": torch.zeros(1)}
        torch.save({"state_dict": lightning, "simdetr": checkpoint_config(detector, Data)}, path)
        assert load_detector(path).categories == Data.categories
    if form == "plain":
        torch.save(state, path)
    other = make_detector(3)
    report = load_weights(other, path)
    assert states_equal(other.state_dict(), state)
    assert (report.replaced, report.missing, report.unexpected) == ([], [], [])


@pytest.mark.parametrize("refine", [False, True], ids=["shared heads", "own heads"])
def test_other_classes_replace_the_class_heads_only(refine, make_detector, tmp_path):
    detector = make_detector(3, with_box_refine=refine)
    save_detector(detector, checkpoint_config(detector, Data), tmp_path)
    other = make_detector(5, with_box_refine=refine)
    fresh = {name: value.clone() for name, value in other.state_dict().items()}
    report = load_weights(other, tmp_path)
    assert report.replaced
    assert all(name.startswith("class_embed.") for name in report.replaced)
    assert {name.rsplit(".", 1)[1] for name in report.replaced} == {"weight", "bias"}
    assert (report.missing, report.unexpected) == ([], [])
    for name, value in other.state_dict().items():
        expected = fresh[name] if name.startswith("class_embed.") else detector.state_dict()[name]
        assert torch.equal(value, expected), name


def test_missing_and_unexpected_tensors_are_named(saved, make_detector, tmp_path):
    detector, _ = saved
    state = {name: value for name, value in detector.state_dict().items() if not name.startswith("bbox_embed.")}
    torch.save(state | {"extra": torch.zeros(2)}, tmp_path / "weights.pth")
    report = load_weights(make_detector(3), tmp_path / "weights.pth")
    assert report.unexpected == ["extra"]
    assert report.missing
    assert all("bbox_embed." in name for name in report.missing)


def test_official_names_are_understood(saved, make_detector, tmp_path):
    from simdetr.detectors.state_dict_names import to_official

    detector, _ = saved
    official = to_official(detector.state_dict())
    assert any(name.startswith("backbone.0.") for name in official)
    torch.save({"model": official, "epoch": 49}, tmp_path / "r50.pth")
    other = make_detector(3)
    report = load_weights(other, tmp_path / "r50.pth")
    assert states_equal(other.state_dict(), detector.state_dict())
    assert report.missing == []


def test_weights_of_something_else_are_refused(make_detector, tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"no tensor of .* fits DeformableDETR; it holds 1 tensors such as 'conv"):
        load_weights(make_detector(3), tmp_path / "other.pth")


@pytest.mark.parametrize("class_path", ["os.system", "torch.nn.Linear", "simdetr.training.DetectionTask", "x"])
def test_other_classes_are_never_constructed(class_path):
    with pytest.raises(ValueError, match=r"class_path: expected a class of simdetr\.detectors"):
        build_detector({"class_path": class_path, "init_args": {}})


@pytest.mark.parametrize("name", ["torch", "_check_sizes", "Missing"])
def test_nor_is_anything_else_that_its_modules_hold(name):
    with pytest.raises(ValueError, match="class_path: expected a class"):
        build_detector({"class_path": f"simdetr.detectors.deformable_detr.{name}", "init_args": {}})


def test_arguments_of_another_version_are_named(saved):
    _, folder = saved
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["init_args"]["flux"] = 3
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"init_args: DeformableDETR does not take.*flux"):
        load_detector(folder)


def test_a_file_without_config_cannot_be_rebuilt(saved):
    _, folder = saved
    (folder / CONFIG_NAME).unlink()
    with pytest.raises(ValueError, match=r"holds weights but no config\.json"):
        load_detector(folder)


def test_a_config_that_does_not_fit_is_refused(saved):
    _, folder = saved
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["init_args"]["num_classes"] = 7
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit its own config"):
        load_detector(folder)


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
            read_state(path)


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("owned").touch, ())

    torch.save({"state_dict": {"a": Evil()}}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="cannot be read as a detector"):
        read_state(tmp_path / "evil.ckpt")
    assert not (tmp_path / "owned").exists()


def test_a_missing_file_names_the_accepted_forms(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with model\.safetensors"):
        read_state(tmp_path / "nothing")
