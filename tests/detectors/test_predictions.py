"""Post-processing with crafted logits (specification T19)."""

import pytest
import torch

from simdetr.boxes import normalise
from simdetr.detectors import postprocess


def crafted():
    """One image, two queries, three classes; query 1 scores best with class 2 and third with class 0."""
    logits = torch.tensor([[[-4.0, 1.0, -3.0], [0.5, -5.0, 2.0]]])
    boxes_xyxy = torch.tensor([[10.0, 20.0, 110.0, 60.0], [0.0, 0.0, 200.0, 100.0]])
    return {"pred_logits": logits, "pred_boxes": normalise(boxes_xyxy, (100, 200))[None]}, boxes_xyxy


def test_a_query_can_appear_with_two_labels():
    outputs, boxes_xyxy = crafted()
    found = postprocess(outputs, torch.tensor([[100, 200]]), top_k=3)[0]
    torch.testing.assert_close(found["scores"], torch.tensor([2.0, 1.0, 0.5]).sigmoid())
    assert found["labels"].tolist() == [2, 1, 0]
    torch.testing.assert_close(found["boxes_xyxy"], boxes_xyxy[[1, 0, 1]])


def test_boxes_are_scaled_to_each_image():
    outputs, boxes_xyxy = crafted()
    twice = {name: tensor.expand(2, -1, -1) for name, tensor in outputs.items()}
    small, large = postprocess(twice, [(100, 200), (300, 400)], top_k=1)
    torch.testing.assert_close(small["boxes_xyxy"], boxes_xyxy[1:])
    torch.testing.assert_close(large["boxes_xyxy"], torch.tensor([[0.0, 0.0, 400.0, 300.0]]))


def test_never_more_than_there_are():
    outputs, _ = crafted()
    found = postprocess(outputs, [(100, 200)])[0]
    assert found["scores"].shape == (6,) and found["labels"].shape == (6,) and found["boxes_xyxy"].shape == (6, 4)
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)


def test_results_carry_no_gradient_and_are_float32():
    outputs, _ = crafted()
    outputs = {name: tensor.bfloat16().requires_grad_() for name, tensor in outputs.items()}
    found = postprocess(outputs, [(100, 200)])[0]
    assert not found["scores"].requires_grad and found["boxes_xyxy"].dtype == found["scores"].dtype == torch.float32


def test_wrong_arguments():
    outputs, _ = crafted()
    with pytest.raises(ValueError, match="orig_sizes has 2 rows, but outputs has 1 images"):
        postprocess(outputs, [(1, 1), (2, 2)])
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        postprocess(outputs, [(1, 1)], top_k=0)


def test_points_come_with_their_query_and_with_the_heads_classes():
    outputs, _ = crafted()
    points, own = torch.tensor([[[0.1, 0.2], [0.9, 0.5]]]), outputs["pred_logits"].flip(1)
    found = postprocess({**outputs, "pred_points": points, "point_logits": own}, [(100, 200)], top_k=3)[0]
    # the logits of both queries have changed places, so the best is now query 0 with class 2
    torch.testing.assert_close(found["scores"], torch.tensor([2.0, 1.0, 0.5]).sigmoid())
    assert found["labels"].tolist() == [2, 1, 0]
    torch.testing.assert_close(found["points"], torch.tensor([[20.0, 20.0], [180.0, 50.0], [20.0, 20.0]]))
    assert "points" not in postprocess(outputs, [(100, 200)])[0]
