"""What all detectors of other libraries have in common: losses that fall, empty batches, gradients of everything."""

import copy
import socket

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from simdetr.data.pretrained_weights import load_into
from simdetr.detectors.losses import in_graph, valid_sizes
from simdetr.detectors.predictions import postprocess
from simdetr.exchange.weights import build_detector

TRANSFORMERS = ("deformable_detr", "conditional_detr", "detr", "rt_detr_v2", "d_fine")
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
def test_a_rank_without_objects(config_of_other, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    configs = {name: config_of_other(name) for name in ("rt_detr_v2", "fcos")}
    mp.spawn(train_rank, (port, str(tmp_path), configs), nprocs=2)
    for name in configs:
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in range(2))
        for key, weight in first["weights"].items():
            assert torch.equal(weight, second["weights"][key]), key
            assert torch.equal(first["gradients"][key], second["gradients"][key]), key
        if name == "rt_detr_v2":  # only the rank with objects denoises
            assert first["gradients"]["model.model.denoising_class_embed.weight"].any()
