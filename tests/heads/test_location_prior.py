"""The location map: what it adds, where it lies under crops and mirrors, what it learns, how it ranks."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from simdetr.detectors.detector import Features, FeatureSizes, Level, Queries
from simdetr.heads import HeadedBackbone, HeadedDetector
from simdetr.heads.location_prior import (
    LocationPrior,
    box_coverage,
    objectness_at,
    objectness_loss,
    prior_at_cells,
    ranked_logits,
    sample_windows,
)
from simdetr.training.optimisation import parameter_groups

SIZES = FeatureSizes(2, (8, 6), (8, 16))


def level(features, padding=None):
    padding = torch.zeros(len(features), *features.shape[2:], dtype=torch.bool) if padding is None else padding
    return Level(features, 8, padding)


def passed(head, levels, targets=None, queries=None):
    """Features as the head, a neck, leaves them."""
    if not head.is_neck:
        return Features(levels, queries, [])
    changed, taps = zip(*(head.neck(targets)(index, found) for index, found in enumerate(levels)), strict=True)
    return Features([a._replace(features=b) for a, b in zip(levels, changed, strict=True)], queries, list(taps))


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    padding = torch.zeros(2, 6, 8, dtype=torch.bool)
    padding[1, :, 5:] = True
    padding[1, 4:] = True
    fine = level(torch.randn(2, 8, 6, 8, generator=generator), padding)
    return [fine, level(torch.randn(2, 6, 3, 4, generator=generator), padding[:, ::2, ::2])]


@pytest.fixture
def targets():
    return [
        {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.25, 0.5, 0.5, 0.6]])},
        {"labels": torch.tensor([], dtype=torch.int64), "boxes": torch.zeros(0, 4)},
    ]


def head_of(**options):
    torch.manual_seed(0)
    return LocationPrior(SIZES, **options)


# ----------------------------------------------------------------------------------------------------------------------
# At the start nothing changes, and R learns from the first step on.


def test_at_the_start_all_is_as_without_the_map(maps):
    head, plain = head_of(), head_of(with_map=False)
    plain.load_state_dict({name: value for name, value in head.state_dict().items() if name.startswith("objectness")})
    with_map, without = passed(head, maps), passed(plain, maps)
    for one, other, given in zip(with_map.levels, without.levels, maps, strict=True):
        assert torch.equal(one.features, given.features) and torch.equal(other.features, given.features)
    for one, other in zip(head(with_map), plain(without), strict=True):
        assert torch.equal(one, other)
    assert not plain.is_neck and plain.prior is None and head.prior.shape == (1, 1, 10, 10)
    assert not head.prior_map.any()


@pytest.mark.parametrize("loss", ["focal", "bce"])
def test_the_map_has_a_gradient_at_the_first_step_and_its_convolutions_have_none(maps, targets, loss):
    head = head_of(loss=loss)
    features = passed(head, maps, targets)
    found = head.losses(head(features), features, targets)
    found.total.backward()
    assert float(head.prior.grad.abs().sum()) > 0
    assert all(float(part.weight.grad.abs().sum()) == 0 for part in head.to_objectness)
    assert float(found.diagnostics["map_norm"]) == 0 and found.terms["objectness"].requires_grad is False


def test_the_map_is_added_to_objectness_and_features(maps):
    head = head_of()
    with torch.no_grad():
        head.prior.copy_(torch.arange(100.0).view(1, 1, 10, 10))
    changed, tap = head.pass_level(0, maps[0])
    shown = prior_at_cells(head.prior, maps[0].mask, None)
    torch.testing.assert_close(changed, maps[0].features + head.to_features[0](shown))
    plain = head.objectness[0](maps[0].features.masked_fill(maps[0].mask[:, None], 0))
    torch.testing.assert_close(tap.objectness, (plain + shown)[:, 0])
    torch.testing.assert_close(tap.prior, shown[:, 0])
    assert torch.equal(head.prior_map, head.prior.detach()[0, 0])


def test_padding_says_nothing(maps, targets):
    head = head_of(kernel_size=3)
    torch.nn.init.normal_(head.prior)
    found = []
    for value in (0.0, 1e4):
        filled = [a._replace(features=a.features.masked_fill(a.mask[:, None], value)) for a in maps]
        features = passed(head, filled)
        found.append(head.losses(head(features), features, targets).total)
        found.append(head.heat_map(head(features), features))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


# ----------------------------------------------------------------------------------------------------------------------
# Where it lies.


@pytest.mark.parametrize("shape", [(7, 13), (20, 24), (10, 10)])
def test_resize_is_bilinear_over_the_valid_image(shape):
    prior = torch.randn(1, 1, 10, 10, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, shape[0] + 3, shape[1] + 2, dtype=torch.bool)
    mask[:, : shape[0], : shape[1]] = False
    found = prior_at_cells(prior, mask, None)[:, :, : shape[0], : shape[1]]
    wanted = F.interpolate(prior, shape, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, wanted.expand(2, -1, -1, -1), atol=1e-5, rtol=1e-5)


def test_crop_takes_the_first_rows_and_columns():
    prior = torch.arange(100.0).view(1, 1, 10, 10)
    mask = torch.zeros(1, 4, 7, dtype=torch.bool)
    assert torch.equal(prior_at_cells(prior, mask, None, "crop")[0, 0], prior[0, 0, :4, :7])
    mirrored = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    assert torch.equal(prior_at_cells(prior, mask, mirrored, "crop")[0, 0], prior[0, 0, :4, :7].flip(1))
    right_half = torch.tensor([[0.5, 0.0, 1.0, 1.0]])  # four of eight columns
    found = prior_at_cells(prior, torch.zeros(1, 4, 4, dtype=torch.bool), right_half, "crop")
    assert torch.equal(found[0, 0], prior[0, 0, :4, 4:8])


def test_crop_of_a_larger_map_names_resize():
    with pytest.raises(
        ValueError, match=r"fit: expected a map of at most 10 x 10 cells for 'crop', got 4 x 11.*'resize'"
    ):
        prior_at_cells(torch.zeros(1, 1, 10, 10), torch.zeros(1, 4, 11, dtype=torch.bool), None, "crop")


def test_a_mirrored_or_cut_sample_reads_its_own_part():
    prior = torch.randn(1, 1, 10, 10, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(4, 20, 20, dtype=torch.bool)
    whole = prior_at_cells(prior, mask[:1], None)[0, 0]
    windows = torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 1], [0.5, 0, 1, 0.5], [torch.nan] * 4])
    mirrored, same, corner, mosaic = prior_at_cells(prior, mask, windows)[:, 0]
    torch.testing.assert_close(mirrored, whole.flip(1))
    torch.testing.assert_close(same, whole)
    assert not mosaic.any()
    doubled = prior_at_cells(prior, torch.zeros(1, 40, 40, dtype=torch.bool), None)[0, 0]
    torch.testing.assert_close(corner, doubled[:20, 20:], atol=1e-5, rtol=1e-5)


def test_no_window_is_the_whole_image_and_a_mosaic_has_no_gradient():
    windows = sample_windows([{}, {"window": torch.tensor([0.1, 0.2, 0.3, 0.4])}])
    assert torch.equal(windows, torch.tensor([[0.0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]]))
    prior = torch.zeros(1, 1, 10, 10, requires_grad=True)
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    prior_at_cells(prior, mask, torch.full((1, 4), torch.nan)).sum().backward()
    assert float(prior.grad.abs().sum()) == 0


# ----------------------------------------------------------------------------------------------------------------------
# What it learns.


def test_cells_of_boxes_by_hand():
    """Eight by eight cells; a box over columns 2 to 5 and rows 0 to 3, and a small one within cell (7, 7)."""
    boxes = torch.tensor([[0.5, 0.25, 0.5, 0.5], [0.95, 0.95, 0.02, 0.02]])
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, :, 7] = False
    wanted, counts = box_coverage([{"boxes": boxes, "scores": torch.tensor([1.0, 0.25])}, {"boxes": boxes[:0]}], mask)
    objects = torch.zeros(8, 8)
    objects[1:3, 3:5] = 1.0
    objects[7, 7] = 0.25
    assert torch.equal(wanted[0], objects) and not wanted[1].any() and counts[1].all()
    rim = torch.zeros(8, 8, dtype=torch.bool)
    rim[:4, 2:6] = True
    rim[1:3, 3:5] = False
    assert torch.equal(counts[0], ~rim)


def test_a_rim_within_another_boxes_half_is_an_object():
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.5, 0.5]])
    wanted, counts = box_coverage([{"boxes": boxes}], torch.zeros(1, 8, 8, dtype=torch.bool))
    assert wanted[0, 1, 1] == 1 and counts[0, 1, 1] and not counts[0, 0, 0]


def test_loss_by_hand(maps):
    logits, wanted = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 0.0, 0.5])
    bce = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    torch.testing.assert_close(objectness_loss(logits, wanted, "bce"), bce)
    assert float(objectness_loss(logits, wanted, "focal")[0]) == pytest.approx(0.25 * 0.25 * math.log(2))


def test_unlabelled_images_and_batches_without_any_teach_nothing(maps, targets):
    head = head_of()
    features = passed(head, maps, targets)
    outputs = head(features)
    both = [targets[0], {**targets[1], "labelled": False}]
    alone = head.losses(
        [o[:1] for o in outputs], Features([a._replace(mask=a.mask[:1]) for a in maps], None, []), targets[:1]
    )
    torch.testing.assert_close(head.losses(outputs, features, both).total, alone.total)
    nothing = head.losses(outputs, features, [{**target, "labelled": False} for target in targets])
    assert float(nothing.total.detach()) == 0
    nothing.total.backward()
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())
    with pytest.raises(ValueError, match=r"targets: expected one per image \(2\), got 1"):
        head.losses(outputs, features, targets[:1])


def scenes(count, fixed, generator):
    """Maps of 12 x 12 cells with six identical patterns, three of them objects: those in the hot corner, or any."""
    features, targets, patterns = torch.zeros(count, 4, 12, 12), [], []
    hot = [(row, column) for row in range(4) for column in range(4)]
    all_cells = [(row, column) for row in range(12) for column in range(12)]
    cold = [cell for cell in all_cells if cell not in hot]
    for image in range(count):
        inside, outside = (torch.randperm(len(cells), generator=generator)[:3].tolist() for cells in (hot, cold))
        cells = [hot[k] for k in inside] + [cold[k] for k in outside]
        if not fixed:
            cells = [all_cells[k] for k in torch.randperm(144, generator=generator)[:6].tolist()]
        rows, columns = torch.tensor(cells).T
        features[image, :, rows, columns] = torch.tensor([[1.0], [-1.0], [2.0], [0.5]])
        boxes = [[(column + 0.5) / 12, (row + 0.5) / 12, 1 / 12, 1 / 12] for row, column in cells[:3]]
        targets.append({"labels": torch.zeros(3, dtype=torch.int64), "boxes": torch.tensor(boxes)})
        patterns.append(torch.stack([torch.full((6,), image), rows, columns]))
    return features, targets, torch.cat(patterns, dim=1)


def auroc_after_training(fixed, with_map):
    """AUROC of the patterns of 1,000 new maps, and ‖R‖."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(1)
    head = LocationPrior(FeatureSizes(1, (4,), (8,)), with_map=with_map)
    optimiser = torch.optim.Adam(head.parameters(), lr=0.1)
    features, targets, _ = scenes(64, fixed, generator)
    for _ in range(60):
        read = passed(head, [level(features)], targets)
        optimiser.zero_grad()
        head.losses(head(read), read, targets).total.backward()
        optimiser.step()
    features, _, places = scenes(1000, fixed, generator)
    with torch.no_grad():
        scores = head(passed(head, [level(features)]))[0][tuple(places)]
    is_object = torch.tensor([1, 1, 1, 0, 0, 0]).repeat(1000)
    return roc_auc_score(is_object, scores), float(head.prior_map.norm())


