"""Terms of ViDT+ by their scalar formulas, their gradients, and what holds without masks or objects (T18, T22)."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from torchvision.ops import generalized_box_iou

from simdetr.boxes import cxcywh_to_xyxy, denormalise, paired_giou, pairwise_iou
from simdetr.detectors import DetectionLoss, mask_vectors
from simdetr.detectors.detector import softmax_log_odds
from simdetr.detectors.mask_vectors import crop_masks, decode_crops, encode_crops
from simdetr.detectors.vidt_losses import NeckFreeLoss, VidtLoss, token_losses, token_targets

CANVAS = (48, 64)
SIZES = ((48, 56), (40, 64))
MAPS = ((6, 8), (3, 4))


def make_outputs(seed=0, batch=2, queries=6, classes=4, layers=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    def prediction():
        boxes = torch.rand(batch, queries, 4, generator=generator, dtype=torch.float64) * 0.4 + 0.2
        return {
            "pred_logits": draw(batch, queries, classes),
            "pred_boxes": boxes.to(dtype).requires_grad_(),
            "pred_ious": draw(batch, queries, 1),
            "pred_vectors": draw(batch, queries, 256),
        }

    tokens = [draw(batch, *size, classes) for size in MAPS]
    return prediction() | {"aux_outputs": [prediction() for _ in range(layers - 1)], "enc_tokens": tokens}


def make_targets(counts=(3, 2), seed=1, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "labels": torch.randint(classes, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.25,
            "masks": torch.rand(count, *size, generator=generator) > 0.4,
            "size": torch.tensor(size),
        }
        for count, size in zip(counts, SIZES, strict=True)
    ]


def layers_of(outputs):
    return {"_0": outputs["aux_outputs"][0], "_1": outputs["aux_outputs"][1], "": outputs}


def matched_pairs(criterion, prediction, targets):
    """Image by image: index of the image, queries, their targets."""
    matches = criterion.detection.matcher(prediction["pred_logits"], prediction["pred_boxes"], targets)
    return [(image, query, target) for image, (query, target) in enumerate(matches)]


def test_every_term_is_its_formula_and_the_total_their_weighted_sum():
    outputs, targets = make_outputs(), make_targets()
    criterion = VidtLoss(detection=DetectionLoss(box_weight=7.0))
    criterion.weights = {"loss_iouaware": 1.5, "loss_vector": 0.5, "loss_token_focal": 3.0, "loss_token_dice": 4.0}
    losses = criterion(outputs, targets, CANVAS)
    expected = DetectionLoss(box_weight=7.0)(outputs, targets)
    for suffix, prediction in layers_of(outputs).items():
        cross, distances = 0.0, []
        for image, query, target in matched_pairs(criterion, prediction, targets):
            wanted = targets[image]["boxes"].double()
            corners = [cxcywh_to_xyxy(side) for side in (prediction["pred_boxes"][image][query], wanted[target])]
            for x, iou in zip(
                prediction["pred_ious"][image][query, 0].tolist(),
                pairwise_iou(*corners).diagonal().tolist(),
                strict=True,
            ):
                p = 1 / (1 + math.exp(-x))
                cross -= iou * math.log(p) + (1 - iou) * math.log(1 - p)
            masks = targets[image]["masks"]
            vectors = encode_crops(crop_masks(masks, denormalise(targets[image]["boxes"], SIZES[image])))
            distances.append((prediction["pred_vectors"][image][query] - vectors[target]).abs().flatten())
        expected[f"loss_iouaware{suffix}"] = torch.tensor(cross / 5, dtype=torch.float64)
        expected[f"loss_vector{suffix}"] = 3 * torch.cat(distances).mean()
        expected["loss"] = expected["loss"] + 1.5 * cross / 5 + 0.5 * expected[f"loss_vector{suffix}"]
    focal, dice = token_losses(outputs["enc_tokens"], token_targets(targets, 4, CANVAS, MAPS))
    expected |= {"loss_token_focal": focal / 5, "loss_token_dice": dice / 5}
    expected["loss"] = expected["loss"] + 3 * focal / 5 + 4 * dice / 5
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value.double(), rtol=1e-6, atol=1e-6, msg=name)


def test_overlap_estimates_leave_boxes_alone_unless_asked():
    outputs, targets = make_outputs(), make_targets()
    boxes = outputs["pred_boxes"]
    detached = VidtLoss()(outputs, targets, CANVAS)["loss_iouaware"]
    assert torch.autograd.grad(detached, boxes, allow_unused=True, retain_graph=True)[0] is None
    flowing = VidtLoss(detach_iou=False)
    loss = flowing(outputs, targets, CANVAS)["loss_iouaware"]
    torch.testing.assert_close(loss, detached)
    (found,) = torch.autograd.grad(loss, boxes)
    expected = torch.zeros_like(boxes)
    for image, query, target in matched_pairs(flowing, outputs, targets):
        chosen = boxes[image][query].detach().requires_grad_()
        wanted = cxcywh_to_xyxy(targets[image]["boxes"][target].double())
        iou = pairwise_iou(cxcywh_to_xyxy(chosen), wanted).diagonal()
        slope = -outputs["pred_ious"][image][query, 0].detach() / 5
        expected[image, query] = torch.autograd.grad(iou, chosen, grad_outputs=slope)[0]
    assert float(found.abs().max()) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_gradients_reach_matched_queries_alone():
    outputs, targets = make_outputs(), make_targets()
    criterion = VidtLoss()
    losses = criterion(outputs, targets, CANVAS)
    used = torch.zeros(2, 6, dtype=torch.bool)
    for image, query, _ in matched_pairs(criterion, outputs, targets):
        used[image, query] = True
    for name, loss in (("pred_ious", "loss_iouaware"), ("pred_vectors", "loss_vector")):
        (slope,) = torch.autograd.grad(losses[loss], outputs[name], retain_graph=True)
        assert torch.equal(slope.abs().sum(dim=2) > 0, used)


def test_vectors_learn_the_shape():
    masks = torch.zeros(1, *SIZES[0], dtype=torch.bool)
    masks[0, 10:30, 10:20] = masks[0, 20:30, 10:40] = True  # an L
    target = {
        "labels": torch.tensor([1]),
        "boxes": torch.tensor([[25 / 56, 20 / 48, 30 / 56, 20 / 48]]),
        "masks": masks,
    }
    vectors = torch.zeros(1, 2, 256, requires_grad=True)
    outputs = {
        "pred_logits": torch.zeros(1, 2, 3),
        "pred_boxes": target["boxes"][None].repeat(1, 2, 1) * torch.tensor([1.0, 0.5]).view(1, 2, 1),
        "pred_vectors": vectors,
    }
    optimiser = torch.optim.Adam([vectors], lr=1.0)
    for _ in range(150):
        optimiser.zero_grad()
        loss = VidtLoss()(outputs, [target], CANVAS)["loss_vector"]
        loss.backward()
        optimiser.step()
    drawn = decode_crops(vectors[0, :1])
    rows, columns = torch.meshgrid(torch.arange(128) / 128 * 20 + 10, torch.arange(128) / 128 * 30 + 10, indexing="ij")
    wanted = (columns < 20) | (rows >= 20)
    assert (drawn[0] & wanted).sum() / (drawn[0] | wanted).sum() > 0.97
    assert not vectors[0, 1].any()  # nobody's


def test_token_channel_0_as_in_the_original():
    outputs, targets = make_outputs(), make_targets()
    shifted = [{**target, "labels": target["labels"].clamp(min=1)} for target in targets]
    losses = VidtLoss(token_foreground=True)(outputs, shifted, CANVAS)
    wanted = token_targets(shifted, 4, CANVAS, MAPS, foreground_channel=True)
    focal, dice = token_losses(outputs["enc_tokens"], wanted)
    torch.testing.assert_close(losses["loss_token_focal"], focal / 5)
    torch.testing.assert_close(losses["loss_token_dice"], dice / 5)


def test_without_masks_their_terms_are_off_and_said_to_be_once(caplog):
    outputs = make_outputs()
    targets = [{name: value for name, value in target.items() if name != "masks"} for target in make_targets()]
    criterion = VidtLoss()
    with caplog.at_level(logging.INFO):
        losses = criterion(outputs, targets, CANVAS)
        criterion(outputs, targets, CANVAS)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "UQR" in lines[0] and "token labelling" in lines[0] and "no masks" in lines[0]
    assert not any("vector" in name or "token" in name for name in losses)
    overlap = sum(losses[f"loss_iouaware{suffix}"] for suffix in ("_0", "_1", ""))
    torch.testing.assert_close(losses["loss"], DetectionLoss()(outputs, targets)["loss"] + 2 * overlap)
    losses["loss"].backward()
    for prediction in layers_of(outputs).values():
        assert not prediction["pred_vectors"].grad.any() and prediction["pred_ious"].grad.any()
    assert not any(level.grad.any() for level in outputs["enc_tokens"])  # in the graph, with a gradient of zero


def test_outputs_without_further_heads_have_the_detection_losses():
    outputs, targets = make_outputs(), make_targets()
    plain = [{name: layer[name] for name in ("pred_logits", "pred_boxes")} for layer in layers_of(outputs).values()]
    plain_outputs = plain[-1] | {"aux_outputs": plain[:-1]}
    losses, expected = VidtLoss()(plain_outputs, targets, CANVAS), DetectionLoss()(plain_outputs, targets)
    assert losses.keys() == expected.keys() and all(torch.equal(losses[name], expected[name]) for name in losses)


@pytest.mark.parametrize("counts", [(0, 0), (0, 2)])
def test_images_without_objects_are_finite_with_every_head_in_the_graph(counts):
    outputs, targets = make_outputs(), make_targets(counts)
    losses = VidtLoss(detach_iou=False)(outputs, targets, CANVAS)
    assert all(torch.isfinite(value) for value in losses.values())
    losses["loss"].backward()
    for prediction in layers_of(outputs).values():
        assert all(torch.isfinite(prediction[name].grad).all() for name in prediction if name.startswith("pred"))
    if sum(counts) == 0:
        assert losses["loss_vector"].item() == losses["loss_iouaware_0"].item() == 0
        assert losses["loss_token_focal"].item() > 0  # cells learn that they are empty


def test_twice_the_same_images_have_the_same_losses():
    outputs, targets = make_outputs(), make_targets()

    def twice(value):
        if isinstance(value, list):
            return [twice(part) for part in value]
        return (
            {name: twice(part) for name, part in value.items()} if isinstance(value, dict) else torch.cat([value] * 2)
        )

    once = VidtLoss()(outputs, targets, CANVAS)
    for name, value in VidtLoss()(twice(outputs), targets * 2, CANVAS).items():
        torch.testing.assert_close(value, once[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["pred_ious", "pred_vectors", "enc_tokens"])
def test_a_prediction_that_is_not_finite_shows_in_the_loss(name):
    outputs = make_outputs()
    bad = outputs["enc_tokens"][1] if name == "enc_tokens" else outputs["aux_outputs"][0][name]
    with torch.no_grad():
        bad[1, -1] = torch.nan
    assert torch.isnan(VidtLoss()(outputs, make_targets(), CANVAS)["loss"])


def test_half_precision_is_summed_in_full():
    losses = VidtLoss()(make_outputs(dtype=torch.bfloat16), make_targets(), CANVAS)
    exact = VidtLoss()(make_outputs(), make_targets(), CANVAS)
    assert losses["loss"].dtype == torch.float32
    torch.testing.assert_close(losses["loss_token_dice"].double(), exact["loss_token_dice"], rtol=0.01, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = VidtLoss()(make_outputs(dtype=torch.float32), make_targets(), CANVAS)
    torch.testing.assert_close(automatic["loss"].double(), exact["loss"], rtol=1e-3, atol=0)


def test_masks_that_do_not_fit_are_named():
    targets = make_targets()
    targets[1]["masks"] = targets[1]["masks"][:1]
    with pytest.raises(
        ValueError, match=r"masks of image 1 of the batch: expected \[2, height, width\].*\[1, 40, 64\]"
    ):
        VidtLoss()(make_outputs(), targets, CANVAS)
    with pytest.raises(ValueError, match="canvas_hw: expected at least"):
        VidtLoss()(make_outputs(), make_targets(), (48, 60))


def test_more_objects_than_queries():
    targets = make_targets((9, 8))
    losses = VidtLoss()(make_outputs(), targets, CANVAS)
    assert all(torch.isfinite(value) for value in losses.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu():
    def moved(value):
        if isinstance(value, list):
            return [moved(part) for part in value]
        return {name: moved(part) for name, part in value.items()} if isinstance(value, dict) else value.cuda()

    expected = VidtLoss()(make_outputs(dtype=torch.float32), make_targets(), CANVAS)
    found = VidtLoss()(moved(make_outputs(dtype=torch.float32)), moved(make_targets()), CANVAS)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# DETR's loss: against a brute-force matching and definitions written out.


def make_case(queries=5, classes=3, counts=(2, 0, 1)):
    generator = torch.Generator().manual_seed(len(counts) + queries)
    logits = torch.randn(len(counts), queries, classes + 1, generator=generator) * 2
    boxes = torch.rand(len(counts), queries, 4, generator=generator) * 0.5 + 0.2
    targets = [
        {
            "labels": torch.randint(classes, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.5 + 0.2,
        }
        for count in counts
    ]
    return logits.requires_grad_(), boxes.requires_grad_(), targets


def outputs_of(logits, boxes):
    return {"pred_logits": softmax_log_odds(logits), "pred_boxes": boxes}


def cheapest(logits, boxes, target):
    """Query of each target by trying all assignments."""
    probability = logits.softmax(-1)
    cost = 5 * torch.cdist(boxes, target["boxes"], p=1) - 2 * probability[:, target["labels"]]
    cost = cost - 2 * generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target["boxes"]))
    ways = itertools.permutations(range(len(boxes)), len(target["labels"]))
    return list(min(ways, key=lambda way: sum(float(cost[query, index]) for index, query in enumerate(way))))


@pytest.mark.parametrize("counts", [(2, 0, 1), (3,), (4, 4), (5,)])
def test_terms_by_hand(counts):
    logits, boxes, targets = make_case(counts=counts)
    found = NeckFreeLoss()(logits, outputs_of(logits, boxes), targets)
    with torch.no_grad():
        weighted, weights, l1, giou = 0.0, 0.0, 0.0, 0.0
        for image, target in enumerate(targets):
            wanted = [3] * 5
            for index, query in enumerate(cheapest(logits[image], boxes[image], target)):
                wanted[query] = int(target["labels"][index])
                l1 += float((boxes[image, query] - target["boxes"][index]).abs().sum())
                pair = (cxcywh_to_xyxy(side[None]) for side in (boxes[image, query], target["boxes"][index]))
                giou += 1 - float(paired_giou(*pair))
            for query, label in enumerate(wanted):
                weight = 0.1 if label == 3 else 1.0
                weighted -= weight * math.log(float(logits[image, query].softmax(-1)[label]))
                weights += weight
    objects = sum(counts)
    assert found["loss_ce"].item() == pytest.approx(weighted / weights, rel=1e-5)
    assert found["loss_bbox"].item() == pytest.approx(l1 / objects, rel=1e-5)
    assert found["loss_giou"].item() == pytest.approx(giou / objects, rel=1e-5)
    total = weighted / weights + 5 * l1 / objects + 2 * giou / objects
    assert found["loss"].item() == pytest.approx(total, rel=1e-5)


def test_nothing_to_find():
    logits, boxes, targets = make_case(counts=(0, 0))
    found = NeckFreeLoss()(logits, outputs_of(logits, boxes), targets)
    found["loss"].backward()
    assert found["loss_bbox"] == found["loss_giou"] == 0
    torch.testing.assert_close(found["loss"], -logits.log_softmax(-1)[..., -1].mean())
    assert boxes.grad is not None and boxes.grad.abs().sum() == 0 and logits.grad.abs().sum() > 0


def test_broken_predictions_reach_the_loss():
    logits, boxes, targets = make_case()
    with torch.no_grad():
        logits[0, 1, 2] = torch.nan
    assert torch.isnan(NeckFreeLoss()(logits, outputs_of(logits, boxes), targets)["loss"])


def test_the_class_for_no_object_is_no_label():
    logits, boxes, targets = make_case()
    targets[0]["labels"][0] = 3
    with pytest.raises(ValueError, match="num_classes=3"):
        NeckFreeLoss()(logits, outputs_of(logits, boxes), targets)


# ----------------------------------------------------------------------------------------------------------------------
# Targets of token labels pixel by pixel, their losses by the scalar formulas (T22).


def rectangles(*boxes, size_hw=(24, 32)):
    masks = torch.zeros(len(boxes), *size_hw, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def test_shares_by_hand():
    target = {"masks": rectangles((0, 0, 8, 8), (4, 0, 16, 8)), "labels": torch.tensor([2, 0])}
    (shares,) = token_targets([target], 3, (24, 32), [(3, 4)])
    assert shares.shape == (1, 3, 4, 3) and shares.dtype == torch.float32
    expected = torch.zeros(3, 4, 3)
    expected[0, 0, 2] = 1.0  # the earlier object is in front
    expected[0, 1, 0] = 1.0
    assert torch.equal(shares[0], expected)
    (shares,) = token_targets([{**target, "labels": torch.tensor([1, 1])}], 3, (24, 32), [(3, 4)])
    assert shares[0, 0, :2, 1].tolist() == [1, 1] and shares.sum() == 2  # of one class, counted once
    (swapped,) = token_targets(
        [{"masks": target["masks"].flip(0), "labels": torch.tensor([0, 2])}], 3, (24, 32), [(3, 4)]
    )
    assert swapped[0, 0, 0].tolist() == [0.5, 0, 0.5]


def test_rows_sum_to_the_foreground_and_channel_0_can_hold_it():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(4, 37, 50, generator=generator) > 0.7
    labels = torch.tensor([3, 1, 1, 0])
    maps_hw = [(7, 8), (4, 4), (1, 1)]
    levels = token_targets([{"masks": masks, "labels": labels}], 4, (50, 60), maps_hw)
    canvas = torch.zeros(50, 60)
    canvas[:37, :50] = masks.any(dim=0)
    for level, size in zip(levels, maps_hw, strict=True):
        foreground = torch.nn.functional.adaptive_avg_pool2d(canvas[None, None], size)[0, 0]
        torch.testing.assert_close(level[0].sum(dim=2), foreground, atol=1e-6, rtol=0)
    originals = token_targets([{"masks": masks, "labels": labels + 1}], 5, (50, 60), maps_hw, foreground_channel=True)
    for level, original in zip(levels, originals, strict=True):
        torch.testing.assert_close(original[..., 1:], level)
        torch.testing.assert_close(original[..., 0], level.sum(dim=3))


def test_cells_are_means_over_their_pixels():
    masks = torch.rand(3, 30, 41, generator=torch.Generator().manual_seed(1)) > 0.5
    labels = torch.tensor([1, 0, 1])
    owner = torch.full((32, 48), -1)  # every pixel's class, padded at the bottom and right
    for mask, label in zip(masks.flip(0), labels.flip(0), strict=True):
        owner[:30, :41][mask] = label
    (level,) = token_targets([{"masks": masks.to(torch.uint8), "labels": labels}], 2, (32, 48), [(5, 6)])
    for row in range(5):
        rows = slice(row * 32 // 5, math.ceil((row + 1) * 32 / 5))
        for column in range(6):
            cell = owner[rows, column * 48 // 6 : (column + 1) * 48 // 6]
            expected = torch.stack([(cell == label).float().mean() for label in range(2)])
            torch.testing.assert_close(level[0, row, column], expected, atol=1e-6, rtol=0)


def test_portions_make_no_difference(monkeypatch):
    masks = torch.rand(5, 24, 32, generator=torch.Generator().manual_seed(2)) > 0.6
    targets = [{"masks": masks, "labels": torch.arange(5) % 3}, {"masks": masks[:0], "labels": torch.arange(0)}]
    whole = token_targets(targets, 3, (24, 40), [(3, 5), (2, 2)])
    assert not whole[0][1].any() and not whole[1][1].any()  # the image without objects
    monkeypatch.setattr(mask_vectors, "_PIXELS_AT_ONCE", 2 * 24 * 40)
    for one, two in zip(whole, token_targets(targets, 3, (24, 40), [(3, 5), (2, 2)]), strict=True):
        torch.testing.assert_close(one, two)


def test_a_canvas_that_is_too_small_is_named():
    with pytest.raises(ValueError, match=r"canvas_hw: expected at least the masks' \(24, 32\), got \(24, 30\)"):
        token_targets([{"masks": rectangles((0, 0, 1, 1)), "labels": torch.tensor([0])}], 1, (24, 30), [(3, 4)])


def test_losses_by_the_scalar_formulas():
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randn(2, h, w, 3, generator=generator, dtype=torch.float64) for h, w in ((3, 4), (2, 2))]
    targets = [torch.rand(level.shape, generator=generator, dtype=torch.float64) for level in tokens]
    focal = dice = 0.0
    for level, shares in zip(tokens, targets, strict=True):
        for logits, wanted in zip(level.flatten(1).tolist(), shares.flatten(1).tolist(), strict=True):
            common = total = summed = 0.0
            for x, t in zip(logits, wanted, strict=True):
                p = 1 / (1 + math.exp(-x))
                cross = -t * math.log(p) - (1 - t) * math.log(1 - p)
                right = p * t + (1 - p) * (1 - t)
                summed += (0.3 * t + 0.7 * (1 - t)) * (1 - right) ** 1.5 * cross
                common, total = common + p * t, total + p + t
            focal += summed / (len(logits) / 3)  # a mean over cells, a sum over classes
            dice += 1 - (2 * common + 1) / (total + 1)
    found = token_losses(tokens, targets, alpha=0.3, gamma=1.5)
    torch.testing.assert_close(torch.stack(found), torch.tensor([focal, dice], dtype=torch.float64), rtol=1e-6, atol=0)


def test_losses_pass_gradcheck_and_vanish_where_all_is_right():
    shares = torch.rand(1, 2, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logits = torch.randn(1, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_losses([x], [shares]), (logits,))
    sure = torch.tensor([[[[40.0, -40.0]]]])
    focal, dice = token_losses([sure], [torch.tensor([[[[1.0, 0.0]]]])])
    assert float(focal) < 1e-9 and float(dice) < 1e-6
