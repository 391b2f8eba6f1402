"""Spatial pyramids: pools by brute force, internal layers, taps, vectors of images and objects, on a detector."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from simdetr.boxes import cxcywh_to_xyxy
from simdetr.detectors.detector import FeatureSizes, Level
from simdetr.heads import HeadedBackbone, HeadedDetector
from simdetr.heads.spatial_pyramid import (
    SpatialPyramid,
    SpatialPyramidNeck,
    image_vectors,
    object_vectors,
    object_windows,
)

FORMS = ["same_size", "bins"]


def pyramid(channels=3, **options):
    torch.manual_seed(0)
    return SpatialPyramid(channels, **options)


@pytest.fixture
def features():
    return torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def padding():
    padding = torch.zeros(2, 8, 9, dtype=torch.bool)
    padding[1, 6:] = True
    padding[1, :, 5:] = True
    return padding


# ----------------------------------------------------------------------------------------------------------------------
# The layers.


def test_pools_are_maxima_around_each_cell_without_padding(features, padding):
    layers = pyramid(sizes=[3, 5]).layers(features, padding)
    assert torch.equal(layers["in"], features.masked_fill(padding[:, None], 0))
    for size in (3, 5):
        for image, row, column in [(0, 0, 0), (0, 4, 8), (1, 5, 4), (1, 0, 2), (1, 3, 3)]:
            rows, columns = 6 if image else 8, 5 if image else 9
            reach = size // 2
            window = features[
                image,
                :,
                max(0, row - reach) : min(rows, row + reach + 1),
                max(0, column - reach) : min(columns, column + reach + 1),
            ]
            assert torch.equal(layers[f"pool_{size}"][image, :, row, column], window.amax(dim=(1, 2)))
        assert not layers[f"pool_{size}"].masked_select(padding[:, None]).any()
    assert torch.equal(layers["concat"], torch.cat([layers[name] for name in ("in", "pool_3", "pool_5")], dim=1))


def test_one_bin_is_the_global_maximum(features, padding):
    found = pyramid(form="bins", sizes=[1], taps=["out"])(features, padding)
    valid = features.masked_fill(padding[:, None], -torch.inf)
    assert torch.equal(found, valid.amax(dim=(2, 3)))


def test_plain_bins_have_21_times_the_channels(features):
    plain = pyramid(form="bins", taps=["out"])
    found = plain(features)
    assert found.shape == (2, 21 * 3) and plain.out_channels == 63
    wanted = [F.adaptive_max_pool2d(features, k).flatten(1) for k in (1, 2, 4)]
    assert torch.equal(found, torch.cat(wanted, dim=1))
    assert plain.layer_channels == {"in": 3, "pool_1": 3, "pool_2": 12, "pool_4": 48, "concat": 63, "out": 63}


def test_permuting_pixels_within_a_bin_changes_nothing():
    features = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    permuted = features.clone()
    permuted[:, :, 2:4, 4:6] = permuted[:, :, 2:4, 4:6].flip(2, 3)
    moved = features.clone()
    moved[:, :, 2:4, 4:6] = moved[:, :, 2:4, 4:6] + 9
    plain = pyramid(form="bins", taps=["out"])
    assert torch.equal(plain(features), plain(permuted)) and not torch.equal(plain(features), plain(moved))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("combine", ["sum", "concat"])
def test_a_constant_map_gives_a_constant(form, combine, padding):
    values = torch.tensor([1.5, -2.0, 0.5]).view(1, 3, 1, 1).expand(2, 3, 8, 9)
    found = pyramid(form=form, combine=combine)(values, padding)
    if form == "bins":
        torch.testing.assert_close(found[0], found[1])
        layers = pyramid(form="bins").layers(values, padding)
        torch.testing.assert_close(layers["pool_2"][0, :, 0, 0], values[0, :, 0, 0].repeat_interleave(4))
    else:
        torch.testing.assert_close(found[0], found[0, :, :1, :1].expand(3, 8, 9))
        torch.testing.assert_close(found[1, :, :6, :5], found[0, :, :6, :5])


@pytest.mark.parametrize("form", FORMS)
def test_padding_says_nothing(form, features, padding):
    found = [
        pyramid(form=form, dim=4)(features.masked_fill(padding[:, None], value), padding) for value in (0.0, 1e4, -1e4)
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    alone = pyramid(form=form, dim=4)(features[1:, :, :6, :5])
    torch.testing.assert_close(found[0][1:] if form == "bins" else found[0][1:, :, :6, :5], alone)


# ----------------------------------------------------------------------------------------------------------------------
# The taps.


@pytest.mark.parametrize("combine", ["sum", "concat"])
def test_out_alone_is_plain_pooling(features, combine):
    plain = pyramid(dim=5, taps=["out"], combine=combine)
    layers = plain.layers(features)
    assert torch.equal(plain(features), plain.out(layers["concat"])) and not len(plain.convolve) and plain.join is None


def test_taps_are_convolved_and_added(features, padding):
    tapped = pyramid(dim=4, taps=["pool_9", "in", "out"])
    assert tapped.taps == ("in", "pool_9", "out") and set(tapped.convolve) == {"to_in", "to_pool_9"}
    layers = tapped.layers(features, padding)
    wanted = tapped.convolve["to_in"](layers["in"]) + tapped.convolve["to_pool_9"](layers["pool_9"]) + layers["out"]
    torch.testing.assert_close(tapped(features, padding), wanted.masked_fill(padding[:, None], 0))


def test_taps_are_concatenated_and_convolved(features):
    tapped = pyramid(dim=4, form="bins", combine="concat")
    assert tapped.taps == ("in", "pool_1", "pool_2", "pool_4", "out") and tapped.join.in_channels == 20
    layers = tapped.layers(features)
    parts = [tapped.convolve[f"to_{name}"](layers[name]) for name in tapped.taps]
    torch.testing.assert_close(tapped(features), tapped.join(torch.cat(parts, dim=1)).flatten(1))


@pytest.mark.parametrize("form", FORMS)
def test_every_tap_changes_what_comes_out_and_learns(form, features):
    names = ["in", *(f"pool_{k}" for k in ((5, 9, 13) if form == "same_size" else (1, 2, 4))), "concat", "out"]
    whole = pyramid(form=form, taps=names)
    found = whole(features)
    for left_out in names:
        fewer = SpatialPyramid(3, form=form, taps=[name for name in names if name != left_out])
        fewer.load_state_dict({n: p for n, p in whole.state_dict().items() if n in fewer.state_dict()})
        assert not torch.allclose(fewer(features), found), left_out
    found.square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in whole.parameters())


@pytest.mark.parametrize("combine", ["sum", "concat"])
def test_starts_at_zero_and_learns(features, combine):
    tapped = pyramid(starts_at_zero=True, combine=combine)
    found = tapped(features)
    assert not found.any()
    found.sum().backward()
    assert any(float(p.grad.abs().sum()) > 0 for p in tapped.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"taps": []}, r"taps: expected some of 'in', 'pool_5', 'pool_9', 'pool_13', 'concat', 'out', got none"),
        ({"taps": ["in", "pool_7"]}, r"taps: expected some of 'in', .*'out', got 'pool_7'"),
        ({"form": "round"}, r"form: expected one of 'same_size', 'bins', got 'round'"),
        ({"combine": "mean"}, r"combine: expected one of 'sum', 'concat', got 'mean'"),
        ({"sizes": [4]}, r"sizes: expected odd numbers for 'same_size', got \[4\]"),
        ({"sizes": []}, r"sizes: expected different numbers of at least 1, got \[\]"),
        ({"sizes": [3, 3]}, r"sizes: expected different numbers of at least 1, got \[3, 3\]"),
        ({"form": "bins", "sizes": [0]}, r"sizes: expected different numbers of at least 1, got \[0\]"),
        ({"dim": 0}, r"dim must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        SpatialPyramid(3, **options)


def test_wrong_features_are_named(features, padding):
    with pytest.raises(ValueError, match=r"features: expected \[B, 3, h, w\], got \[2, 4, 8, 9\]"):
        pyramid()(torch.zeros(2, 4, 8, 9))
    with pytest.raises(
        ValueError, match=r"expected at least 4 x 4 cells for as many bins, got a map with only 3 in a row"
    ):
        pyramid(form="bins")(features[:, :, :3])
    padding[1, :, 3:] = True
    with pytest.raises(ValueError, match=r"got a map with only 3 in a row"):
        pyramid(form="bins")(features, padding)
    features[1, 2, 0, 4] = torch.inf
    with pytest.raises(ValueError, match=r"features: expected finite values, got inf at index \(1, 2, 0, 4\)"):
        pyramid()(features)


# ----------------------------------------------------------------------------------------------------------------------
# Vectors.


def test_image_vectors_are_means_of_the_valid_part(features, padding):
    found = image_vectors(features.masked_fill(padding[:, None], 1e4), padding)
    torch.testing.assert_close(found[0], features[0].mean(dim=(1, 2)))
    torch.testing.assert_close(found[1], features[1, :, :6, :5].mean(dim=(1, 2)))


def test_object_vectors_see_their_box_and_no_padding(features, padding):
    """A ramp's mean over a box is its value in the box's centre, and a constant's is the constant at any border."""
    ramp = torch.arange(9.0).expand(2, 1, 8, 9) + 0.5
    boxes = [torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.4, 0.3, 0.3]]), torch.tensor([[0.5, 0.5, 0.4, 0.4]])]
    found = object_vectors(ramp.masked_fill(padding[:, None], 1e4), padding, boxes)
    torch.testing.assert_close(found[:, 0], torch.tensor([4.5, 2.7, 2.5]))
    whole = [torch.tensor([[0.5, 0.5, 1.0, 1.0]])] * 2
    filled = torch.full((2, 1, 8, 9), 3.0).masked_fill(padding[:, None], 1e4)
    torch.testing.assert_close(object_vectors(filled, padding, whole), torch.full((2, 1), 3.0))
    assert object_vectors(features, padding, [torch.zeros(0, 4)] * 2).shape == (0, 3)


