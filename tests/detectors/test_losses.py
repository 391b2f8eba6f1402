"""Losses against torchvision, invariances and bad input (specification T14 and T18)."""

from __future__ import annotations

import copy
import socket

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from simdetr.boxes import cxcywh_to_xyxy
from simdetr.data.pretrained_weights import load_into
from simdetr.detectors import DetectionLoss
from simdetr.detectors.losses import in_graph, valid_sizes
from simdetr.detectors.predictions import postprocess
from simdetr.exchange.weights import build_detector, checkpoint_config, load_detector, load_weights, save_detector


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
def test_number_of_boxes_is_averaged_over_ranks(in_two_processes, tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    in_two_processes(rank_loss, port, str(tmp_path))
    for rank, (count, own) in enumerate([(3, 3.0), (0, 1.0)]):
        alone = DetectionLoss()(random_outputs(seed=rank, batch=1), random_targets((count,), seed=rank))
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        # alone the sums are divided by the rank's own boxes (at least 1), together by 3 boxes / 2 ranks
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value * own / 1.5)


# ----------------------------------------------------------------------------------------------------------------------
# What all detectors of other libraries have in common: losses that fall, empty batches, gradients of everything.


TRANSFORMERS = ("deformable_detr", "conditional_detr", "detr", "rt_detr_v2", "d_fine", "lw_detr", "rf_detr")
VIT = ("lw_detr", "rf_detr")  # transformers' own transformers instead of timm's networks
TORCHVISION = ("faster_rcnn", "fcos", "retinanet")
NO_OBJECTS = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}


@pytest.fixture(scope="module")
def detectors(make_other):
    """One detector of each kind; tests copy those that they change."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make_other(name)
        return made[name]

    return get


@pytest.fixture
def scene():
    """Two images with a bright square each, the second one padded: images, mask, targets."""
    generator = torch.Generator().manual_seed(0)
    images = 0.1 * torch.randn(2, 3, 72, 96, generator=generator)
    images[0, :, 10:40, 20:60] += 2.0
    images[1, 1, 20:50, 10:40] -= 2.0
    mask = torch.zeros(2, 72, 96, dtype=torch.bool)
    mask[1, 60:] = True
    mask[1, :, 70:] = True
    boxes = (torch.tensor([[40 / 96, 25 / 72, 40 / 96, 30 / 72]]), torch.tensor([[25 / 70, 35 / 60, 30 / 70, 30 / 60]]))
    targets = [{"labels": torch.tensor([1 + index]), "boxes": box} for index, box in enumerate(boxes)]
    return images.masked_fill(mask[:, None], 0.0), mask, targets


def loss_of(detector, *batch):
    """Losses with the same draws of denoising and sampling every time."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return detector.losses(*batch)


@pytest.mark.parametrize("name", ["rt_detr_v2", "faster_rcnn"])
def test_an_unsure_object_is_background(detectors, scene, name):
    images, mask, targets = scene
    unsure = [{**target, "scores": torch.tensor([score])} for target, score in zip(targets, (0.9, 0.4), strict=True)]
    detector = copy.deepcopy(detectors(name)).train()
    expected = loss_of(detector, images, mask, [targets[0], NO_OBJECTS])["loss"]
    torch.testing.assert_close(loss_of(detector, images, mask, unsure)["loss"], expected)
    assert not torch.isclose(loss_of(detector, images, mask, targets)["loss"], expected)


def test_in_graph_changes_nothing_but_gradients_of_the_unused():
    used, unused, fixed = (nn.Parameter(torch.full((2, 3), 3.0)) for _ in range(3))
    fixed.requires_grad_(False)
    loss = in_graph((used**2).sum(), [used, unused, fixed])
    assert float(loss.detach()) == 54.0
    loss.backward()
    assert torch.equal(used.grad, torch.full((2, 3), 6.0))
    assert torch.equal(unused.grad, torch.zeros(2, 3))
    assert fixed.grad is None


def test_valid_sizes(scene):
    assert valid_sizes(scene[1]).tolist() == [[72, 96], [60, 70]]


