"""Detectors on disk: what comes back, what starts another detector, what is refused; nothing is unpickled."""

from __future__ import annotations

import argparse
import json
from typing import ClassVar

import pytest
import torch

from simdetr.data.annotations import Category
from simdetr.exchange.parameter_names import plain_heads
from simdetr.exchange.weights import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    averaged_state,
    build_detector,
    checkpoint_config,
    load_detector,
    load_weights,
    read_checkpoint,
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


def test_round_trip(saved, equal_states):
    detector, folder = saved
    loaded = load_detector(folder)
    assert equal_states(loaded.detector.state_dict(), detector.state_dict())
    assert loaded.categories == Data.categories
    assert loaded.image_settings == Data.image_settings
    assert not loaded.detector.training


@pytest.mark.parametrize("form", ["folder", "safetensors", "ckpt", "plain"])
def test_every_form_gives_every_tensor(form, saved, make_detector, tmp_path, equal_states):
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
    assert equal_states(other.state_dict(), state)
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


def test_one_head_serves_all_layers_of_a_refining_detector(make_detector, tmp_path, equal_states):
    """safetensors keeps heads that layers share once; a detector with a head per layer wants as many."""
    detector, other = make_detector(3), make_detector(3, with_box_refine=True)
    save_detector(detector, checkpoint_config(detector, Data), tmp_path)
    report = load_weights(other, tmp_path)
    assert report.missing == []
    for head in (*other.class_embed, *other.bbox_embed):
        source = detector.class_embed[0] if isinstance(head, torch.nn.Linear) else detector.bbox_embed[0]
        assert equal_states(head.state_dict(), source.state_dict())