def test_objects_are_pooled_into_bins_of_their_windows(features, padding):
    boxes = [torch.tensor([[0.5, 0.5, 0.6, 0.8]]), torch.tensor([[0.4, 0.4, 0.6, 0.6]])]
    vectors = pyramid(form="bins", dim=6)(object_windows(features, padding, boxes))
    assert vectors.shape == (2, 6) and cxcywh_to_xyxy(boxes[0]).shape == (1, 4)


# ----------------------------------------------------------------------------------------------------------------------
# On a detector.


@pytest.mark.parametrize("kind", ["detr", "two-stage", "vidt"])
def test_on_a_detector_nothing_changes_at_the_start(kind, parts, batch):
    torch.manual_seed(0)
    headed = HeadedDetector(3, SpatialPyramidNeck, parts.DETECTORS[kind]).eval()
    images, mask, _ = batch
    with torch.no_grad():
        both, own = headed(images, mask), headed.detector(images, mask)
    assert both.keys() == own.keys()
    assert torch.equal(both["pred_logits"], own["pred_logits"]) and torch.equal(both["pred_boxes"], own["pred_boxes"])
    headed.train()
    losses = headed.losses(*batch)
    torch.testing.assert_close(losses["loss"], headed.detector.losses(*batch)["loss"])
    losses["loss"].backward()
    assert all(p.grad is not None for p in headed.head.parameters())
    assert sum(float(p.grad.abs().sum()) for p in headed.head.parameters()) > 0