@pytest.mark.parametrize("name", [*TRANSFORMERS, *TORCHVISION])
def test_one_step_lowers_the_loss(name, detectors, scene):
    detector = copy.deepcopy(detectors(name)).train()
    # so short a step that Faster R-CNN samples the same regions again
    optimiser = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=1e-4)
    before = loss_of(detector, *scene)
    before["loss"].backward()
    nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
    missing = [key for key, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    optimiser.step()
    assert loss_of(detector, *scene)["loss"] < before["loss"]
    terms = [value for key, value in before.items() if key != "loss"]
    assert terms and not any(value.requires_grad for value in terms)


@pytest.mark.parametrize("name", [*TRANSFORMERS, *TORCHVISION])
@pytest.mark.parametrize("empty", [1, 2])
def test_images_without_objects(name, empty, detectors, scene):
    detector = copy.deepcopy(detectors(name)).train()
    images, mask, targets = scene
    loss = loss_of(detector, images, mask, [*targets[: 2 - empty], *[NO_OBJECTS] * empty])["loss"]
    assert torch.isfinite(loss)
    loss.backward()
    trainable = [p for p in detector.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainable)
    assert any(p.grad.any() for p in trainable)  # there is background to learn


@pytest.mark.parametrize("name", [*TRANSFORMERS, *TORCHVISION])
def test_predictions_keep_the_contract(name, detectors, scene):
    detector = detectors(name).eval()
    images, mask, _ = scene
    with torch.no_grad():
        found = detector(images, mask)
        logits, boxes = found["pred_logits"], found["pred_boxes"]
        assert logits.shape[0] == boxes.shape[0] == 2 and logits.shape[2:] == (3,) and boxes.shape[2:] == (4,)
        assert logits.shape[1] == boxes.shape[1] and torch.isfinite(boxes).all() and not torch.isnan(logits).any()
        for detections, size in zip(
            postprocess(found, [(720, 960), (600, 700)]), [(720, 960), (600, 700)], strict=True
        ):
            assert set(detections["labels"].tolist()) <= {0, 1, 2}
            if name in TORCHVISION:  # untrained queries of transformers may all lie outside
                assert len(detections["scores"]) > 0
            centres = (detections["boxes_xyxy"][:, :2] + detections["boxes_xyxy"][:, 2:]) / 2
            assert (centres >= 0).all()
            if name in TORCHVISION:  # they cut boxes to the image, not to the canvas
                assert (detections["boxes_xyxy"][:, 2:] <= torch.tensor(size[::-1]) * 1.0001).all()
        # a batch without padding needs no mask, and an image's own mask without padding is none
        alone = detector(images[:1])
        same = detector(images[:1], mask[:1])
    torch.testing.assert_close(alone["pred_boxes"], same["pred_boxes"], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"mask must be \[B, H, W\] = \[2, 72, 96\], got \[1, 72, 96\]"):
        detector(images, mask[:1])


@pytest.mark.parametrize("name", [*TRANSFORMERS, *TORCHVISION])
def test_training_goes_on_after_inference_mode(name, detectors, scene):
    """Models keep anchors and positions by image size; those made in a validation serve the next training step."""
    detector = copy.deepcopy(detectors(name)).eval()
    with torch.inference_mode():
        detector(*scene[:2])
    detector.train().losses(*scene)["loss"].backward()
    if name in TRANSFORMERS:  # as with a criterion of the task
        sum(value.sum() for value in detector(*scene[:2]).values() if isinstance(value, torch.Tensor)).backward()
    learnt = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    assert learnt and all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in learnt)


@pytest.mark.parametrize("name", [*TRANSFORMERS, *TORCHVISION])
def test_a_broken_prediction_reaches_the_loss(name, detectors, scene):
    """The training stops there and keeps the batch, whatever the library would raise."""
    detector = copy.deepcopy(detectors(name)).train()
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.dim() > 1:
                parameter.fill_(torch.nan)
    assert not torch.isfinite(loss_of(detector, *scene)["loss"])


@pytest.mark.parametrize("name", [*TRANSFORMERS, *TORCHVISION])
def test_round_trip_over_a_folder(name, detectors, scene, make_other, tmp_path):
    detector = detectors(name).eval()
    save_detector(detector, checkpoint_config(detector, None), tmp_path)
    again = load_detector(tmp_path).detector
    assert again.init_args == detector.init_args
    state = detector.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    with torch.no_grad():
        found, expected = again(*scene[:2]), detector(*scene[:2])
    assert all(torch.equal(found[key], expected[key]) for key in ("pred_logits", "pred_boxes"))
    if name in TORCHVISION:
        report = load_weights(make_other(name, num_classes=2), tmp_path)
        assert report.replaced and not report.missing and not report.unexpected
        assert all("cls" in key or "box_predictor" in key or "classification" in key for key in report.replaced)


