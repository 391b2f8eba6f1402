"""The landmark head on detectors and on a backbone: it trains, predicts beside them, comes back from its options."""

from __future__ import annotations

import json
import math

import pytest
import torch

from simdetr.detectors.detector import FeatureSizes
from simdetr.heads import HeadedDetector, LandmarkHead
from simdetr.heads.head import described

KINDS = ["detr", "refined", "two-stage", "vidt"]


@pytest.fixture
def make(parts):
    """Build a detector, or by the kind ``backbone`` a backbone, with a landmark head and a fixed seed."""

    def build(kind="refined", detector_weight=1.0, **options):
        torch.manual_seed(0)
        if kind == "backbone":
            return parts.on_backbone(lambda sizes: LandmarkHead(sizes, "grid", grid=(2, 3), **options))
        return HeadedDetector(
            3, lambda sizes: LandmarkHead(sizes, **options), parts.DETECTORS[kind], detector_weight=detector_weight
        )

    return build


CASES = [
    *((kind, {}) for kind in [*KINDS, "backbone"]),
    ("refined", {"class_weight": "sigmoid"}),
    ("refined", {"shared": True}),
    ("vidt", {"class_weight": "sigmoid", "detector_weight": 0.0}),
    ("two-stage", {"detector_weight": 0.0}),
    ("detr", {"variant": "grid", "grid": (2, 3)}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_every_parameter_learns(make, kind, options, batch):
    model = make(kind, **options).train()
    losses = model.losses(*batch)
    assert {name for name in losses if name.startswith("landmark_")} == {
        "landmark_loss_class",
        "landmark_loss_point",
        "landmark_reversal_rate",
        "landmark_true_probability",
        "landmark_point_error",
    }
    losses["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_without_landmarks_its_loss_is_0_and_attached(make, kind, options, batch):
    model = make(kind, **options).train()
    images, mask, targets = batch
    empty = [{name: values[:0] for name, values in target.items()} for target in targets]
    losses = model.losses(images, mask, empty)
    assert losses["landmark_loss_class"] == losses["landmark_loss_point"] == 0
    losses["loss"].backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.head.parameters())


@pytest.mark.parametrize(("kind", "options"), CASES)
@torch.no_grad()
def test_it_comes_back_from_its_options(make, kind, options, batch):
    model = make(kind, **options).eval()
    images, mask, _ = batch
    again = type(model).from_init_args(json.loads(json.dumps(model.init_args))).eval()
    again.load_state_dict(model.state_dict())
    before, after = model(images, mask), again(images, mask)
    for name in ("pred_logits", "pred_boxes", "pred_points", "point_logits", "landmark_points"):
        assert (name in before) == (name in after)
        if name in before:
            assert torch.equal(before[name], after[name])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_detectors_own_predictions_stay(make, kind, batch):
    model, (images, mask, _) = make(kind).eval(), batch
    own, both = model.detector(images, mask), model(images, mask)
    for name in ("pred_logits", "pred_boxes"):
        assert torch.equal(own[name], both[name])
    assert both["pred_points"].shape == (2, 6, 2) and both["point_logits"].shape == (2, 6, 3)
    assert ((both["pred_points"] > 0) & (both["pred_points"] < 1)).all()


@pytest.mark.parametrize("kind", ["refined", "backbone"])
def test_training_moves_points_to_the_landmarks(make, kind, batch):
    """A few steps on one batch, in which the second image is padded."""
    model = make(kind, unit="cell", weight_gradient="detached").train()
    optimiser = torch.optim.Adam(model.head.parameters(), 3e-3)

    def step():
        torch.manual_seed(1)
        losses = model.losses(*batch)
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
        return losses

    first = step()
    for _ in range(30):
        last = step()
    assert last["landmark_loss_class"] < 0.5 * first["landmark_loss_class"]
    assert last["landmark_true_probability"] > 2 * first["landmark_true_probability"]


@pytest.mark.parametrize("kind", ["refined", "backbone"])
def test_a_process_without_landmarks_counts_with_the_others(make, kind, batch, monkeypatch):
    """They wait for its number."""
    counts = []
    monkeypatch.setattr(
        "simdetr.heads.landmarks.global_mean_count", lambda count, device: counts.append(count) or max(count, 1)
    )
    images, mask, targets = batch
    model = make(kind).train()
    model.losses(images, mask, [{name: values[:0] for name, values in target.items()} for target in targets])
    model.losses(images, mask, targets)
    assert counts == [0, 3]


@pytest.mark.parametrize(
    ("kind", "options"), [("refined", {}), ("backbone", {}), ("detr", {"class_weight": "sigmoid"})]
)
def test_half_precision(make, kind, options, batch):
    model = make(kind, **options).train()
    whole = model.losses(*batch)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.losses(*batch)
    assert half["loss"].dtype == torch.float32
    half["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(half["landmark_loss_class"], whole["landmark_loss_class"], rtol=0.1, atol=0.0)


def test_bad_targets_are_named(make, batch):
    images, mask, targets = batch
    model = make(detector_weight=0.0)  # so that the head is the first to look
    without = [{name: target[name] for name in ("labels", "boxes")} for target in targets]
    with pytest.raises(ValueError, match="has no 'points'"):
        model.losses(images, mask, without)
    targets[1]["labels"] = torch.tensor([3])
    with pytest.raises(ValueError, match="expected 0 to 2, got 3"):
        model.losses(images, mask, targets)


SIZES = FeatureSizes(3, (4, 8), (8, 16), 16, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "dense"}, "variant: expected one of 'query', 'grid', got 'dense'"),
        ({"mode": "eq1"}, "mode: expected one of"),
        ({"reduction": "mean"}, "reduction: expected one of 'landmarks', 'sum'"),
        ({"point_output": "delta"}, "point_output: expected one of 'offset', 'absolute'"),
        ({"selection": "some"}, "selection: expected one of 'balanced', 'all', 'positive'"),
        ({"point_weight": -1.0}, "point_weight"),
        ({"beta": -1.0}, "beta"),
        ({"background_weight": -1.0}, "background_weight must be at least 0, got -1.0"),
        ({"grid": (4,)}, r"grid must be rows and columns, both at least 1, got \[4\]"),
        ({"grid": (0, 3)}, "grid must be"),
        ({"anchors": 4}, "anchors must be 1 .* or 5 .*, got 4"),
        ({"level": 2}, "level must be None or -2 to 1, got 2"),
        ({"top_anchors": 0}, "top_anchors must be None .* or at least 1, got 0"),
        ({"anchor_threshold": math.nan}, "anchor_threshold must be 0 to 1, got nan"),
        ({"variant": "grid", "class_weight": "sigmoid"}, "class_weight must be 'softmax' for the variant 'grid'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LandmarkHead(SIZES, **options)


def test_queries_are_needed_where_they_are_read():
    backbone = FeatureSizes(3, (4, 8), (8, 16))
    with pytest.raises(
        ValueError, match=r"reads the queries of a decoder.*or choose the variant that reads feature maps"
    ):
        LandmarkHead(backbone)
    assert LandmarkHead(backbone, "grid").needs == {"levels"}
    assert LandmarkHead(SIZES).needs == {"queries"}


def test_all_options_are_kept():
    options = {"mode": "eq7", "point_weight": 0.2, "grid": (3, 3), "top_anchors": 2, "shared": True}
    head = LandmarkHead(SIZES, **options)
    found = described(head)
    assert found["class_path"] == "simdetr.heads.landmarks.LandmarkHead"
    assert found["init_args"].items() >= {**options, "grid": [3, 3]}.items()
    assert LandmarkHead(SIZES, **found["init_args"]).init_args == head.init_args


class Predictions(torch.nn.Module):
    """A detector whose outputs are a tuple."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, mask):
        outputs = self.model(images, mask)
        names = ("pred_logits", "pred_boxes", "pred_points", "point_logits")
        return tuple(outputs[name] for name in names if name in outputs)


@pytest.mark.parametrize("kind", ["refined", "backbone"])
@torch.no_grad()
def test_the_exported_graph_takes_other_batches(make, kind, batch):
    model = Predictions(make(kind)).eval()
    images, mask, _ = batch
    free = torch.export.Dim.DYNAMIC
    shapes = {"images": {0: free, 2: free, 3: free}, "mask": dict.fromkeys(range(3), free)}
    graph = torch.export.export(model, (images, mask), dynamic_shapes=shapes, strict=False).module()
    images, mask = torch.randn(3, 3, 96, 128), torch.zeros(3, 96, 128, dtype=torch.bool)
    mask[1, :, 90:] = True
    for exported, eager in zip(graph(images, mask), model(images, mask), strict=True):
        torch.testing.assert_close(exported, eager)
