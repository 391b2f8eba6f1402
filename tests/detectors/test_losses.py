"""Losses against torchvision, invariances and bad input (specification T14 and T18)."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from simdetr.boxes import cxcywh_to_xyxy
from simdetr.detectors import DetectionLoss


def random_outputs(seed=0, batch=2, queries=6, classes=4, layers=2, cells=0):
    generator = torch.Generator().manual_seed(seed)

    def prediction(count):
        return {
            "pred_logits": torch.randn(batch, count, classes, generator=generator, dtype=torch.float64) * 2,
            "pred_boxes": torch.rand(batch, count, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.1,
        }

    outputs = prediction(queries) | {"aux_outputs": [prediction(queries) for _ in range(layers - 1)]}
    return outputs | ({"enc_outputs": prediction(cells)} if cells else {})


def random_targets(counts, seed=1, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "labels": torch.randint(classes, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.5 + 0.1,
        }
        for count in counts
    ]


def reference_losses(prediction, targets, criterion, num_boxes):
    """One layer, image by image, by torchvision."""
    ce = l1 = giou = 0.0
    matches = criterion.matcher(prediction["pred_logits"], prediction["pred_boxes"], targets)
    for image, (query, target) in enumerate(matches):
        logits, boxes = prediction["pred_logits"][image], prediction["pred_boxes"][image]
        one_hot = torch.zeros_like(logits)
        one_hot[query, targets[image]["labels"][target]] = 1.0
        ce += sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2.0, reduction="sum")
        wanted = targets[image]["boxes"][target].double()
        l1 += (boxes[query] - wanted).abs().sum()
        pairs = generalized_box_iou(cxcywh_to_xyxy(boxes[query]), cxcywh_to_xyxy(wanted))
        giou += (1 - pairs.diagonal()).sum()
    return ce / num_boxes, l1 / num_boxes, giou / num_boxes


def test_every_layer_matches_torchvision():
    outputs, targets = random_outputs(layers=3, cells=9), random_targets((3, 2))
    criterion = DetectionLoss()
    losses = criterion(outputs, targets)
    blind = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
    layers = {
        "": (outputs, targets),
        "_0": (outputs["aux_outputs"][0], targets),
        "_1": (outputs["aux_outputs"][1], targets),
        "_enc": (outputs["enc_outputs"], blind),
    }
    total = 0.0
    for suffix, (prediction, aims) in layers.items():
        expected = reference_losses(prediction, aims, criterion, num_boxes=5)
        for name, weight, value in zip(("loss_ce", "loss_bbox", "loss_giou"), (2, 5, 2), expected, strict=True):
            torch.testing.assert_close(losses[name + suffix], value)
            total += weight * value
    torch.testing.assert_close(losses["loss"], total)
    assert len(losses) == 14 and losses["unmatched"] == 0


def test_focal_loss_passes_gradcheck():
    criterion = DetectionLoss(focal_alpha=0.4, focal_gamma=1.5)
    logits = torch.randn(2, 1, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = tuple(torch.tensor([[values], [values]]).squeeze(1) for values in ([0, 0], [1, 3], [2, 0]))
    positives = (torch.arange(2)[:, None].expand(2, 2), *places)

    def focal(x):
        return criterion._focal(x, positives, torch.ones(2, 2, dtype=torch.float64))

    assert torch.autograd.gradcheck(focal, (logits.requires_grad_(),))
    one_hot = torch.zeros_like(logits)
    one_hot[positives] = 1.0
    expected = sigmoid_focal_loss(logits, one_hot, alpha=0.4, gamma=1.5, reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(focal(logits), expected)


def test_duplicating_every_image_changes_nothing():
    outputs, targets = random_outputs(cells=8), random_targets((3, 1))

    def twice(prediction):
        return {name: torch.cat((tensor, tensor)) for name, tensor in prediction.items()}

    doubled = twice({name: outputs[name] for name in ("pred_logits", "pred_boxes")})
    doubled |= {"aux_outputs": [twice(layer) for layer in outputs["aux_outputs"]]}
    doubled |= {"enc_outputs": twice(outputs["enc_outputs"])}
    single, double = DetectionLoss()(outputs, targets), DetectionLoss()(doubled, targets + targets)
    for name, value in single.items():
        torch.testing.assert_close(double[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("counts", [(0, 0), (0, 2)])
def test_images_without_targets(counts):
    outputs, targets = random_outputs(cells=8), random_targets(counts)
    leaves = [outputs[name].requires_grad_() for name in ("pred_logits", "pred_boxes")]
    leaves += [outputs["enc_outputs"][name].requires_grad_() for name in ("pred_logits", "pred_boxes")]
    losses = DetectionLoss()(outputs, targets)
    assert torch.isfinite(losses["loss"])
    losses["loss"].backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)
    assert leaves[0].grad.abs().sum() > 0, "background is learned from empty images"
    if sum(counts) == 0:
        assert losses["loss_bbox"] == 0 and losses["loss_giou"] == 0 and losses["loss_bbox_enc"] == 0
        assert losses["loss_ce"] > 0


def test_perfect_boxes_cost_nothing():
    targets = random_targets((3,))
    outputs = random_outputs(batch=1, queries=3, layers=1)
    outputs["pred_boxes"] = targets[0]["boxes"][None].clone()
    losses = DetectionLoss(class_cost=0.0)(outputs, targets)
    torch.testing.assert_close(losses["loss_bbox"], torch.tensor(0.0))
    torch.testing.assert_close(losses["loss_giou"], torch.tensor(0.0), rtol=0, atol=1e-6)


def test_weights_scale_the_total_only():
    outputs, targets = random_outputs(layers=1), random_targets((2, 2))
    losses = DetectionLoss(class_weight=1.0, box_weight=0.5, giou_weight=3.0)(outputs, targets)
    expected = losses["loss_ce"] + 0.5 * losses["loss_bbox"] + 3 * losses["loss_giou"]
    torch.testing.assert_close(losses["loss"], expected)
    torch.testing.assert_close(losses["loss_ce"], DetectionLoss()(outputs, targets)["loss_ce"])


def test_encoder_can_learn_classes():
    outputs, targets = random_outputs(cells=8), random_targets((3, 2), seed=5)
    assert any(target["labels"].any() for target in targets)
    blind, aware = DetectionLoss()(outputs, targets), DetectionLoss(class_aware_encoder=True)(outputs, targets)
    assert blind["loss_ce_enc"] != aware["loss_ce_enc"]
    zeros = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
    torch.testing.assert_close(
        DetectionLoss(class_aware_encoder=True)(outputs, zeros)["loss_ce_enc"], blind["loss_ce_enc"]
    )


@pytest.mark.parametrize("name", ["pred_logits", "pred_boxes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["last", "aux", "enc"])
@pytest.mark.parametrize("counts", [(2, 1), (0, 0)])
def test_one_broken_number_reaches_the_loss(name, value, layer, counts):
    """Also where the broken query would never be matched, so that the caller sees it."""
    outputs = random_outputs(cells=8)
    prediction = {"last": outputs, "aux": outputs["aux_outputs"][0], "enc": outputs["enc_outputs"]}[layer]
    prediction[name][1, 4, 0] = value
    assert not torch.isfinite(DetectionLoss()(outputs, random_targets(counts))["loss"])


def test_targets_that_do_not_fit():
    outputs = random_outputs()
    with pytest.raises(ValueError, match="targets has 1 images, but outputs has 2"):
        DetectionLoss()(outputs, random_targets((1,)))
    targets = random_targets((1, 1))
    targets[1]["labels"] = torch.tensor([4])
    with pytest.raises(ValueError, match=r"image 1 of the batch lie in 4\.\.4.*num_classes=4"):
        DetectionLoss()(outputs, targets)


def test_more_objects_than_queries():
    outputs = random_outputs(batch=2, queries=3, layers=1)
    losses = DetectionLoss()(outputs, random_targets((5, 3)))
    assert torch.isfinite(losses["loss"])
    assert float(losses["unmatched"]) == pytest.approx(2 / 8)


def test_scores_of_one_change_nothing():
    outputs, targets = random_outputs(cells=8), random_targets((3, 2))
    sure = [{**target, "scores": torch.ones(len(target["labels"]))} for target in targets]
    plain, scored = DetectionLoss()(outputs, targets), DetectionLoss()(outputs, sure)
    for name, value in plain.items():
        torch.testing.assert_close(scored[name], value)


def test_an_unsure_object_is_an_object_as_often_as_it_says():
    """The class losses are s times those of an object and 1 - s times those of background; the box counts s."""
    outputs, targets = random_outputs(batch=1, queries=4, layers=1), random_targets((1,))
    outputs["pred_objectness"] = torch.linspace(-2, 1, 4, dtype=torch.float64)[None, :, None]
    score, criterion = 0.3, DetectionLoss()
    losses = criterion(outputs, [{**targets[0], "scores": torch.tensor([score])}])
    ((query, _),) = criterion.matcher(outputs["pred_logits"], outputs["pred_boxes"], targets)
    for name, logits, column in (
        ("loss_ce", outputs["pred_logits"][0], targets[0]["labels"]),
        ("loss_object", outputs["pred_objectness"][0], torch.tensor([0])),
    ):
        background, one_hot = torch.zeros_like(logits), torch.zeros_like(logits)
        one_hot[query, column] = 1.0
        of_object, of_background = (
            sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2.0, reduction="sum")
            for wanted in (one_hot, background)
        )
        # a score of 0.3 is less than one box, and losses are never divided by less
        torch.testing.assert_close(losses[name], score * of_object + (1 - score) * of_background, rtol=1e-6, atol=1e-7)
    wanted = targets[0]["boxes"].double()
    found = outputs["pred_boxes"][0, query]
    torch.testing.assert_close(losses["loss_bbox"], score * (found - wanted).abs().sum(), rtol=1e-6, atol=1e-7)
    overlap = generalized_box_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))[0, 0]
    torch.testing.assert_close(losses["loss_giou"], score * (1 - overlap), rtol=1e-6, atol=1e-7)
    total = 2 * losses["loss_ce"] + 5 * losses["loss_bbox"] + 2 * losses["loss_giou"] + 2 * losses["loss_object"]
    torch.testing.assert_close(losses["loss"], total)


def test_losses_are_divided_by_the_sum_of_scores():
    outputs, targets = random_outputs(layers=1), random_targets((3, 2))
    half = [{**target, "scores": torch.full((len(target["labels"]),), 0.5)} for target in targets]
    plain, scored = DetectionLoss()(outputs, targets), DetectionLoss()(outputs, half)
    for name in ("loss_bbox", "loss_giou"):
        torch.testing.assert_close(scored[name], plain[name])  # each box counts half, of half as many


def test_objectness_is_learned_in_every_layer_and_of_every_class():
    outputs = random_outputs(queries=6, layers=3)
    for layer in (outputs, *outputs["aux_outputs"]):
        layer["pred_objectness"] = layer["pred_logits"][..., :1].clone()
    targets = random_targets((3, 2))
    losses = DetectionLoss(class_cost=0.0)(outputs, targets)
    single = {**outputs, "pred_logits": outputs["pred_objectness"]}
    single["aux_outputs"] = [{**a, "pred_logits": a["pred_objectness"]} for a in outputs["aux_outputs"]]
    blind = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
    expected = DetectionLoss(class_cost=0.0)(single, blind)
    for suffix in ("", "_0", "_1"):
        torch.testing.assert_close(losses[f"loss_object{suffix}"], expected[f"loss_ce{suffix}"])


def rank_loss(rank, port, folder):
    """One of two ranks: 3 targets on the first, 1 on the second."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    outputs = random_outputs(seed=rank, batch=1)
    losses = DetectionLoss()(outputs, random_targets((3,) if rank == 0 else (0,), seed=rank))
    torch.save(losses, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
def test_number_of_boxes_is_averaged_over_ranks(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_loss, (port, str(tmp_path)), nprocs=2)
    for rank, (count, own) in enumerate([(3, 3.0), (0, 1.0)]):
        alone = DetectionLoss()(random_outputs(seed=rank, batch=1), random_targets((count,), seed=rank))
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        # alone the sums are divided by the rank's own boxes (at least 1), together by 3 boxes / 2 ranks
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value * own / 1.5)
