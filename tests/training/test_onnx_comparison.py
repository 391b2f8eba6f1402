from __future__ import annotations

import dataclasses

import pytest
import torch

from simdetr.exchange.onnx import agreement, compare, compare_with_file, example_batch

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