@pytest.mark.parametrize("name", [*(name for name in TRANSFORMERS if name not in VIT), *TORCHVISION])
def test_checkpoints_of_encoders_fit_the_body(name, detectors):
    detector = detectors(name)
    backbone = sum(p.numel() for p in detector.get_submodule(detector.backbone_name).parameters())
    assert 0 < backbone < sum(p.numel() for p in detector.parameters())
    encoder = timm.create_model("resnet18" if name in TORCHVISION else "test_resnet")
    body = copy.deepcopy(detector).get_submodule(detector.body_name)
    report = load_into(body, encoder.state_dict())
    assert not report.missing and not report.mismatched
    assert torch.equal(body.layer2[0].conv1.weight, encoder.layer2[0].conv1.weight)


class Losses(nn.Module):
    """What DDP wraps: the loss as ``forward``."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, *batch):
        return self.detector.losses(*batch)["loss"]


def train_rank(rank, port, folder, configs):
    """Two steps of one of two ranks with each detector; the second rank's batch has no objects."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    images, mask = torch.ones(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    objects = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(Losses(build_detector(config).train()))
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):  # what the first step left out would be missed at the second
            optimiser.zero_grad()
            loss = model(images, mask, [NO_OBJECTS if rank else objects])
            loss.backward()
            optimiser.step()
            assert torch.isfinite(loss)
        learnt = dict(model.module.detector.named_parameters())
        gradients = {key: parameter.grad for key, parameter in learnt.items()}
        torch.save({"weights": learnt, "gradients": gradients}, f"{folder}/{name}{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.slow
def test_a_rank_without_objects(in_two_processes, config_of_other, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    configs = {name: config_of_other(name) for name in ("rt_detr_v2", "fcos")}
    in_two_processes(train_rank, port, str(tmp_path), configs)
    for name in configs:
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in range(2))
        for key, weight in first["weights"].items():
            assert torch.equal(weight, second["weights"][key]), key
            assert torch.equal(first["gradients"][key], second["gradients"][key]), key
        if name == "rt_detr_v2":  # only the rank with objects denoises
            assert first["gradients"]["model.model.denoising_class_embed.weight"].any()


def on_object_and_on_ignored(ignore):
    """One object, and one query on it; another query on a region that may be ignored."""
    box, other = [0.25, 0.25, 0.25, 0.25], [0.75, 0.75, 0.25, 0.25]
    logits = torch.tensor([[[2.0, -1.0], [1.0, 0.5]]], requires_grad=True)
    outputs = {"pred_logits": logits, "pred_boxes": torch.tensor([[box, other]])}
    target = {"labels": torch.tensor([0]), "boxes": torch.tensor([box])}
    if ignore is not None:
        target["ignore"] = torch.tensor(ignore)
    losses = DetectionLoss()(outputs, [target])
    losses["loss"].backward()
    return losses, logits.grad[0]


def test_a_query_in_an_ignored_region_is_neither_background_nor_object():
    plain, gradient = on_object_and_on_ignored(None)
    ignored, without = on_object_and_on_ignored([[0.75, 0.75, 0.25, 0.25]])
    away, restored = on_object_and_on_ignored([[0.75, 0.25, 0.25, 0.25]])
    assert (without[1] == 0).all() and (gradient[1] != 0).all()
    torch.testing.assert_close(without[0], gradient[0], rtol=0, atol=0)  # the matched query, and the count of targets
    for name in ("loss_bbox", "loss_giou"):
        assert ignored[name] == plain[name]
    torch.testing.assert_close(restored, gradient, rtol=0, atol=0)
    assert away["loss"] == plain["loss"]
    background = sigmoid_focal_loss(torch.tensor([1.0, 0.5]), torch.zeros(2), alpha=0.25, gamma=2.0, reduction="sum")
    torch.testing.assert_close(plain["loss_ce"] - ignored["loss_ce"], background)


@pytest.mark.parametrize(("width", "ignored"), [(0.5, False), (0.499, True)])
def test_half_an_overlap_is_not_yet_ignored(width, ignored):
    """A region of twice the box's width around it: an IoU of exactly one half counts as background."""
    _, gradient = on_object_and_on_ignored([[0.75, 0.75, width, 0.25]])
    assert bool((gradient[1] == 0).all()) == ignored


def test_an_object_in_an_ignored_region_is_learnt():
    plain, gradient = on_object_and_on_ignored(None)
    inside, with_region = on_object_and_on_ignored([[0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(with_region, gradient, rtol=0, atol=0)
    assert inside["loss"] == plain["loss"]
