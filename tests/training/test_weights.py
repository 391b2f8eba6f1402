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


def test_one_line_tells_what_happened(saved, make_detector, tmp_path, caplog):
    detector, _ = saved
    state = {name: value for name, value in detector.state_dict().items() if not name.startswith("query_embed")}
    torch.save(state | {f"extra{number}": torch.zeros(2) for number in range(5)}, tmp_path / "weights.pth")
    report = load_weights(make_detector(4), tmp_path / "weights.pth")
    kept = len(state) - len(report.replaced)
    assert report.summary() == (
        f"{tmp_path / 'weights.pth'} (simdetr): {kept} tensors kept, 4 replaced (class_embed.0.weight, "
        "class_embed.0.bias, class_embed.1.weight, …), 1 missing (query_embed.weight), "
        "5 unexpected (extra0, extra1, extra2, …)"
    )
    with caplog.at_level("INFO"):
        report.log()
    assert caplog.messages == [report.summary()]


def test_a_backbone_alone_is_sent_elsewhere(make_detector, tmp_path):
    detector = make_detector(3)
    torch.save(detector.backbone.state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match=r"--model\.backbone_weights"):
        load_weights(detector, tmp_path / "backbone.pth")


def test_one_head_serves_all_layers_of_a_refining_detector(make_detector, tmp_path):
    """safetensors keeps heads that layers share once; a detector with a head per layer wants as many."""
    detector, other = make_detector(3), make_detector(3, with_box_refine=True)
    save_detector(detector, checkpoint_config(detector, Data), tmp_path)
    report = load_weights(other, tmp_path)
    assert report.missing == []
    for head in (*other.class_embed, *other.bbox_embed):
        source = detector.class_embed[0] if isinstance(head, torch.nn.Linear) else detector.bbox_embed[0]
        assert states_equal(head.state_dict(), source.state_dict())


def test_weights_of_something_else_are_refused(make_detector, tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    expected = r"expected 50% of its tensors, but 0 of the \d+ tensors of DeformableDETR are in .*\(conv\.weight\)"
    with pytest.raises(ValueError, match=expected):
        load_weights(make_detector(3), tmp_path / "other.pth")


@pytest.mark.parametrize("class_path", ["os.system", "torch.nn.Linear", "simdetr.training.DetectionTask", "x"])
def test_other_classes_are_never_constructed(class_path):
    with pytest.raises(ValueError, match=r"class_path: expected a detector of simdetr\.detectors or simdetr\.heads"):
        build_detector({"class_path": class_path, "init_args": {}})


@pytest.mark.parametrize("name", ["torch", "_check_sizes", "Missing"])
def test_nor_is_anything_else_that_its_modules_hold(name):
    with pytest.raises(ValueError, match="class_path: expected a detector"):
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
    with pytest.raises(ValueError, match=r"holds weights but no config\.json.*--init of `simdetr finetune`"):
        load_detector(folder)


def test_a_config_that_does_not_fit_is_refused(saved):
    _, folder = saved
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["init_args"]["num_classes"] = 7
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit its own config"):
        load_detector(folder)
