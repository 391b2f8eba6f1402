"""Several heads on one detector: each reads its own notes, necks follow one another, losses and predictions add up."""

from __future__ import annotations

import pytest
import torch

from simdetr.exchange.weights import checkpoint_config, load_detector, save_detector
from simdetr.heads import (
    DomainAdversary,
    HeadedDetector,
    HeadStack,
    LandmarkHead,
    LocationPrior,
    SpatialPyramidNeck,
)

SMALL = {"image_hidden": 8, "object_hidden": 8, "dropout": 0.0}


def stacked(parts, *heads, kind="refined"):
    torch.manual_seed(0)
    return HeadedDetector(3, lambda sizes: HeadStack(sizes, heads), parts.DETECTORS[kind])


def adversary(sizes):
    return DomainAdversary(sizes, **SMALL)


@pytest.fixture
def mixed(batch):
    """The batch, and its images once more as unlabelled ones."""
    images, mask, targets = batch
    nothing = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4), "labelled": False}
    return torch.cat([images, 0.5 * images]), torch.cat([mask, mask]), [*targets, nothing, nothing]


@pytest.mark.parametrize("kind", ["detr", "two-stage", "vidt"])
def test_the_three_parts_train_together(parts, mixed, kind):
    headed = stacked(parts, LocationPrior, SpatialPyramidNeck, adversary, kind=kind).train()
    assert headed.takes_unlabelled and headed.undecayed_names == ("head.heads.0.prior",)
    headed.set_progress(0.5)
    assert headed.head.parts[2].scale == pytest.approx(0.0986614, abs=1e-6)
    losses = headed.losses(*mixed)
    assert {"heads_location_objectness", "heads_domain_image", "heads_domain_object_accuracy"} <= losses.keys()
    alarms = headed.alarms([{"loss": 1.0, "heads_domain_image_accuracy": 0.01, "heads_location_image_accuracy": 0.0}])
    assert len(alarms) == 1 and "of images is right on 1.0% only" in alarms[0]
    losses["loss"].backward()
    assert not [name for name, p in headed.named_parameters() if p.requires_grad and p.grad is None]


def test_losses_and_predictions_are_those_of_the_heads_alone(parts, batch):
    headed, alone = stacked(parts, LocationPrior), HeadedDetector(3, LocationPrior, parts.DETECTORS["refined"])
    alone.load_state_dict({name.replace("heads.0.", ""): value for name, value in headed.state_dict().items()})
    for detector in (headed, alone):
        detector.train()
    torch.testing.assert_close(headed.losses(*batch)["loss"], alone.losses(*batch)["loss"])
    with torch.no_grad():
        one, other = headed.eval()(*batch[:2]), alone.eval()(*batch[:2])
    assert torch.equal(one["pred_logits"], other["pred_logits"])


def test_necks_follow_one_another(parts, batch):
    headed = stacked(parts, lambda s: LocationPrior(s, levels=[2]), SpatialPyramidNeck).eval()
    torch.nn.init.normal_(headed.head.parts[0].prior)
    with torch.no_grad():
        _, features = headed.read(*batch[:2])
    location, layers = features.taps[2]
    moved = headed.head.parts[0].to_features[0](location.prior[:, None])
    torch.testing.assert_close(
        layers["in"], features.levels[2].features.masked_fill(features.levels[2].mask[:, None], 0)
    )
    assert moved.any() and features.taps[0] == [None, None]


def test_options_come_back_and_files_keep_what_predicts(parts, batch, tmp_path):
    headed = stacked(parts, LocationPrior, adversary).eval()
    save_detector(headed, checkpoint_config(headed, None), tmp_path)
    loaded = load_detector(tmp_path).detector
    assert [type(part) for part in loaded.head.parts] == [LocationPrior] and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(*batch[:2])["pred_logits"], headed(*batch[:2])["pred_logits"])
    again = HeadedDetector.from_init_args(headed.init_args)
    assert [type(part) for part in again.head.parts] == [LocationPrior, DomainAdversary]
    only = stacked(parts, adversary)
    assert only.deployed is only.detector
    kept = stacked(parts, LocationPrior)
    assert kept.deployed is kept


def test_a_head_that_takes_unlabelled_images_for_background_keeps_them_out(parts):
    headed = stacked(parts, LandmarkHead, adversary)
    assert not headed.takes_unlabelled


def test_wrong_heads_are_named(parts):
    with pytest.raises(ValueError, match=r"heads: expected one or more, each of its own kind, got \[\]"):
        stacked(parts)
    with pytest.raises(ValueError, match=r"each of its own kind, got \['location', 'location'\]"):
        stacked(parts, LocationPrior, LocationPrior)