def test_taps_of_chosen_levels_can_be_looked_at(parts, batch):
    headed = HeadedDetector(
        3, lambda sizes: SpatialPyramidNeck(sizes, levels=[0, 2], pools=[3]), parts.DETECTORS["detr"]
    )
    _, features = headed.eval().read(*batch[:2])
    assert features.taps[1] is None
    assert list(features.taps[0]) == list(features.taps[2]) == ["in", "pool_3", "concat", "out"]


def test_without_residual_it_takes_the_features_place():
    neck = SpatialPyramidNeck(FeatureSizes(2, (8, 6), (8, 16), 6, 2), residual=False, taps=["in", "pool_5"])
    level = Level(torch.randn(1, 6, 4, 4), 16, torch.zeros(1, 4, 4, dtype=torch.bool))
    changed, layers = neck.pass_level(1, level)
    assert torch.equal(changed, neck.pyramids[0](level.features, level.mask)) and set(layers) >= {"in", "pool_5"}
    untouched, nothing = neck.pass_level(0, level)
    assert untouched is level.features and nothing is None


def test_options_come_back_and_a_backbone_alone_is_refused():
    sizes = FeatureSizes(2, (8, 6), (8, 16), 6, 2)
    neck = SpatialPyramidNeck(sizes, levels=[1], pools=[3], taps=["in", "pool_3"], combine="concat", residual=False)
    again = SpatialPyramidNeck(sizes, **neck.init_args)
    assert again.init_args == neck.init_args and again.state_dict().keys() == neck.state_dict().keys()
    with pytest.raises(
        ValueError, match=r"SpatialPyramidNeck reads the queries of a decoder, but a backbone alone has none"
    ):
        HeadedBackbone(2, SpatialPyramidNeck, "test_resnet", frozen_batch_norm=False)
    with pytest.raises(ValueError, match=r"levels: expected ascending levels among 0 to 1, got \[2\]"):
        SpatialPyramidNeck(sizes, levels=[2])