def test_a_hot_corner_is_learned_by_the_map_alone():
    """The patterns are the same everywhere; without padding, convolutions cannot tell the corner."""
    plain, _ = auroc_after_training(fixed=True, with_map=False)
    located, norm = auroc_after_training(fixed=True, with_map=True)
    assert plain == pytest.approx(0.5, abs=0.02) and located >= 0.99
    random, stays = auroc_after_training(fixed=False, with_map=True)
    assert random == pytest.approx(0.5, abs=0.02) and stays < 0.5 * norm


# ----------------------------------------------------------------------------------------------------------------------
# What it says of boxes.


def test_ranking_by_hand():
    logits, objectness = torch.tensor([[[0.0, 2.0], [-torch.inf, 1.0]]]), torch.tensor([[1.0, -2.0]])
    found = ranked_logits(logits, objectness).sigmoid()
    wanted = (logits.sigmoid() * objectness.sigmoid()[..., None]).sqrt()
    torch.testing.assert_close(found, wanted)
    assert ranked_logits(logits, objectness)[0, 1, 0] == -torch.inf
    assert torch.isfinite(ranked_logits(torch.full((1, 1, 1), 200.0), torch.full((1, 1), 200.0))).all()


def test_objectness_is_that_of_the_cell_which_holds_the_point():
    objectness = torch.arange(24.0).view(1, 4, 6)
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[:, :, 4:] = True
    points = torch.tensor([[[0.0, 0.0], [0.26, 0.99], [1.0, 1.0], [1.3, -0.2]]])
    assert objectness_at(objectness, mask, points).tolist() == [[0.0, 19.0, 21.0, 3.0]]


