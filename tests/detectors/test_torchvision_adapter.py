"""Detectors of torchvision: their detections, targets and images in the terms of the contract."""

import copy

import pytest
import torch
from torch import nn

from simdetr.boxes import has_area
from simdetr.detectors import TorchvisionDetector, postprocess
from simdetr.training.optimisation import parameter_groups

FAMILIES = ("faster_rcnn", "fcos", "retinanet")


@pytest.fixture
def batch():
    """Two images, the second padded at the bottom and right: images, mask, targets."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 72, 96, generator=generator)
    mask = torch.zeros(2, 72, 96, dtype=torch.bool)
    mask[1, 60:] = True
    mask[1, :, 50:] = True
    targets = [
        {"labels": torch.tensor([0, 6]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.5, 0.25]])},
        {"labels": torch.tensor([3]), "boxes": torch.tensor([[0.5, 0.5, 1.0, 0.5]])},
    ]
    return images.masked_fill(mask[:, None], 0.0), mask, targets


@pytest.mark.parametrize(("name", "first_label"), [("faster_rcnn", 1), ("fcos", 0), ("retinanet", 0)])
def test_detections_become_rows(name, first_label, detectors):
    """A list as torchvision gives it, by hand, comes back out of ``postprocess``."""
    detector = detectors(name)
    labels = torch.tensor([2, 6, 0])
    scores = torch.tensor([0.9, 1.0, 1e-9])
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 80.0, 60.0], [5.0, 5.0, 6.0, 7.0]])
    found = [
        {"boxes": boxes, "labels": labels + first_label, "scores": scores},
        {"boxes": boxes[:0], "labels": labels[:0], "scores": scores[:0]},
    ]
    output = detector.as_output(found, [(60, 80), (40, 40)])
    logits = output["pred_logits"]
    assert logits.shape == (2, 12, 7) and output["pred_boxes"].shape == (2, 12, 4)
    finite = torch.isfinite(logits)
    assert finite.nonzero().tolist() == [[0, 0, 2], [0, 1, 6], [0, 2, 0]]
    assert (logits[~finite] == -torch.inf).all()
    first, second = postprocess(output, [(120, 160), (40, 40)])  # of an image twice as large
    order = [1, 0, 2]
    assert first["labels"].tolist() == labels[order].tolist()
    torch.testing.assert_close(first["scores"], scores[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first["boxes_xyxy"], 2 * boxes[order], rtol=1e-5, atol=1e-4)
    assert len(second["scores"]) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_sees_images_as_they_are(name, detectors, batch):
    """Not resized, not normalised, without padding; detections are torchvision's own."""
    detector = detectors(name)
    images, mask, _ = batch
    seen = []
    hook = detector.model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        found = detector(images, mask)
        raw = detector.model([images[0], images[1, :, :60, :50]])
    hook.remove()
    expected = torch.zeros(2, 3, 96, 96)
    expected[:, :, :72] = images
    assert torch.equal(seen[0], expected)
    for index, size in enumerate([(72, 96), (60, 50)]):
        assert 0 < len(raw[index]["scores"]) <= 12
        real = postprocess({key: value[index : index + 1] for key, value in found.items()}, [size])[0]
        kept = has_area(raw[index]["boxes"])  # boxes without area are no detections
        scores, boxes = raw[index]["scores"][kept], raw[index]["boxes"][kept]
        torch.testing.assert_close(real["scores"], scores, rtol=1e-4, atol=1e-6)
        same = real["scores"].diff().abs() > 1e-5  # the order of equals is open
        distinct = torch.cat([torch.tensor([True]), same]) & torch.cat([same, torch.tensor([True])])
        torch.testing.assert_close(real["boxes_xyxy"][distinct], boxes[distinct], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_cut_off_by_its_score(name, detectors, batch):
    """Self-training keeps every prediction: here with classes that are never sure."""
    detector = copy.deepcopy(detectors(name))
    with torch.no_grad():
        for key, parameter in detector.named_parameters():
            if "cls_score" in key or "cls_logits" in key:
                parameter.fill_(0.0 if "weight" in key or name == "faster_rcnn" else -8.0)
        found = detector(*batch[:2])["pred_logits"]
    assert (torch.isfinite(found).sum(dim=(1, 2)) > 0).all()
    assert found[torch.isfinite(found)].sigmoid().max() < 0.15


@pytest.mark.parametrize(("name", "first_label"), [("faster_rcnn", 1), ("fcos", 0), ("retinanet", 0)])
def test_targets_in_pixels(name, first_label, detectors, batch, monkeypatch):
    detector = copy.deepcopy(detectors(name)).train()
    images, mask, targets = batch
    given = []
    compute = detector.model.forward
    monkeypatch.setattr(detector.model, "forward", lambda *inputs: given.append(inputs) or compute(*inputs))
    flat = {"labels": torch.tensor([3, 4]), "boxes": torch.tensor([[0.5, 0.5, 1.0, 0.5], [0.5, 0.5, 0.0, 0.5]])}
    detector.losses(images, mask, [targets[0], flat])
    (crops, converted) = given[0]
    assert [tuple(crop.shape) for crop in crops] == [(3, 72, 96), (3, 60, 50)]
    assert torch.equal(crops[1], images[1, :, :60, :50])
    torch.testing.assert_close(converted[0]["boxes"], torch.tensor([[24.0, 18, 72, 54], [0.0, 9, 48, 27]]))
    assert converted[0]["labels"].tolist() == [first_label, 6 + first_label]
    torch.testing.assert_close(converted[1]["boxes"], torch.tensor([[0.0, 15, 50, 45]]))  # one has no area
    assert converted[1]["labels"].tolist() == [3 + first_label]


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_torchvisions(name, detectors, batch):
    detector = copy.deepcopy(detectors(name)).train()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        found = detector.losses(*batch)
        torch.manual_seed(0)
        crops = [batch[0][0], batch[0][1, :, :60, :50]]
        targets = [detector._pixels(target, crop) for target, crop in zip(batch[2], crops, strict=True)]
        expected = detector.model(crops, targets)
    assert found.keys() == {"loss", *expected}
    torch.testing.assert_close(found["loss"], sum(expected.values()))
    for term, value in expected.items():
        torch.testing.assert_close(found[term], value)


def test_backbone_options(make_other):
    frozen = make_other("fcos", trainable_layers=2, frozen_batch_norm=True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    trained = {key.split(".")[0] for key, p in frozen.model.backbone.body.named_parameters() if p.requires_grad}
    assert trained == {"layer3", "layer4"}
    free = make_other("fcos")
    assert any(isinstance(module, nn.BatchNorm2d) for module in free.modules())
    assert all(p.requires_grad for p in free.parameters())
    groups = {group["name"]: group for group in parameter_groups(free, 1e-3, 1e-4)}
    assert {id(p) for p in groups["backbone"]["params"]} == {id(p) for p in free.model.backbone.body.parameters()}


def test_anchors_and_options(make_other):
    sizes = [[8], [16], [32], [64], [96]]
    detector = make_other("retinanet", anchor_sizes=sizes, aspect_ratios=[0.5, 2.0], options={"detections_per_img": 3})
    assert detector.model.anchor_generator.sizes == tuple(map(tuple, sizes))
    assert detector.model.anchor_generator.num_anchors_per_location() == [2] * 5
    with torch.no_grad():
        assert detector.eval()(torch.zeros(1, 3, 64, 64))["pred_logits"].shape == (1, 3, 3)
    assert make_other("fcos", anchor_sizes=sizes).model.anchor_generator.num_anchors_per_location() == [1] * 5
    certain = make_other("retinanet", options={"score_thresh": 0.99}).eval()
    with torch.no_grad():
        assert not torch.isfinite(certain(torch.zeros(1, 3, 64, 64))["pred_logits"]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "ssd300_vgg16"}, "architecture must be one of fasterrcnn_resnet50_fpn, .*got 'ssd300_vgg16'"),
        ({"backbone": "vgg16"}, "backbone must be one of resnet101, .*got 'vgg16'"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"trainable_layers": 6}, "trainable_layers must be 0 to 5, got 6"),
        ({"options": {"detections": 3}}, "options: detections cannot be set; there are .*box_detections_per_img"),
        ({"options": {"min_size": 3}}, "options: min_size cannot be set"),
        ({"anchor_sizes": [[8]]}, r"anchor_sizes must be 5 lists, .*got \[\[8\]\]"),
        ({"aspect_ratios": [1.0]}, "anchor_sizes must be 5 lists, .*got None"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TorchvisionDetector(**{"num_classes": 2, "backbone": "resnet18", **arguments})


def test_modes(detectors, batch):
    with pytest.raises(RuntimeError, match=r"losses in training mode only; call train\(\)"):
        detectors("fcos").losses(*batch)
    with pytest.raises(RuntimeError, match=r"evaluation mode only .*call eval\(\), and give the task no criterion"):
        copy.deepcopy(detectors("fcos")).train()(*batch[:2])