def test_weights_of_something_else_are_refused(make_detector, tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    expected = r"expected 50% of its tensors, but 0 of the \d+ tensors of DeformableDETR are in .*\(conv\.weight\)"
    with pytest.raises(ValueError, match=expected):
        load_weights(make_detector(3), tmp_path / "other.pth")


@pytest.mark.parametrize("class_path", ["os.system", "torch.nn.Linear", "simdetr.training.DetectionTask", "x"])
def test_other_classes_are_never_constructed(class_path):
    with pytest.raises(ValueError, match=r"class_path: expected a Detector of simdetr\.detectors or simdetr\.heads"):
        build_detector({"class_path": class_path, "init_args": {}})


@pytest.mark.parametrize("name", ["torch", "check_sizes", "Missing"])
def test_nor_is_anything_else_that_its_modules_hold(name):
    with pytest.raises(ValueError, match="class_path: expected a Detector"):
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


TWO_STAGE = {"with_box_refine": True, "two_stage": True}


def outputs_of(detector, padded_batch):
    with torch.no_grad():
        found = detector.eval()(*padded_batch)
    return torch.cat([found["pred_logits"], found["pred_boxes"]], dim=2)


@pytest.mark.parametrize("objectness", [False, True])
def test_the_choice_of_queries_survives_other_classes(objectness, make_plain, padded_batch, tmp_path):
    source = make_plain(num_classes=256, objectness=objectness, **TWO_STAGE)
    save_detector(source, checkpoint_config(source, None), tmp_path)
    target = make_plain(num_classes=31, objectness=objectness, **TWO_STAGE)
    report = load_weights(target, tmp_path)
    with torch.no_grad():
        chosen, before = (detector.decode(*padded_batch)[0].start for detector in (target, source))
    assert chosen.shape == (2, 20, 4) and torch.equal(chosen, before)
    assert {name.rsplit(".", 1)[0].removeprefix("transformer.decoder.") for name in report.replaced} == {
        f"class_embed.{layer}" for layer in range(3)
    }
    if objectness:
        with torch.no_grad():
            found, expected = target(*padded_batch), source(*padded_batch)
        for name in ("pred_objectness", "pred_boxes"):
            assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("objectness", [False, True])
def test_our_own_older_files_have_an_encoder_head_of_many_rows(objectness, make_plain, padded_batch, tmp_path):
    source = make_plain(**TWO_STAGE)
    torch.save({"state_dict": {f"detector.{name}": value for name, value in plain_heads(source.state_dict()).items()},
                "simdetr": checkpoint_config(source, None)}, tmp_path / "old.ckpt")  # fmt: skip
    loaded = load_detector(tmp_path / "old.ckpt").detector
    torch.testing.assert_close(outputs_of(loaded, padded_batch), outputs_of(source, padded_batch), rtol=0, atol=0)
    newer = make_plain(objectness=objectness, **TWO_STAGE)
    load_weights(newer, tmp_path / "old.ckpt")
    torch.testing.assert_close(outputs_of(newer, padded_batch), outputs_of(source, padded_batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, TWO_STAGE], ids=["base", "two-stage"])
def test_objectness_joins_weights_that_have_none_and_leaves_again(changes, make_plain, padded_batch, tmp_path):
    """Outputs are equal; the new logit is no object's, and is told to be missing in the file."""
    source = make_plain(**changes)
    save_detector(source, checkpoint_config(source, None), tmp_path / "plain")
    target = make_plain(objectness=True, **changes)
    report = load_weights(target, tmp_path / "plain")
    assert {name.split(".")[0] for name in report.missing} == {"object_embed"} and report.replaced == []
    expected = outputs_of(source, padded_batch)
    torch.testing.assert_close(outputs_of(target, padded_batch), expected, rtol=0, atol=1e-5)
    assert target(*padded_batch)["pred_objectness"].std() < 1e-6
    target = make_plain(objectness=True, **changes)
    save_detector(target, checkpoint_config(target, None), tmp_path / "objects")
    report = load_weights(source, tmp_path / "objects")
    assert report.replaced == report.missing == report.unexpected == []
    torch.testing.assert_close(outputs_of(source, padded_batch), outputs_of(target, padded_batch), rtol=0, atol=1e-5)


def test_objectness_stays_new_beside_new_class_heads(make_detector, tmp_path):
    source = make_detector(3)
    save_detector(source, checkpoint_config(source, Data), tmp_path)
    target = make_detector(5, objectness=True)
    fresh = {name: value.clone() for name, value in target.state_dict().items() if "_embed.0" in name}
    load_weights(target, tmp_path)
    for name in fresh:
        if name.startswith(("object_embed", "class_embed")):
            assert torch.equal(target.state_dict()[name], fresh[name]), name


class Pseudo(Data):
    categories = tuple(Category(number + 1, f"cluster {number:04d}") for number in range(80))


REAL = [f"kind {letter}{number}" for letter in "abcdefgh" for number in range(10)]


@pytest.mark.parametrize("changes", [{}, {**TWO_STAGE, "objectness": True}], ids=["base", "two-stage, objectness"])
def test_pseudo_classes_are_no_classes_though_there_are_as_many(changes, make_detector, tmp_path):
    source, target = make_detector(80, **changes), make_detector(80, **changes)
    fresh = {name: value.clone() for name, value in target.state_dict().items()}
    save_detector(source, checkpoint_config(source, Pseudo), tmp_path)
    report = load_weights(target, tmp_path, REAL)
    heads = {f"class_embed.{layer}.{part}" for layer in range(2) for part in ("weight", "bias")}
    assert {name.removeprefix("transformer.decoder.") for name in report.replaced} == heads
    assert "the file's are 80 (cluster 0000, cluster 0001, cluster 0002, …)" in report.summary()
    assert "the data's 80 (kind a0, kind a1, kind a2, …)" in report.summary()
    for name, value in target.state_dict().items():
        kept = name.removeprefix("transformer.decoder.") not in heads
        assert torch.equal(value, source.state_dict()[name] if kept else fresh[name]), name


@pytest.mark.parametrize("names", [[f"cluster {number:04d}" for number in range(80)], None])
def test_the_same_classes_or_none_told_keep_the_class_head(names, make_detector, tmp_path, equal_states):
    source, target = make_detector(80), make_detector(80)
    save_detector(source, checkpoint_config(source, Pseudo), tmp_path)
    report = load_weights(target, tmp_path, names)
    assert report.replaced == [] and report.reason == ""
    assert equal_states(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("made_up", ["class {}", "LABEL_{}"])
def test_made_up_names_tell_nothing(made_up, make_detector, tmp_path):
    """Imported files whose classes nobody named: their number is all that can be compared."""
    source = make_detector(3)
    config = checkpoint_config(source, None)
    for categories in ([], [{"id": number, "name": made_up.format(number)} for number in range(3)]):
        save_detector(source, {**config, "categories": categories}, tmp_path)
        assert load_weights(make_detector(3), tmp_path, ["cat", "dog", "cow"]).replaced == []


def test_classes_are_met_by_name(saved, make_detector):
    """In another order, and beside new ones, the heads of cat, dog and cow stay those of cat, dog and cow."""
    source, folder = saved
    assert load_weights(make_detector(3), folder, ["cat", "dog", "cow"]).reason == ""
    target = make_detector(4)
    fresh = {name: value.clone() for name, value in target.state_dict().items()}
    report = load_weights(target, folder, ["dog", "horse", "cat", "sheep"])
    assert report.replaced == [] and "the rows of the 2 classes that both know are kept" in report.summary()
    assert "the data's 4 (dog, horse, cat, …)" in report.summary()
    for name, value in target.state_dict().items():
        known = source.state_dict()[name]
        expected = (
            torch.stack([known[1], fresh[name][1], known[0], fresh[name][3]]) if "class_embed." in name else known
        )
        assert torch.equal(value, expected), name
    none = load_weights(make_detector(2), folder, ["horse", "sheep"])
    assert none.replaced and "rows of" not in none.summary()


def test_queries_that_are_fewer_or_more_are_told(make_detector, tmp_path):
    source = make_detector(3, num_queries=8)
    save_detector(source, checkpoint_config(source, Data), tmp_path)
    for count in (5, 12):
        target = make_detector(3, num_queries=count)
        fresh = target.query_embed.weight.clone()
        report = load_weights(target, tmp_path)
        assert (
            report.replaced == [] and f"query_embed.weight is [{count}, 32] here, [8, 32] in the file" in report.reason
        )
        common = min(count, 8)
        assert torch.equal(target.query_embed.weight[:common], source.query_embed.weight[:common])
        assert torch.equal(target.query_embed.weight[common:], fresh[common:])


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