def test_rank_finds_more_among_the_first_ten_than_scores_alone():
    """Ten of a hundred boxes are right; their scores are as all others', their cells are hot."""
    generator = torch.Generator().manual_seed(0)
    head = LocationPrior(FeatureSizes(1, (4,), (8,)), size=10, use="rank")
    centres = torch.stack(torch.meshgrid(torch.arange(10), torch.arange(10), indexing="xy"), dim=2).view(1, 100, 2)
    boxes = torch.cat([(centres + 0.5) / 10, torch.full((1, 100, 2), 0.1)], dim=2)
    right = torch.randperm(100, generator=generator)[:10]
    logits = torch.randn(1, 100, 1, generator=generator)
    with torch.no_grad():
        head.prior[0, 0].view(-1)[right] = 8.0
        features = passed(head, [level(torch.zeros(1, 4, 10, 10))], None, Queries([], [], [logits], [boxes]))
        ranked = head.predictions(head(features), features)["pred_logits"]
    recall = [
        len(set(found[0, :, 0].topk(10).indices.tolist()) & set(right.tolist())) / 10 for found in (logits, ranked)
    ]
    assert recall[1] == 1.0 and recall[0] < 0.5
    head.use = "feature"
    assert head.predictions(head(features), features) == {}


def test_on_a_backbone_it_proposes_boxes_of_any_class():
    head = LocationPrior(SIZES, levels=[0], map_size=40, num_boxes=5, with_map=False)
    objectness = torch.full((2, 10, 10), -6.0)
    objectness[0, 2:5, 6:9] = 6.0
    features = Features([level(torch.zeros(2, 8, 10, 10))], None, [])
    found = head.predictions([objectness], features)
    assert found["pred_logits"].shape == (2, 5, 2) and found["pred_boxes"].shape == (2, 5, 4)
    torch.testing.assert_close(found["pred_boxes"][0, 0], torch.tensor([0.75, 0.35, 0.3, 0.3]), atol=0.06, rtol=0)
    assert torch.equal(found["pred_logits"][..., 0], found["pred_logits"][..., 1])
    assert (found["pred_logits"][1] == -torch.inf).all(), "a constant map has no box"


