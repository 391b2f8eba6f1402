"""Every objective learns on every kind of backbone; the dense one knows where its cells are."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import default_collate

from simdetr.encoder_training.crops import CropWithPlaces
from simdetr.encoder_training.objectives import (
    OBJECTIVES,
    LearningEncoder,
    MissingExtraError,
    Objective,
    build_objective,
    make_crops,
    pooled,
    timm_weights,
)
from simdetr.mining.encoders import TimmEncoder

SMALL = {
    "vicreg": {"hidden_dim": 32, "output_dim": 32},
    "dino": {"hidden_dim": 32, "bottleneck_dim": 16, "output_dim": 24},
    "vicregl": {"hidden_dim": 32, "output_dim": 32, "local_dim": 16},
}
VIEWS = {"dino": {"n_local_views": 2}}


def picture(seed: int, size: tuple[int, int] = (80, 64)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(params=sorted(OBJECTIVES))
def name(request):
    return request.param


def batch_of(objective: Objective, name: str, images: int = 4) -> list[torch.Tensor]:
    crops = make_crops(objective, 64, VIEWS.get(name, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return default_collate([crops(picture(seed)) for seed in range(images)])


def test_every_objective_is_tested():
    assert OBJECTIVES.keys() == SMALL.keys()


@pytest.mark.parametrize("model", ["resnet18", "test_convnext", "test_vit"])
def test_one_step_lowers_the_loss_of_its_batch(name, model):
    encoder = LearningEncoder(model, seed=0)
    objective = build_objective(name, encoder, SMALL[name])
    batch = batch_of(objective, name)
    centre = {key: value.clone() for key, value in objective.state_dict().items() if key == "loss.center"}
    loss = objective(encoder, batch)
    assert loss.shape == ()
    loss.backward()
    learning = [p for p in (*encoder.parameters(), *objective.parameters()) if p.grad is not None]
    slope = sum(float(p.grad.square().sum()) for p in learning)
    with torch.no_grad():
        for p in learning:  # so far that the slope promises 1 % less
            p -= 0.01 * loss.item() / slope * p.grad
        objective.load_state_dict(centre, strict=False)  # DINO's has moved with the first batch
        lower = objective(encoder, batch)
    assert 0.985 < lower.item() / loss.item() < 0.995
    assert sum(float(p.grad.square().sum()) for p in encoder.parameters() if p.grad is not None) > 0


def test_same_seed_same_heads(name):
    encoder = LearningEncoder("test_resnet")
    first, same, other = (build_objective(name, encoder, SMALL[name], seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_views_are_images_in_0_to_1_of_the_wanted_size(name):
    objective = build_objective(name, LearningEncoder("test_resnet"), SMALL[name])
    images = [view for view in batch_of(objective, name) if view.shape[1] == 3]
    assert [tuple(view.shape) for view in images[:2]] == [(4, 3, 64, 64)] * 2
    assert all(0 <= float(view.min()) < float(view.max()) <= 1 for view in images)
    assert len(images) == (4 if name == "dino" else 2)


@pytest.mark.parametrize("seed", range(6))
def test_places_are_where_the_cells_were(seed):
    """An image that shows its own coordinates: what a cell shows is where it was, mirrored or not."""
    x, y = np.meshgrid(np.arange(200), np.arange(150))
    image = Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        view, places = CropWithPlaces(64, 8, (0.3, 1.0))(image)
    shown = torch.from_numpy(np.array(view, dtype=np.float32))[..., :2].view(8, 8, 8, 8, 2).mean(dim=(1, 3))
    assert (shown + 0.5 - places).abs().max() < 1.5  # a pixel's number is its left edge; eight bits; edges of the image
    assert view.size == (64, 64)


def test_dense_objective_uses_places_and_both_maps():
    encoder = LearningEncoder("test_resnet").eval()
    both = build_objective("vicregl", encoder, SMALL["vicregl"])
    batch = batch_of(both, "vicregl")
    shuffled = [*batch[:2], *(places.flip(1) for places in batch[2:3]), *batch[3:]]
    with torch.no_grad():
        assert float(both(encoder, batch)) != float(both(encoder, shuffled))
    coarse = build_objective("vicregl", encoder, SMALL["vicregl"] | {"strides": [32]})
    assert set(coarse.cell_heads) == {"32"} and set(both.cell_heads) == {"16", "32"}
    assert batch_of(coarse, "vicregl")[2].shape == (4, 2, 2, 2) and batch[2].shape == (4, 4, 4, 2)
    with pytest.raises(ValueError, match=r"strides: expected some of \[16, 32\], got \[8\]"):
        build_objective("vicregl", encoder, {"strides": [8]})


def test_teacher_follows_the_student_and_is_what_is_kept():
    encoder = LearningEncoder("test_resnet")
    objective = build_objective("dino", encoder, SMALL["dino"] | {"momentum": 0.9})
    assert objective.learnt(encoder) is objective.teacher
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    weight, kept = next(encoder.parameters()), next(objective.teacher.parameters())
    start = kept.detach().clone()
    with torch.no_grad():
        weight += 1
    objective.before_step(encoder, progress=0.5)  # half way along the cosine: 0.95
    assert torch.allclose(kept, start + 0.05, atol=1e-6)
    before = kept.clone()
    objective.before_step(encoder, progress=1.0)
    assert torch.equal(kept, before)


def test_pooled_is_the_mean_of_the_last_map():
    maps = {16: torch.ones(1, 2, 4, 4), 32: torch.arange(8.0).view(1, 2, 2, 2)}
    assert pooled(maps).tolist() == [[1.5, 5.5]]


def test_an_objective_of_ones_own_by_class_path(tmp_path, monkeypatch):
    (tmp_path / "own_objective.py").write_text(
        "from simdetr.encoder_training.objectives import Objective, pooled\n"
        "class Flat(Objective):\n"
        "    def __init__(self, encoder, scale):\n"
        "        super().__init__()\n"
        "        self.scale = scale\n"
        "    def crops(self, image_size, views):\n"
        "        return lambda image: [image, image]\n"
        "    def forward(self, encoder, views):\n"
        "        return self.scale * pooled(encoder(views[0])).square().mean()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    encoder = LearningEncoder("test_resnet")
    objective = build_objective("own_objective.Flat", encoder, {"scale": 2.0})
    assert math.isfinite(objective(encoder, [torch.rand(2, 3, 64, 64)]).item())
    assert objective.learnt(encoder) is encoder


def test_an_unfinished_objective_is_told_what_it_lacks(tmp_path, monkeypatch):
    (tmp_path / "half_objective.py").write_text(
        "from simdetr.encoder_training.objectives import Objective\n"
        "class Half(Objective):\n"
        "    def forward(self, encoder, views):\n"
        "        return 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"half_objective\.Half lacks crops; define it there"):
        build_objective("half_objective.Half", LearningEncoder("test_resnet"), {})


@pytest.mark.parametrize(
    ("chosen", "arguments", "message"),
    [
        ("simclr", {}, "objective: expected vicreg, dino, vicregl or the class path of an Objective, got 'simclr'"),
        ("no.such.Module", {}, "objective: cannot import no.such"),
        ("torch.nn.Linear", {}, "class path of an Objective"),
        ("vicreg", {"hidden": 3}, "objective_args: vicreg does not take them.*hidden"),
    ],
)
def test_bad_choices_are_named(chosen, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_objective(chosen, LearningEncoder("test_resnet"), arguments)


def test_bad_views_are_named(name):
    objective = build_objective(name, LearningEncoder("test_resnet"), SMALL[name])
    with pytest.raises(ValueError, match=r"views: lightly's transform does not take.*blue"):
        make_crops(objective, 64, {"blue": 1})


def test_missing_lightly_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"pip install 'simdetr\[ssl\]'"):
        build_objective("vicreg", LearningEncoder("test_resnet"), {})


# ----------------------------------------------------------------------------------------------------------------------
# A learning backbone gives the maps that mining will see, and its weights go back under timm's names.


MODELS = ("test_resnet", "test_convnext", "test_vit", "test_efficientnet")


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_those_of_timms_plain_model_and_give_the_same_maps(model, tmp_path):
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    encoder = LearningEncoder(model, seed=3)
    encoder(images)  # moves the statistics of batch norms away from their start
    weights = timm_weights(encoder)
    left_over = timm.create_model(model, num_classes=0).load_state_dict(weights, strict=False).unexpected_keys
    assert left_over == []
    save_file(weights, tmp_path / "weights.safetensors")
    frozen = TimmEncoder(model, weights=tmp_path / "weights.safetensors", seed=4)
    expected = encoder.eval()(images)
    for stride, level in frozen(images).items():
        torch.testing.assert_close(level, expected[stride])  # mining takes images one by one
        assert level.shape[1] == encoder.channels[stride]


def test_learns_and_follows_the_images():
    encoder = LearningEncoder("test_resnet")
    assert encoder.training and encoder.net.training
    encoder(torch.rand(2, 3, 64, 64))[32].square().mean().backward()
    assert all(p.grad is not None for name, p in encoder.named_parameters())
    assert not encoder.eval().net.training


def test_starts_from_given_weights(tmp_path):
    weights = timm_weights(LearningEncoder("test_resnet", seed=1))
    save_file(weights, tmp_path / "w.safetensors")
    started = timm_weights(LearningEncoder("test_resnet", weights=str(tmp_path / "w.safetensors"), seed=2))
    assert all(torch.equal(started[name], weights[name]) for name in weights)


def test_keeping_weights_draws_no_random_numbers():
    encoder = LearningEncoder("test_resnet")
    before = torch.get_rng_state()
    timm_weights(encoder)
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_model_names_the_nearest():
    with pytest.raises(
        ValueError, match=r"model: expected the name of a timm model, got 'resnet19'; did you mean resn"
    ):
        LearningEncoder("resnet19")
    with pytest.raises(ValueError, match="list_models"):
        LearningEncoder("0000000")
