"""The contract holds for Deformable DETR, and what breaks it cannot be built."""

from __future__ import annotations

import pytest
import torch

from simdetr.detectors import DeformableDETR, Detector, ViDT
from simdetr.detectors.detector import levels_of, queries_of
from simdetr.detectors.losses import DetectionLoss


def test_a_detector_needs_both_methods():
    class Half(Detector):
        def forward(self, images, mask=None):
            return {}

    with pytest.raises(TypeError, match="losses"):
        Half()


@pytest.mark.parametrize("variant", ["base", "two_stage"])
def test_own_losses_are_the_criterion_of_the_outputs(make_deformable, batch, variant):
    images, mask, targets = batch
    detector = make_deformable(variant)
    ours = detector.losses(images, mask, targets)
    expected = DetectionLoss()(detector(images, mask), targets)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value)


def test_names_of_submodules_exist(make_deformable):
    detector = make_deformable()
    body = detector.get_submodule(detector.body_name)
    assert any(parameter.requires_grad for parameter in body.parameters())
    assert detector.body_name.startswith(detector.backbone_name)
    assert detector.init_args["num_classes"] == detector.num_classes


# ----------------------------------------------------------------------------------------------------------------------
# What detectors hand to heads: queries as decoded, levels with strides and masks, and where predictions start.


SMALL = {"hidden_dim": 32, "num_heads": 2, "num_decoder_layers": 3, "ffn_dim": 32, "num_queries": 5, "dropout": 0.0}


def make(kind):
    torch.manual_seed(0)
    if kind == "vidt":
        return ViDT(4, backbone="swin_pico", **SMALL)
    options = {"refined": {"with_box_refine": True}, "two-stage": {"with_box_refine": True, "two_stage": True}}
    return DeformableDETR(4, backbone="test_resnet", num_encoder_layers=1, **SMALL, **options.get(kind, {}))


@pytest.fixture
def images():
    torch.manual_seed(2)
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 32:] = True
    return torch.randn(2, 3, 64, 96).masked_fill(mask[:, None], 0.0), mask


@pytest.mark.parametrize("kind", ["plain", "refined", "two-stage", "vidt"])
@torch.no_grad()
def test_queries_are_those_that_predict(kind, images):
    detector = make(kind).eval()
    outputs, features = detector.decoded(*images)
    plain = detector(*images)
    assert torch.equal(outputs["pred_boxes"], plain["pred_boxes"])
    queries, sizes = features.queries, detector.feature_sizes
    count = 4 if kind == "vidt" else 3
    assert sizes.num_predictions == count and sizes.query_channels == 32 and sizes.num_classes == 4
    for part, width in ((queries.states, 32), (queries.references, 2), (queries.logits, 4), (queries.boxes, 4)):
        assert [tuple(layer.shape) for layer in part] == [(2, 5, width)] * count
    for layer, prediction in enumerate([*plain["aux_outputs"], plain]):
        assert torch.equal(queries.boxes[layer], prediction["pred_boxes"])
        assert torch.equal(queries.logits[layer], prediction["pred_logits"])


@pytest.mark.parametrize("kind", ["plain", "refined", "two-stage", "vidt"])
@torch.no_grad()
def test_references_are_where_boxes_start(kind, images):
    detector = make(kind).eval()
    for head in detector.bbox_embed:
        for parameter in head.parameters():
            parameter.zero_()  # a prediction is then its own start
    queries = detector.decoded(*images)[1].queries
    for reference, boxes in zip(queries.references, queries.boxes, strict=True):
        torch.testing.assert_close(reference, boxes[..., :2], atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["plain", "vidt"])
@torch.no_grad()
def test_levels_have_the_sizes_that_are_told(kind, images):
    detector = make(kind).eval()
    levels, sizes = detector.decoded(*images)[1].levels, detector.feature_sizes
    assert tuple(level.stride for level in levels) == sizes.level_strides == (8, 16, 32, 64)
    assert tuple(level.features.shape[1] for level in levels) == sizes.level_channels
    for level in levels:
        height, width = -(-64 // level.stride), -(-96 // level.stride)
        assert level.features.shape[2:] == level.mask.shape[1:] == (height, width)
    assert levels[0].mask[1].float().mean() == 0.5
    assert not levels[0].mask[0].any()


def test_vidt_without_a_decoder_has_no_queries(images):
    with pytest.raises(ValueError, match="build ViDT with neck=True"):
        ViDT(4, backbone="swin_pico", neck=False, num_queries=5).decoded(*images)


def test_a_neck_sees_levels_in_order_and_what_it_gives_goes_on():
    maps = [torch.full((2, 1, 4, 4), 1.0), torch.full((2, 1, 2, 2), 2.0)]
    masks = [torch.zeros(1, 4, 4, dtype=torch.bool), torch.zeros(1, 2, 2, dtype=torch.bool)]
    levels, taps = levels_of(maps, masks, (8, 16), lambda index, level: (level.features * 10, (index, level.stride)))
    assert taps == [(0, 8), (1, 16)]
    assert [float(level.features.mean()) for level in levels] == [10.0, 20.0]
    assert levels[0].mask.shape == (2, 4, 4)
    untouched, none = levels_of(maps, masks, (8, 16), None)
    assert untouched[0].features is maps[0] and none == []


def test_references_stop_gradients_between_predictions():
    boxes = [torch.rand(1, 2, 4, requires_grad=True) for _ in range(3)]
    start = torch.rand(1, 2, 4)
    refined = queries_of(boxes, boxes, boxes, start, refine=True)
    assert torch.equal(refined.references[0], start[..., :2])
    assert torch.equal(refined.references[2], boxes[1][..., :2]) and not refined.references[2].requires_grad
    fixed = queries_of(boxes, boxes, boxes, start, refine=False)
    assert all(torch.equal(reference, start[..., :2]) for reference in fixed.references)
