"""Exported graphs, run by onnxruntime beside their detectors, with other batches and sizes than they were made with."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from types import SimpleNamespace

import pytest
import torch

from simdetr.data.annotations import Category
from simdetr.detectors import DeformableDETR, TorchvisionDetector, ViDT
from simdetr.detectors.swin_ram import OWN_SIZES
from simdetr.exchange import onnx as onnx_export
from simdetr.exchange.onnx import OnnxExportError, agreement, compare, compare_with_file, example_batch, export_onnx
from simdetr.exchange.weights import checkpoint_config, load_detector, save_detector

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason="the extra onnx is not installed")

DATA = SimpleNamespace(
    categories=(Category(3, "cat"), Category(7, "dog"), Category(9, "emu")),
    image_settings={"short_side": 64, "max_side": 160, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]},
)
SMALL = {
    "num_classes": 3,
    "backbone": "test_resnet",
    "hidden_dim": 16,
    "num_heads": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "ffn_dim": 16,
    "num_queries": 8,
    "num_points": 2,
}


def saved(make, folder, seed=0):
    """A detector with random weights that matter, as a folder."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        detector = make().eval()
        for parameter in detector.parameters():
            if parameter.dim() > 1:
                parameter.normal_().div_(parameter[0].numel() ** 0.5)
    save_detector(detector, checkpoint_config(detector, DATA), folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A single-scale detector, its file, its program, and what the export said."""
    folder = tmp_path_factory.mktemp("onnx")
    programs = []
    with pytest.MonkeyPatch.context() as patch:
        trace = onnx_export._trace
        patch.setattr(
            onnx_export, "_trace", lambda *args, **options: programs.append(trace(*args, **options)) or programs[-1]
        )
        source = saved(lambda: DeformableDETR(**SMALL, num_feature_levels=1), folder / "detector")
        summary = export_onnx(source, folder / "model.onnx", verify=True)
    return SimpleNamespace(source=source, path=folder / "model.onnx", program=programs[0], summary=summary)


def test_summary_has_the_numbers(exported):
    title, *lines = exported.summary.splitlines()
    assert title.startswith(f"DeformableDETR with 3 classes in {exported.path} (")
    assert title.endswith(" MB, opset 18): any number of images, any height and width")
    assert [line.split(":")[0] for line in lines] == ["  1 x 320 x 384 px", "  2 x 384 x 327 px", "  3 x 259 x 355 px"]
    assert all("100.0% of the best detections are the same" in line for line in lines)


def test_graph_is_valid_and_says_what_it_takes(exported):
    import onnx

    model = onnx.load(exported.path)
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "images": ["batch", 3, "height", "width"],
        "mask": ["batch", "height", "width"],
        "logits": ["batch", 8, 3],
        "boxes": ["batch", 8, 4],
    }
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    assert kinds == {"images": onnx.TensorProto.FLOAT, "mask": onnx.TensorProto.BOOL}
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    assert [path.name for path in exported.path.parent.iterdir()] == ["detector", "model.onnx"]


def test_metadata_tell_how_to_use_it(exported):
    import onnxruntime

    found = onnxruntime.InferenceSession(str(exported.path)).get_modelmeta().custom_metadata_map
    assert [row["name"] for row in json.loads(found["categories"])] == ["cat", "dog", "emu"]
    assert json.loads(found["image_settings"]) == DATA.image_settings
    assert found["class_path"] == "simdetr.detectors.deformable_detr.DeformableDETR"
    assert found["simdetr_version"] == importlib.metadata.version("simdetr")


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (4, 97, 211), (2, 480, 160)])
def test_other_batches_and_sizes(exported, batch, height, width):
    """Half of each side is padding, which ends between, at and off the borders of cells."""
    import onnxruntime

    images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    mask[-1, height // 2 :], mask[-1, :, width // 2 :] = True, True
    images = images.masked_fill(mask[:, None], 0.0)
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    logits, boxes = session.run(["logits", "boxes"], {"images": images.numpy(), "mask": mask.numpy()})
    with torch.no_grad():
        wanted = load_detector(exported.source).detector(images, mask)
    torch.testing.assert_close(torch.from_numpy(logits), wanted["pred_logits"], rtol=0, atol=5e-5)
    torch.testing.assert_close(torch.from_numpy(boxes), wanted["pred_boxes"], rtol=0, atol=1e-5)


def test_graph_of_something_else_is_not_written(exported, tmp_path, monkeypatch):
    """The program is that of other weights."""
    other = saved(lambda: DeformableDETR(**SMALL, num_feature_levels=1), tmp_path / "other", seed=1)
    monkeypatch.setattr(onnx_export, "_trace", lambda *args, **options: exported.program)
    with pytest.raises(OnnxExportError, match=r"not find what DeformableDETR finds(.|\n)*3 x 320 x 384 px: logits"):
        export_onnx(other, tmp_path / "out" / "model.onnx", verify=True, image_size=(320, 384))
    assert list((tmp_path / "out").iterdir()) == []


def test_graph_that_serves_one_size_alone(exported, tmp_path, monkeypatch, caplog):
    other = saved(lambda: DeformableDETR(**SMALL, num_feature_levels=1), tmp_path / "other", seed=1)
    asked = []

    def trace(detector, size_hw, opset, *, any_size):
        asked.append((size_hw, any_size))
        return exported.program

    monkeypatch.setattr(onnx_export, "_trace", trace)
    summary = export_onnx(other, tmp_path / "model.onnx")
    assert asked == [((320, 384), True), ((160, 160), False)]
    assert summary.endswith("any number of images, 160 x 160 px, padding included")
    (record,) = caplog.records
    assert "any size: its graph serves one size alone,  2 x 384 x 327 px: logits differ by" in record.getMessage()
    assert record.getMessage().endswith("It is for images padded to 160 x 160 px; image_size gives another size.")


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ModuleNotFoundError, match=r"needs onnxruntime, .*pip install 'simdetr\[onnx\]'"):
        export_onnx(tmp_path, tmp_path / "model.onnx")


def test_image_size_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"image_size: expected a height and a width in pixels, got \(0, 64\)"):
        export_onnx(tmp_path, tmp_path / "model.onnx", image_size=(0, 64))


def test_the_exporter_leaves_logging_and_environment_as_they_were(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "0")
    logging.getLogger("torch.onnx").setLevel(logging.INFO)
    with pytest.raises(ZeroDivisionError), onnx_export._quiet():
        assert onnx_export.os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] == "1"
        assert logging.getLogger("torch.onnx").level == logging.ERROR
        raise ZeroDivisionError
    assert onnx_export.os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] == "0"
    assert logging.getLogger("torch.onnx").level == logging.INFO
    logging.getLogger("torch.onnx").setLevel(logging.NOTSET)


VARIANTS = {
    "refine, dilated": {"with_box_refine": True, "dilation": True, "backbone": "resnet10t", "num_feature_levels": 3},
    "two stage": {"with_box_refine": True, "two_stage": True, "num_queries": 100},
    "learned positions": {"position_encoding": "learned", "num_feature_levels": 1},
    "vision transformer": {"backbone": "test_vit", "num_feature_levels": 3},
    "ConvNeXt": {"backbone": "test_convnext", "num_feature_levels": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_deformable_detr(variant, tmp_path, caplog):
    source = saved(lambda: DeformableDETR(**(SMALL | VARIANTS[variant])), tmp_path / "detector")
    summary = export_onnx(source, tmp_path / "model.onnx", verify=True)
    assert "any height and width" in summary.splitlines()[0] and len(summary.splitlines()) == 4
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.slow
@pytest.mark.parametrize("neck", [True, False])
def test_vidt_has_one_size(neck, tmp_path, caplog, monkeypatch):
    """Of one layer per stage but for one, whose second layer has shifted windows."""
    monkeypatch.setitem(OWN_SIZES, "swin_pico", OWN_SIZES["swin_pico"] | {"depths": (1, 1, 2, 1)})
    small = {"backbone": "swin_pico", "hidden_dim": 32, "num_heads": 2, "num_decoder_layers": 1, "ffn_dim": 32}
    source = saved(lambda: ViDT(3, num_queries=10, neck=neck, **small), tmp_path / "detector")
    summary = export_onnx(source, tmp_path / "model.onnx", verify=True)
    assert [line.split(":")[0] for line in summary.splitlines()[1:]] == [f"  {n} x 160 x 160 px" for n in (1, 2, 3)]
    assert "ViDT cannot be exported to ONNX for images of any size: its backbone attends within windows" in caplog.text


@pytest.mark.slow
def test_rt_detr_of_transformers_has_one_size(make_other, tmp_path):
    source = saved(lambda: make_other("rt_detr_v2"), tmp_path / "detector")
    summary = export_onnx(source, tmp_path / "model.onnx", verify=True, image_size=(96, 128))
    assert "any number of images, 96 x 128 px" in summary and "2 x 96 x 128 px: logits differ by" in summary


def test_a_vit_with_windows_has_one_size(make_other):
    """Seen before the graph is traced: it might serve the other size that is tried, and yet not all."""
    with pytest.raises(OnnxExportError, match="any size: its backbone attends within windows"):
        onnx_export._trace_checked(make_other("rf_detr").eval(), (64, 64), 18)


def test_detectors_that_cannot_be_exported(tmp_path):
    source = saved(lambda: TorchvisionDetector(3, "retinanet_resnet50_fpn", "resnet18"), tmp_path / "detector")
    with pytest.raises(OnnxExportError, match="retinanet_resnet50_fpn of torchvision chooses boxes one by one"):
        export_onnx(source, tmp_path / "model.onnx", image_size=(96, 128))
    assert not (tmp_path / "model.onnx").exists()


# ----------------------------------------------------------------------------------------------------------------------
# The comparison of two outputs, by numbers.


SIZE = (64, 80)


@pytest.fixture
def output():
    """Of two images, with six queries and four classes; the last query is no detection."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 4, generator=generator)
    logits[:, -1] = -torch.inf
    return {"pred_logits": logits, "pred_boxes": torch.rand(2, 6, 4, generator=generator) * 0.2 + 0.3}


def changed(output, name, amount, image=0, query=0):
    copies = {key: value.clone() for key, value in output.items()}
    copies[name][image, query] += amount
    return copies


def test_equal_outputs(output):
    result = compare(output, output, SIZE)
    assert (result.logits, result.boxes, result.agreement, result.reordered) == (0, 0, 1, False)
    assert result.is_equal and (result.batch, result.size_hw) == (2, SIZE)
    assert result.line() == (
        "  2 x 64 x 80 px: logits differ by 0.0e+00 at most, boxes by 0.0e+00; "
        "100.0% of the best detections are the same"
    )


@pytest.mark.parametrize("name", ["pred_logits", "pred_boxes"])
@pytest.mark.parametrize(("amount", "equal"), [(5e-4, True), (2e-3, False)])
def test_differences(output, name, amount, equal):
    result = compare(output, changed(output, name, amount), SIZE)
    measured = {"pred_logits": result.logits, "pred_boxes": result.boxes}
    assert measured[name] == pytest.approx(amount, rel=1e-2)
    assert sum(measured.values()) == measured[name]
    assert result.is_equal == equal


def test_values_that_are_no_numbers_are_never_equal(output):
    assert not compare(output, changed(output, "pred_boxes", torch.nan), SIZE).is_equal
    assert not compare(output, changed(output, "pred_logits", torch.inf), SIZE).is_equal


def test_order_of_queries_does_not_matter(output):
    order = [3, 1, 0, 2, 5, 4]
    result = compare(output, {name: value[:, order] for name, value in output.items()}, SIZE)
    assert result.is_equal and result.reordered and result.agreement == 1
    assert "in another order" in result.line()
    mixed = {"pred_logits": output["pred_logits"][:, order], "pred_boxes": output["pred_boxes"]}
    assert not compare(output, mixed, SIZE).is_equal


def test_agreement_is_the_part_of_equal_detections(output):
    """Two images of 20 pairs of query and class, with a finite score; one query's box moves away."""
    moved = changed(output, "pred_boxes", torch.tensor([0.1, 0.0, 0.0, 0.0]))
    assert agreement(output, moved) == pytest.approx(36 / 40)
    few = {name: value[:, -1:] for name, value in output.items()}
    assert agreement(few, few) == 1.0
    one = {name: value[:1, :1] for name, value in output.items()}
    other = {**one, "pred_logits": torch.full((1, 1, 4), -torch.inf)}
    assert agreement(one, other) == 0.0


@pytest.mark.parametrize(("bar", "equal"), [(1.0, True), (0.995, True), (0.98, False)])
def test_bar_of_agreement(output, bar, equal):
    assert dataclasses.replace(compare(output, output, SIZE), agreement=bar).is_equal == equal


def test_example_batches_are_padded_with_zeros():
    images, mask = example_batch(3, SIZE)
    assert images.shape == (3, 3, 64, 80) and mask.shape == (3, 64, 80)
    assert not mask[0].any()
    valid = [((~mask[i, :, 0]).sum().item(), (~mask[i, 0]).sum().item()) for i in range(3)]
    assert valid == [(64, 80), (54, 67), (43, 54)]
    assert images[mask[:, None].expand_as(images)].abs().sum() == 0
    assert torch.equal(images, example_batch(3, SIZE)[0])


def test_file_that_onnxruntime_cannot_run(make_detector):
    pytest.importorskip("onnxruntime", reason="an optional dependency")
    with pytest.raises(RuntimeError, match=r"onnxruntime cannot run the graph: \S+"):
        compare_with_file(make_detector(), b"no graph", [(1, 64, 80)])
