"""DETReg: the frozen backbone, the embedding loss, fine-tuning from it (specification T23)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as transforms

from simdetr.detectors import DeformableDETR, DETReg
from simdetr.detectors.detreg import _finest_map, embedding_loss
from simdetr.detectors.matcher import Matches
from simdetr.exchange.parameter_names import to_official
from simdetr.exchange.weights import load_detector, load_weights
from simdetr.recipe import Recipe
from simdetr.training.train import train

CONFIG = Path(__file__).parents[2] / "configs" / "pretrain" / "detreg_r50.yaml"
SMALL = {
    "backbone": "test_resnet",
    "hidden_dim": 32,
    "num_heads": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "ffn_dim": 32,
    "num_queries": 12,
    "num_feature_levels": 3,
}


@pytest.fixture
def make_detreg():
    def make(num_classes=1, **changes):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return DETReg(num_classes, **(SMALL | changes))

    return make


@pytest.fixture
def one_class(batch):
    images, mask, targets = batch
    return images, mask, [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_of_the_original():
    with torch.device("meta"):
        detreg, base = DETReg(91), DeformableDETR(91)
    assert count(detreg) - count(base) == 197_376
    assert set(detreg.state_dict()) - set(base.state_dict()) == {
        f"feature_embed.layers.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")
    }
    assert set(base.state_dict()) <= set(detreg.state_dict())
    assert [layer.out_features for layer in detreg.feature_embed.layers] == [256, 512]
    trainable = {name for name, parameter in detreg.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in detreg.named_parameters() if not name.startswith("backbone.")}


def test_arguments_rebuild_it(make_detreg):
    detector = make_detreg(embedding_weight=2.0, crop_size=32)
    again = DETReg(**detector.init_args)
    again.load_state_dict(detector.state_dict())
    assert (again.embedding_weight, again.crop_size, again.num_classes) == (2.0, 32, 1)
    assert again.init_args == detector.init_args


def test_detects_as_its_base_does(make_detreg, one_class):
    images, mask, _ = one_class
    detector = make_detreg().eval()
    base = DeformableDETR(1, **SMALL).eval()
    base.load_state_dict({name: value for name, value in detector.state_dict().items() if "feature_embed" not in name})
    with torch.no_grad():
        ours, theirs = detector(images, mask), base(images, mask)
    torch.testing.assert_close(ours["pred_boxes"], theirs["pred_boxes"], rtol=0, atol=0)


def test_loss_is_the_mean_distance_of_matched_pairs(make_detreg, one_class):
    """By hand: every box matched by the criterion, its state sent through the head, its crop through the backbone."""
    images, mask, targets = one_class
    detector = make_detreg(dropout=0.0, embedding_weight=3.0)
    terms = detector.losses(images, mask, targets)

    decoded = detector.decode(images, mask)[0]
    outputs = detector.predictions(decoded)
    pairs = detector.criterion.matcher(outputs["pred_logits"], outputs["pred_boxes"], targets)
    predicted = detector.feature_embed(decoded.states[-1])
    wanted = detector.box_embeddings(images, mask, targets)
    distances = [
        (predicted[image, query] - wanted[image][target]).abs()
        for image, (queries, chosen) in enumerate(pairs)
        for query, target in zip(queries.tolist(), chosen.tolist(), strict=True)
    ]
    assert len(distances) == 4
    torch.testing.assert_close(terms["loss_embedding"], torch.stack(distances).mean())
    base = detector.criterion(outputs, targets)
    torch.testing.assert_close(terms["loss"], base["loss"] + 3.0 * terms["loss_embedding"])
    assert set(terms) == {*base, "loss_embedding"}


def test_loss_of_known_embeddings():
    predicted = torch.zeros(2, 3, 4)
    predicted[1, 2] = torch.tensor([1.0, -1.0, 0.0, 2.0])
    wanted = [torch.full((1, 4), 0.5), torch.stack([torch.full((4,), 9.0), torch.tensor([1.0, 1.0, 0.0, 0.0])])]
    matches = Matches(torch.tensor([[0, 1]]), torch.tensor([[0, 2]]), torch.tensor([[0, 1]]))
    # 4 · 0.5 of the first pair, 0 + 2 + 0 + 2 of the second, over 8 numbers
    assert embedding_loss(predicted, wanted, matches).item() == pytest.approx(6 / 8)


def test_targets_are_the_frozen_features_of_the_crop(make_detreg):
    """A box on whole pixels, cut out and resized by other means; the mask says what part of the image is valid."""
    detector = make_detreg(crop_size=64).train()
    images = F.interpolate(torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(0)), size=(96, 128))
    mask = torch.zeros(1, 96, 128, dtype=torch.bool)
    mask[:, 80:], mask[:, :, 100:] = True, True
    left, top, right, bottom = 20, 16, 84, 80  # of 100 x 80 valid pixels
    box = torch.tensor([[(left + right) / 200, (top + bottom) / 160, (right - left) / 100, (bottom - top) / 80]])
    (found,) = detector.box_embeddings(images, mask, [{"labels": torch.zeros(1, dtype=torch.long), "boxes": box}])
    crop = transforms.resized_crop(images, top, left, bottom - top, right - left, [64, 64])
    with torch.no_grad():
        expected = detector.backbone(crop)[0].mean(dim=(2, 3))
    assert found.shape == (1, detector.backbone.channels[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_stopping_early_changes_nothing(make_detreg, backbone):
    detector = make_detreg(backbone=backbone).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(_finest_map(detector.backbone, images), detector.backbone(images)[0])


def test_batch_without_boxes(make_detreg, one_class):
    images, mask, targets = one_class
    empty = [{"labels": target["labels"][:0], "boxes": target["boxes"][:0]} for target in targets]
    detector = make_detreg()
    terms = detector.losses(images, mask, empty)
    assert terms["loss_embedding"].item() == 0 and torch.isfinite(terms["loss"])
    terms["loss"].backward()
    assert [name for name, parameter in detector.named_parameters() if parameter.requires_grad] == [
        name for name, parameter in detector.named_parameters() if parameter.grad is not None
    ]


def test_more_boxes_than_queries(make_detreg, one_class):
    images, mask, targets = one_class
    many = [{"labels": torch.zeros(20, dtype=torch.long), "boxes": torch.rand(20, 4) * 0.3 + 0.3}, targets[1]]
    assert torch.isfinite(make_detreg(crop_size=16).losses(images, mask, many)["loss"])


def test_learns_embeddings_of_a_batch(make_detreg, one_class):
    images, mask, targets = one_class
    detector = make_detreg(dropout=0.0, crop_size=32).train()
    before = copy.deepcopy(detector.backbone.state_dict())
    optimiser = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=1e-3)
    course = []
    for _ in range(40):
        terms = detector.losses(images, mask, targets)
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
        course.append(terms["loss_embedding"].item())
    assert course[-1] < 0.5 * course[0]
    after = detector.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("changes", [{"num_feature_levels": 1}, {"backbone": "test_vit"}])
def test_needs_a_frozen_map_of_stride_8(make_detreg, changes):
    with pytest.raises(ValueError, match="own map of stride 8: expected"):
        make_detreg(**changes)


def test_two_steps_of_its_config_leave_the_backbone_alone(scenes, learned_backbone, tmp_path):
    """Every parameter and buffer of the backbone, bit by bit; a detector of other classes then starts from the rest."""
    options = [f"--model.detector.init_args.{name}={value}" for name, value in SMALL.items()]
    options += [f"--data.num_queries={SMALL['num_queries']}"]
    options += ["--data.batch_size=2", "--data.num_workers=0", "--data.short_sides=[64]", "--data.max_side=80"]
    options += ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    options += [f"--model.backbone_weights={learned_backbone}"]
    data = [f"--data.images={scenes}", f"--data.labels={scenes / 'instances.json'}"]
    cli = Recipe((str(CONFIG),), (*data, *options)).training(tmp_path)
    before = copy.deepcopy(cli.model.detector.state_dict())
    train(cli, tmp_path)
    assert cli.trainer.global_step == 2
    loaded = load_detector(tmp_path / "detector").detector
    assert isinstance(loaded, DETReg)
    after = loaded.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if name.startswith("backbone.")]
    assert {"feature_embed.layers.1.weight", "class_embed.0.bias", "transformer.level_embed"} <= changed

    recipe = Recipe((), tuple(data)).starting_from(tmp_path / "detector", tmp_path / "tuned")
    described = recipe.resolved()[0].model.detector
    assert described.class_path == "simdetr.detectors.deformable_detr.DeformableDETR"
    assert (described.init_args.backbone, described.init_args.freeze_backbone) == (SMALL["backbone"], False)

    finetuned = DeformableDETR(loaded.num_classes + 2, **SMALL)
    report = load_weights(finetuned, tmp_path / "detector")
    heads = [f"class_embed.{layer}.{kind}" for layer in range(2) for kind in ("weight", "bias")]
    assert set() < set(report.replaced) <= set(heads)
    assert report.missing == []
    assert {name.split(".")[0] for name in report.unexpected} == {"feature_embed"} and len(report.unexpected) == 4
    assert set(report.kept) == set(finetuned.state_dict()) - set(heads)
    state = finetuned.state_dict()
    assert all(torch.equal(state[name], after[name]) for name in report.kept)


def test_checkpoints_of_the_original_fit(make_detreg, tmp_path):
    """Names of the original's files, whose classes are numbered by COCO's ids."""
    source = make_detreg(91)
    torch.save({"model": to_official(source.state_dict())}, tmp_path / "detreg.pth")
    same = load_weights(make_detreg(91), tmp_path / "detreg.pth")
    assert same.source == "DETReg" and same.replaced == same.missing == same.unexpected == []
    other = make_detreg(1)
    report = load_weights(other, tmp_path / "detreg.pth")
    assert {name.split(".")[0] for name in report.replaced} == {"class_embed"} and report.unexpected == []
    assert torch.equal(other.feature_embed.layers[1].weight, source.feature_embed.layers[1].weight)