@pytest.mark.parametrize("kind", ["detr", "two-stage", "vidt"])
def test_on_a_detector(kind, parts, batch):
    torch.manual_seed(0)
    headed = HeadedDetector(3, partial(LocationPrior, use="rank"), parts.DETECTORS[kind]).eval()
    images, mask, given = batch
    with torch.no_grad():
        both, own = headed(images, mask), headed.detector(images, mask)
    assert torch.equal(both["pred_boxes"], own["pred_boxes"]), "a map of zeros changes no box"
    outputs, features = headed.read(images, mask)
    logits = [
        objectness_at(o, a.mask, own["pred_boxes"][..., :2]) for o, a in zip(outputs, features.levels, strict=True)
    ]
    torch.testing.assert_close(both["pred_logits"], ranked_logits(own["pred_logits"], torch.stack(logits).amax(dim=0)))
    headed.head.use = "feature"  # the default
    with torch.no_grad():
        assert torch.equal(headed(images, mask)["pred_logits"], own["pred_logits"]), "no ranking, and no other scores"
    assert headed.head.heat_map(outputs, features).shape == (2, 1, 112, 112)
    losses = headed.train().losses(images, mask, given)
    losses["loss"].backward()
    missing = [name for name, p in headed.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing and "location_objectness" in losses


def test_on_a_backbone(parts, batch):
    headed = parts.on_backbone(LocationPrior).train()
    losses = headed.losses(*batch)
    losses["loss"].backward()
    assert not [name for name, p in headed.named_parameters() if p.requires_grad and p.grad is None]
    assert isinstance(headed, HeadedBackbone)
    assert headed.eval()(*batch[:2])["pred_boxes"].shape == (2, 100, 4)


def test_the_window_of_a_target_reaches_the_map(parts, batch):
    headed = HeadedDetector(3, lambda sizes: LocationPrior(sizes), parts.DETECTORS["detr"]).train()
    with torch.no_grad():
        headed.head.prior[..., :5] = 5.0
    images, mask, given = batch
    mirrored = [{**target, "window": torch.tensor([1.0, 0, 0, 1])} for target in given]
    shown = [headed._decoded(images, mask, targets)[1].taps[0].prior for targets in (given, mirrored)]
    torch.testing.assert_close(shown[0][0].flip(1), shown[1][0])
    assert not torch.allclose(shown[0], shown[1])


def test_the_map_learns_without_weight_decay(parts):
    headed = HeadedDetector(3, LocationPrior, parts.DETECTORS["detr"])
    for new_lr, name in ((None, "undecayed"), (1e-3, "new_undecayed")):
        new = {"head.prior", "head.objectness.0.weight"}
        groups = {group["name"]: group for group in parameter_groups(headed, 1e-4, 1e-5, new=new, new_lr=new_lr)}
        assert groups[name]["weight_decay"] == 0.0 and groups[name]["lr"] == (new_lr or 1e-4)
        assert [id(p) for p in groups[name]["params"]] == [id(headed.head.prior)]
    in_all = [id(p) for group in groups.values() for p in group["params"]]
    assert len(in_all) == len(set(in_all)) == len([p for p in headed.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fit": "stretch"}, "fit: expected one of 'resize', 'crop', got 'stretch'"),
        ({"use": "both"}, "use: expected one of 'rank', 'feature', got 'both'"),
        ({"loss": "l2"}, "loss: expected one of 'focal', 'bce', got 'l2'"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"kernel_size": 2}, "kernel_size must be odd, got 2"),
        ({"loss_weight": -1.0}, "loss_weight must be at least 0, got -1"),
        ({"levels": [2]}, "levels: expected ascending levels among 0 to 1, got"),
        ({"num_boxes": 0}, "num_boxes must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        LocationPrior(SIZES, **options)


def test_wrong_features_are_named():
    head = head_of()
    with pytest.raises(ValueError, match=r"features of level 0: expected \[B, 8, h, w\], got \[1, 6, 4, 4\]"):
        head.pass_level(0, level(torch.zeros(1, 6, 4, 4)))
    broken = torch.zeros(1, 8, 4, 4)
    broken[0, 3, 1, 2] = torch.nan
    with pytest.raises(
        ValueError, match=r"features of level 0: expected finite values, got nan at index \(0, 3, 1, 2\)"
    ):
        head.pass_level(0, level(broken))
