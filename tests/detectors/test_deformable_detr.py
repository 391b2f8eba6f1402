"""The detector: initialisation, parameter counts, shapes, learning (specification T4, T5, T24)."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser

from simdetr.detectors import DeformableDETR, DetectionLoss

TRAINABLE = {
    "base": ({}, 39_847_265),
    "refine": ({"with_box_refine": True}, 40_627_260),
    # one logit chooses queries, where the original has one per class
    "two_stage": ({"with_box_refine": True, "two_stage": True}, 40_959_129 - 90 * 257),
    "single_scale": ({"num_feature_levels": 1}, 33_844_193),
}


@pytest.mark.parametrize("variant", TRAINABLE)
def test_parameter_counts_of_the_original(variant):
    settings, expected = TRAINABLE[variant]
    with torch.device("meta"):
        model = DeformableDETR(91, **settings)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    fixed = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert (trainable, fixed) == (expected, 222_400)
    assert sum(buffer.numel() for buffer in model.buffers()) == 106_240


def test_parameter_groups_of_the_original():
    """The groups of the original's optimiser are told apart by these parts of names."""
    with torch.device("meta"):
        model = DeformableDETR(91)
    counts = {"backbone": 0, "slow": 0, "rest": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slow = "reference_points" in name or "sampling_offsets" in name
            counts["backbone" if name.startswith("backbone.") else "slow" if slow else "rest"] += parameter.numel()
    assert counts == {"backbone": 23_232_512, "slow": 790_018, "rest": 15_824_735}


def test_initialisation_of_heads(make_deformable):
    for variant, biases in {"base": [-2.0] * 3, "refine": [-2.0, 0.0, 0.0], "two_stage": [0.0] * 4}.items():
        detector = make_deformable(variant)
        for head, size in zip(detector.bbox_embed, biases, strict=True):
            assert head.layers[-1].weight.count_nonzero() == 0
            assert head.layers[-1].bias.tolist() == [0.0, 0.0, size, size]
        for head in detector.class_embed:
            torch.testing.assert_close(head.bias, torch.full_like(head.bias, -math.log(99)))
    assert math.log(99) == pytest.approx(4.59512, abs=1e-5)


def test_heads_are_shared_without_refinement(make_deformable):
    base, refine = make_deformable("base"), make_deformable("refine")
    assert len(set(base.class_embed)) == 1 == len(set(base.bbox_embed))
    assert len(set(refine.class_embed)) == 3 == len(set(refine.bbox_embed))
    assert refine.transformer.decoder.bbox_embed is refine.bbox_embed


def test_initialisation_of_the_transformer(make_deformable):
    detector = make_deformable("base", hidden_dim=128)
    state = detector.state_dict()
    for name, fan in {
        "transformer.encoder.layers.0.linear1.weight": 256,
        "transformer.decoder.layers.1.self_attn.in_proj_weight": 128 * 4,
        "transformer.decoder.layers.1.self_attn.out_proj.weight": 256,
        "transformer.reference_points.weight": 130,
    }.items():
        bound = math.sqrt(6 / fan)
        assert 0.9 * bound < state[name].abs().max() <= bound, name
    for name in ("self_attn.in_proj_bias", "self_attn.out_proj.bias", "cross_attn.value_proj.bias"):
        assert state[f"transformer.decoder.layers.0.{name}"].count_nonzero() == 0
    assert state["transformer.reference_points.bias"].count_nonzero() == 0
    assert state["input_proj.0.0.bias"].count_nonzero() == 0
    assert state["transformer.level_embed"].std().item() == pytest.approx(1.0, abs=0.1)
    assert state["query_embed.weight"].std().item() == pytest.approx(1.0, abs=0.1)


def test_first_boxes(make_deformable, batch):
    """One-stage boxes start at sigmoid(-2) of the image, two-stage boxes at the cells' own."""
    with torch.no_grad():
        base, refine = make_deformable("base")(*batch[:2]), make_deformable("refine")(*batch[:2])
        two_stage = make_deformable("two_stage")(*batch[:2])
    size = torch.tensor(-2.0).sigmoid()
    for boxes in (base["pred_boxes"], refine["aux_outputs"][0]["pred_boxes"]):
        torch.testing.assert_close(boxes[..., 2:], size.expand_as(boxes[..., 2:]))
    for boxes in (two_stage["pred_boxes"], two_stage["aux_outputs"][0]["pred_boxes"]):
        sides = boxes[0, :, 2:]
        assert all(min(abs(side - 0.05 * 2**level) for level in range(4)) < 1e-5 for side in sides[sides < 0.9])


@pytest.mark.parametrize("variant", ["base", "refine", "two_stage", "single_scale", "dc5"])
def test_outputs_and_gradients(variant, make_deformable, batch):
    images, mask, targets = batch
    detector = make_deformable(variant).train()
    out = detector(images, mask)
    assert out["pred_logits"].shape == (2, 20, 7) and out["pred_boxes"].shape == (2, 20, 4)
    assert len(out["aux_outputs"]) == 2 and ("enc_outputs" in out) is (variant == "two_stage")
    DetectionLoss()(out, targets)["loss"].backward()
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_other_backbones_take_any_size(name, make_deformable):
    """Odd sizes are padded where the backbone needs it, and the padding is masked."""
    detector = make_deformable("base", backbone=name, num_encoder_layers=1, num_decoder_layers=1)
    with torch.no_grad():
        out = detector(torch.zeros(2, 3, 75, 83))
    assert torch.isfinite(out["pred_boxes"]).all() and out["pred_boxes"].shape == (2, 20, 4)


def test_a_mask_without_padding_is_no_mask(make_deformable, shake, batch):
    detector = shake(make_deformable("two_stage"))
    images = batch[0]
    with torch.no_grad():
        without, blank = detector(images), detector(images, torch.zeros(2, 120, 136, dtype=torch.bool))
        # an image in a batch with a padded one takes the general path
        general = detector(images, batch[1])
    torch.testing.assert_close(blank["pred_logits"], without["pred_logits"], rtol=0, atol=0)
    torch.testing.assert_close(general["pred_logits"][0], without["pred_logits"][0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(general["pred_logits"][1], without["pred_logits"][1], atol=1e-3)


def test_one_image_alone_or_in_a_batch(make_deformable, shake, batch):
    detector = shake(make_deformable("refine"))
    images, mask, _ = batch
    with torch.no_grad():
        together, alone = detector(images, mask), detector(images[1:], mask[1:])
    torch.testing.assert_close(alone["pred_boxes"][0], together["pred_boxes"][1], rtol=1e-4, atol=1e-5)


def test_autocast_keeps_boxes_in_float32(make_deformable, batch):
    images, mask, targets = batch
    detector = make_deformable("two_stage").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = detector(images, mask)
        loss = DetectionLoss()(out, targets)["loss"]
    assert out["pred_boxes"].dtype == loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)


def kept_bytes(compute, parameters):
    """Result of a computation and the size of the activations that it keeps for its backward pass.

    Weights, and those of convolutions scaled by their frozen batch norm, are as many whatever the images.
    """
    kept, parameters = {}, list(parameters)
    convolutions = {parameter.shape for parameter in parameters if parameter.dim() == 4}

    def count(tensor):
        if tensor.shape not in convolutions:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = compute()
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    return result, sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("changes", [{}, {"backbone": "vit_tiny_patch16_224"}], ids=["resnet", "vit"])
def test_activation_checkpointing_changes_memory_alone(changes, make_deformable, batch):
    images, mask, targets = batch
    gradients, kept = [], []
    for again in (False, True):
        detector = make_deformable("refine", dropout=0.3, activation_checkpointing=again, **changes).train()
        assert detector.init_args["activation_checkpointing"] is again
        with torch.random.fork_rng():
            torch.manual_seed(5)
            losses, size = kept_bytes(lambda model=detector: model.losses(images, mask, targets), detector.parameters())
            losses["loss"].backward()
        gradients.append({name: p.grad for name, p in detector.named_parameters() if p.requires_grad})
        kept.append(size)
    assert kept[1] < 0.6 * kept[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_activation_checkpointing_is_for_training_alone(make_deformable, batch):
    detector = make_deformable("base", activation_checkpointing=True)
    with torch.no_grad():
        expected = make_deformable("base")(*batch[:2])["pred_boxes"]
        torch.testing.assert_close(detector(*batch[:2])["pred_boxes"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_attention_of_queries_saves_memory_in_training(dropout, make_deformable, batch, monkeypatch):
    """It goes through the fused operator, with its dropout, and asks for no table of weights."""
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **more: (calls.append(more), fused(*args, **more))[1]
    )
    detector = make_deformable("base", dropout=dropout).train()
    detector.losses(*batch)["loss"].backward()
    assert calls == [{"dropout_p": dropout}] * 3


def test_widths_that_32_does_not_divide(make_deformable, batch):
    detector = make_deformable("two_stage", hidden_dim=36, num_heads=3)
    with torch.no_grad():
        assert detector(*batch[:2])["pred_boxes"].shape == (2, 20, 4)


def test_copies_and_pickles(make_deformable):
    detector = make_deformable("two_stage")
    again = pickle.loads(pickle.dumps(detector))
    assert all(torch.equal(a, b) for a, b in zip(detector.parameters(), again.parameters(), strict=True))
    assert again.transformer.decoder.bbox_embed is again.bbox_embed


# jsonargparse 4.49 renames the method that Lightning and older versions have
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_yaml_can_build_it():
    parser = ArgumentParser()
    parser.add_argument("--detector", type=torch.nn.Module)
    parser.add_argument("--loss", type=torch.nn.Module)
    config = parser.parse_object(
        {
            "detector": {
                "class_path": "simdetr.detectors.DeformableDETR",
                "init_args": {
                    "num_classes": 3,
                    "backbone": "resnet18",
                    "hidden_dim": 32,
                    "position_encoding": "learned",
                },
            },
            "loss": {"class_path": "simdetr.detectors.DetectionLoss", "init_args": {"class_cost": 1.0}},
        }
    )
    built = parser.instantiate_classes(config)
    assert built.detector.num_classes == 3 and built.loss.matcher.class_cost == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"two_stage": True}, "needs with_box_refine"),
        ({"hidden_dim": 66}, "multiple of 4 and of num_heads=4, got 66"),
        ({"hidden_dim": 64, "num_heads": 5}, "multiple of 4 and of num_heads=5, got 64"),
        ({"num_feature_levels": 2}, "must be 1 .* or at least 3, got 2"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"num_decoder_layers": 0}, "num_decoder_layers must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit(changes, message, make_deformable):
    with pytest.raises(ValueError, match=message):
        make_deformable("base", **changes)


def test_mask_of_another_size(make_deformable, batch):
    with pytest.raises(ValueError, match=r"mask must be \[B, H, W\] = \[2, 120, 136\], got \[2, 60, 68\]"):
        make_deformable("base")(batch[0], batch[1][:, ::2, ::2])


def overfitting_detector(make_deformable, variant):
    changes = {"num_classes": 3, "frozen_batch_norm": False, "freeze_stem": False, "dropout": 0.0, "num_queries": 10}
    few = {"backbone": "resnet10t", "num_encoder_layers": 1, "num_decoder_layers": 2}
    return make_deformable(variant, **few, **changes)


def test_learns_two_images_a_little(make_deformable, learn, assert_best_boxes_are_right):
    detector = overfitting_detector(make_deformable, "refine")
    first, last = learn(detector, steps=90, lr=8e-4)
    assert last < first / 3
    assert_best_boxes_are_right(detector, min_iou=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["base", "two_stage"])  # the second refines its boxes, too
def test_learns_two_images_by_heart(variant, make_deformable, learn, assert_best_boxes_are_right):
    detector = overfitting_detector(make_deformable, variant)
    first, last = learn(detector, steps=150, lr=6e-4)
    assert last < first / 10
    assert_best_boxes_are_right(detector, min_iou=0.9)
