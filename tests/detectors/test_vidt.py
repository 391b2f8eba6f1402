"""ViDT: parameter counts, order of tokens and layers, gradients, learning (specification T11, T20, T24, B6)."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch

from simdetr.boxes import denormalise
from simdetr.detectors import ViDT
from simdetr.detectors.deformable_detr import Perceptron, box_head
from simdetr.detectors.deformable_transformer import LayerSizes, cell_boxes, flatten_maps, inverse_sigmoid
from simdetr.detectors.detector import softmax_log_odds
from simdetr.detectors.swin_ram import OWN_SIZES, resize_mask
from simdetr.detectors.vidt import (
    FusionBlock,
    NeckFreeHead,
    PyramidFusion,
    ResidualUnit,
    VidtNeck,
    map_projection,
    project_tokens,
)

PLAIN = {"fusion": False, "iou_aware": False, "mask_vectors": False, "token_labels": False}
VARIANTS = {"plus": {}, "vidt": PLAIN, "shared_heads": {"with_box_refine": False}, "neck_free": {"neck": False}}
SMALL = {
    "num_classes": 5,
    "backbone": "swin_pico",
    "num_queries": 12,
    "hidden_dim": 32,
    "num_heads": 4,
    "num_decoder_layers": 2,
    "ffn_dim": 32,
    "num_points": 2,
    "dropout": 0.0,
}


def make_vidt(variant="plus", seed=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ViDT(**(SMALL | VARIANTS[variant] | changes)).eval()


@pytest.fixture
def masked_batch(batch):
    """Two images, the second padded, with rectangles as instance masks."""
    images, mask, targets = batch
    with_masks = []
    for target, (height, width) in zip(targets, [(120, 136), (90, 100)], strict=True):
        masks = torch.zeros(len(target["boxes"]), height, width, dtype=torch.bool)
        corners = denormalise(target["boxes"], (height, width)).round().int()
        for index, (left, top, right, bottom) in enumerate(corners.tolist()):
            masks[index, max(top, 0) : bottom, max(left, 0) : right] = True
        with_masks.append({**target, "labels": target["labels"] % 5, "masks": masks})
    return images, mask, with_masks


def without(targets, name):
    return [{key: value for key, value in target.items() if key != name} for target in targets]


def unused_upstream(width):
    """Parameters of the original that nothing reads, without and with a neck, and with fusion."""
    widths = [width * 2**stage for stage in range(4)]
    merging = sum(2 * w * w + 2 * w for w in widths[:3])  # expansion and norm2 of three mergings
    norms = sum(2 * w for w in widths[1:])
    neck = 256 * widths[3] + 2 * widths[3] + 4 * 256  # those of the fourth merging, level embedding
    residual = (256 * 64 + 64) + (64 * 64 * 9 + 64) + (64 * 256 + 256)
    fusion = (256 * 256 + 256) + residual  # smoothing and first residual unit of the coarsest level
    return merging + norms, merging + norms + neck, merging + norms + neck + fusion


SIZES = {
    "swin_nano": (48, (7_997_418, 15_728_677, 16_612_773, 17_822_727)),
    "swin_tiny_patch4_window7_224": (96, (29_564_250, 37_962_901, 38_856_597, 40_066_551)),
    "swin_small_patch4_window7_224": (96, (52_066_410, 60_465_061, 61_358_757, 62_568_711)),
    "swin_base_patch4_window7_224": (128, (91_116_056, 99_959_635, 100_859_731, 102_069_685)),
}


@pytest.mark.parametrize("backbone", SIZES)
def test_parameter_counts_of_the_original(backbone):
    width, published = SIZES[backbone]
    body, neck, fusion = unused_upstream(width)
    columns = [
        ({"neck": False, "num_queries": 100}, body),
        ({**PLAIN, "num_queries": 100}, neck),
        ({**PLAIN, "fusion": True}, fusion),
        ({}, fusion),
    ]
    for (settings, unused), expected in zip(columns, published, strict=True):
        with torch.device("meta"):
            model = ViDT(91, backbone, **settings)
        assert sum(parameter.numel() for parameter in model.parameters()) + unused == expected
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_outputs(variant, batch):
    images, mask, _ = batch
    detector = make_vidt(variant).train()
    for training in (True, False):
        out = detector.train(training)(images, mask)
        layers = [out, *out.get("aux_outputs", [])]
        assert len(layers) == (1 if variant == "neck_free" else 3)
        for layer in layers:
            assert layer["pred_logits"].shape == (2, 12, 5) and layer["pred_boxes"].shape == (2, 12, 4)
            assert ((layer["pred_boxes"] >= 0) & (layer["pred_boxes"] <= 1)).all()
            extra = {name: tuple(layer[name].shape) for name in ("pred_ious", "pred_vectors") if name in layer}
            has_extra = variant in ("plus", "shared_heads")
            assert extra == ({"pred_ious": (2, 12, 1), "pred_vectors": (2, 12, 256)} if has_extra else {})
        assert ("enc_tokens" in out) is (training and has_extra)
    assert detector(images, mask).keys() == out.keys()


@torch.no_grad()
def test_levels_are_coarse_first_with_fusion(batch):
    """The cells' classes have the order of the levels that the decoder reads."""
    sides = [(level.shape[1], level.shape[2]) for level in make_vidt().train()(*batch[:2])["enc_tokens"]]
    assert sides == [(2, 3), (4, 5), (8, 9), (15, 17)]
    plain = make_vidt("vidt", token_labels=True).train()(*batch[:2])["enc_tokens"]
    assert [(level.shape[1], level.shape[2]) for level in plain] == sides[::-1]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_tokens_have_no_order(variant, batch):
    detector, order = make_vidt(variant), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for parameter in detector.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before = detector(*batch[:2])
    for parameter in (detector.backbone.det_token, detector.backbone.det_pos_embed):
        parameter.copy_(parameter[:, order].clone())
    after = detector(*batch[:2])
    for old, new in zip([before, *before.get("aux_outputs", [])], [after, *after.get("aux_outputs", [])], strict=True):
        assert old.keys() == new.keys()
        for name in old.keys() - {"aux_outputs"}:
            torch.testing.assert_close(new[name], old[name][:, order], rtol=1e-5, atol=1e-5)
            assert not torch.allclose(new[name], old[name], atol=1e-4)


@pytest.mark.parametrize("variant", ["plus", "shared_heads"])
@torch.no_grad()
def test_fewer_layers_at_inference(variant, batch, shake):
    detector = shake(make_vidt(variant, num_decoder_layers=3))
    whole = detector(*batch[:2])
    layers = [*whole["aux_outputs"], whole]
    for used in range(4):
        detector.inference_layers = used
        fewer = detector(*batch[:2])
        assert len(fewer["aux_outputs"]) == used
        for name in ("pred_logits", "pred_boxes", "pred_ious", "pred_vectors"):
            assert torch.equal(fewer[name], layers[used][name])
    assert len(detector.train()(*batch[:2])["aux_outputs"]) == 3  # training uses all
    assert detector.init_args["inference_layers"] == 3
    with pytest.raises(ValueError, match="must be None or 0 to 3, got 4"):
        detector.inference_layers = 4
    assert detector.inference_layers == 3


@torch.no_grad()
def test_first_prediction_needs_no_decoder(batch, shake):
    detector = make_vidt()
    before = detector(*batch[:2])
    shake(detector.transformer.decoder.layers)
    after = detector(*batch[:2])
    for name in ("pred_logits", "pred_boxes", "pred_ious", "pred_vectors"):
        assert torch.equal(after["aux_outputs"][0][name], before["aux_outputs"][0][name])
        assert not torch.equal(after["aux_outputs"][1][name], before["aux_outputs"][1][name]) or name != "pred_logits"


@torch.no_grad()
def test_padding(batch, shake):
    """What lies under the padding does not matter, that there is padding does."""
    detector = shake(make_vidt())
    images, mask, _ = batch
    clean = detector(images, mask)
    dirty = detector(torch.where(mask[:, None], 50.0, images), mask)
    assert torch.equal(clean["pred_boxes"], dirty["pred_boxes"])
    unmasked = detector(images)
    torch.testing.assert_close(unmasked["pred_boxes"][0], clean["pred_boxes"][0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unmasked["pred_boxes"][1], clean["pred_boxes"][1], atol=1e-3)
    blank = detector(images, torch.zeros_like(mask))
    assert torch.equal(blank["pred_logits"], unmasked["pred_logits"])
    with pytest.raises(ValueError, match=r"mask must be \[B, H, W\] = \[2, 120, 136\], got \[2, 60, 68\]"):
        detector(images, mask[:, ::2, ::2])


def test_masks_are_resized_to_the_nearest_pixel():
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    mask[:, 4:] = True
    assert resize_mask(mask, (3, 2))[0].tolist() == [[False, False], [False, False], [True, True]]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("what", ["masks", "boxes", "nothing"])
def test_every_parameter_takes_part(variant, what, masked_batch, caplog):
    """Distributed training waits for the gradient of each, whatever a batch holds."""
    images, mask, targets = masked_batch
    if what != "masks":
        targets = without(targets, "masks")
    if what == "nothing":
        targets = [{"labels": target["labels"][:0], "boxes": target["boxes"][:0]} for target in targets]
    detector = make_vidt(variant, drop_path=0.2).train()
    with caplog.at_level(logging.WARNING):
        losses = detector.losses(images, mask, targets)
    losses["loss"].backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    additions = variant in ("plus", "shared_heads")
    assert ("loss_vector" in losses) is (additions and what == "masks")
    assert ("loss_token_focal" in losses) is (additions and what == "masks")
    assert ("loss_iouaware" in losses) is additions
    assert ("off" in caplog.text) is (additions and what != "masks")


@pytest.mark.parametrize("variant", ["plus", "neck_free"])
def test_gradient_is_real_where_there_is_something_to_learn(variant, masked_batch):
    images, mask, targets = masked_batch
    detector = make_vidt(variant).train()
    # box heads and MSDA offsets start at weights of zero, which let no gradient through
    with torch.no_grad():
        for parameter in detector.parameters():
            if not parameter.count_nonzero():
                parameter.normal_(std=0.05)
    detector.losses(images, mask, targets)["loss"].backward()
    idle = {name for name, parameter in detector.named_parameters() if not parameter.grad.count_nonzero()}
    # without a neck nobody reads the patches of the last block
    last = "backbone.body.layers.3.blocks.1.attn.relative_position_bias_table"
    assert idle <= ({last} if variant == "neck_free" else set()), idle


@pytest.mark.parametrize("variant", ["plus", "neck_free"])
def test_one_step_lowers_the_loss(variant, masked_batch):
    images, mask, targets = masked_batch
    detector = make_vidt(variant).train()
    optimiser = torch.optim.AdamW(detector.parameters(), lr=1e-4)
    before = detector.losses(images, mask, targets)["loss"]
    before.backward()
    optimiser.step()
    assert detector.losses(images, mask, targets)["loss"] < before - 0.01


@torch.no_grad()
def test_neck_free_logits_are_its_softmax(batch):
    images, mask, _ = batch
    detector = make_vidt("neck_free")
    tokens = detector.backbone(images, mask).tokens
    probability = detector.neck_free_head(tokens)[0].softmax(-1)
    torch.testing.assert_close(detector(images, mask)["pred_logits"].sigmoid(), probability[..., :-1])


def test_initialisation():
    detector = make_vidt(num_decoder_layers=3)
    assert [head.layers[-1].bias.tolist()[2:] for head in detector.bbox_embed] == [[-2.0] * 2] + [[0.0] * 2] * 3
    for head in [*detector.class_embed, detector.transformer.token_embed]:
        torch.testing.assert_close(head.bias, torch.full((5,), -math.log(99)))
    assert len(set(detector.iou_embed)) == 4 and len(set(detector.vector_embed)) == 1
    assert detector.vector_embed[0].layers[-1].bias.tolist() == [0.0, 0.0] + [-2.0] * 254
    assert detector.transformer.decoder.bbox_embed is detector.bbox_embed
    shared = make_vidt("shared_heads")
    assert len({*shared.class_embed}) == len({*shared.bbox_embed}) == len({*shared.iou_embed}) == 1
    assert shared.bbox_embed[0].layers[-1].bias.tolist()[2:] == [-2.0] * 2


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_its_arguments_rebuild_it(variant, batch):
    detector = make_vidt(variant, inference_layers=1)
    again = ViDT(**json.loads(json.dumps(detector.init_args))).eval()
    again.load_state_dict(detector.state_dict())
    assert torch.equal(again(*batch[:2])["pred_boxes"], detector(*batch[:2])["pred_boxes"])
    assert again.init_args == detector.init_args and again.inference_layers == 1
    body = detector.get_submodule(detector.body_name)
    assert type(body).__name__ == "SwinTransformer" and detector.body_name.startswith(detector.backbone_name)


def test_checkpointing_changes_memory_alone(masked_batch):
    grads = []
    for checkpointing in (False, True):
        detector = make_vidt(activation_checkpointing=checkpointing).train()
        detector.losses(*masked_batch)["loss"].backward()
        grads.append({name: parameter.grad for name, parameter in detector.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0])


def test_autocast_keeps_boxes_in_float32(masked_batch):
    for variant in ("plus", "neck_free"):
        detector = make_vidt(variant).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = detector.losses(*masked_batch)["loss"]
            assert detector(*masked_batch[:2])["pred_boxes"].dtype == loss.dtype == torch.float32
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in detector.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 66}, "multiple of 4 and of num_heads=4, got 66"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"num_decoder_layers": 0}, "num_decoder_layers must be at least 1, got 0"),
        ({"inference_layers": 3}, "inference_layers must be None or 0 to 2, got 3"),
        ({"backbone": "resnet18"}, "'resnet18' is no Swin transformer"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make_vidt(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plus", "vidt", "neck_free"])
def test_learns_two_images_by_heart(variant, learn, assert_best_boxes_are_right, monkeypatch):
    """With one layer per stage but for one, whose second layer has shifted windows."""
    monkeypatch.setitem(OWN_SIZES, "swin_pico", OWN_SIZES["swin_pico"] | {"depths": (1, 1, 2, 1)})
    detector = make_vidt(variant, num_classes=3, hidden_dim=64)
    first, last = learn(detector, steps=120, lr=8e-4)
    assert last < first / 4
    assert_best_boxes_are_right(detector, min_iou=0.8)


# ----------------------------------------------------------------------------------------------------------------------
# The decoder without encoder: memory, the body's own prediction, cells' classes, initialisation.


NECK_SIZES = [(2, 3), (4, 5)]


def make_neck(refine=True, classes=5, layers=3):
    torch.manual_seed(0)
    neck = VidtNeck(
        LayerSizes(16, 32, 0.0, num_levels=2, num_heads=2, num_points=2),
        num_layers=layers,
        refine=refine,
        token_classes=classes,
        class_bias=-4.0,
    )
    heads = torch.nn.ModuleList(box_head(16, -2.0) for _ in range(layers + 1))
    for head in heads:
        torch.nn.init.normal_(head.layers[-1].weight, std=0.3)
    return neck.eval(), heads


def make_maps():
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, 16, *size, generator=generator) for size in NECK_SIZES]
    masks = [torch.zeros(2, *size, dtype=torch.bool) for size in NECK_SIZES]
    masks[0][1, :, 2:] = True
    masks[1][1, :, 3:] = True
    masks[1][1, 2:] = True
    return maps, masks


def make_queries():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 7, 16, generator=generator), torch.randn(2, 7, 16, generator=generator)


def test_memory_of_maps():
    maps, masks = make_maps()
    memory = flatten_maps(maps, masks)
    assert memory.shapes == NECK_SIZES and memory.tokens.shape == (2, 26, 16)
    torch.testing.assert_close(memory.tokens[1, 6 + 2 * 5 + 3], maps[1][1, :, 2, 3])
    expected = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[2 / 3, 1.0], [3 / 5, 2 / 4]]])  # width, height
    torch.testing.assert_close(memory.valid_ratios, expected)
    assert memory.padding.equal(torch.cat([mask.flatten(1) for mask in masks], dim=1))
    assert flatten_maps(maps, [mask[:1] for mask in masks]).padding is None


@pytest.mark.parametrize("refine", [True, False])
@torch.no_grad()
def test_first_prediction_is_the_bodys_and_starts_the_decoder(refine):
    (neck, heads), (target, query) = make_neck(refine), make_queries()
    memory = flatten_maps(*make_maps())
    states, boxes, _ = neck(target, query, memory, heads, 3)
    assert len(states) == len(boxes) == 4 and torch.equal(states[0], target)
    points = neck.reference_points(query).sigmoid()
    logits = heads[0](target)
    logits[..., :2] += inverse_sigmoid(points)
    torch.testing.assert_close(boxes[0], logits.sigmoid())
    start = boxes[0] if refine else points
    later_states, later_boxes = neck.decoder(target, query, start, memory, heads[1:])
    torch.testing.assert_close(later_states, states[1:])
    torch.testing.assert_close(later_boxes, boxes[1:])


@torch.no_grad()
def test_fewer_layers_are_the_first_ones():
    (neck, heads), (target, query) = make_neck(), make_queries()
    memory = flatten_maps(*make_maps())
    states, boxes, _ = neck(target, query, memory, heads, 3)
    for layers in range(4):
        fewer_states, fewer_boxes, _ = neck(target, query, memory, heads, layers)
        assert len(fewer_boxes) == layers + 1
        assert all(torch.equal(a, b) for a, b in zip(fewer_states, states[: layers + 1], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(fewer_boxes, boxes[: layers + 1], strict=True))


def test_gradient_stops_between_layers_but_reaches_the_reference():
    (neck, heads), (target, query) = make_neck(), make_queries()
    _, boxes, _ = neck(target, query, flatten_maps(*make_maps()), heads, 3)
    boxes[1].sum().backward(retain_graph=True)
    assert heads[0].layers[-1].weight.grad is None and heads[1].layers[-1].weight.grad is not None
    assert neck.reference_points.weight.grad is None
    boxes[0].sum().backward()
    assert neck.reference_points.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_cells_classes():
    neck, _ = make_neck()
    maps, masks = make_maps()
    levels = neck.label_cells(flatten_maps(maps, masks), masks)
    assert [tuple(level.shape) for level in levels] == [(2, *size, 5) for size in NECK_SIZES]
    state = neck.enc_output_norm(neck.enc_output(maps[1][0, :, 2, 3]))
    torch.testing.assert_close(levels[1][0, 2, 3], neck.token_embed(state))
    usable = cell_boxes(masks)[1][:, 6:].view(2, 4, 5)
    assert not usable[1, 3].any()
    nothing = neck.token_embed(neck.enc_output_norm(neck.enc_output(torch.zeros(16))))
    torch.testing.assert_close(levels[1][~usable], nothing.expand(int((~usable).sum()), -1))


def test_initialisation_of_the_neck():
    neck, _ = make_neck()
    bound = (6 / (16 + 32)) ** 0.5
    for layer in neck.decoder.layers:
        assert 0.8 * bound < layer.linear1.weight.abs().max() <= bound
        assert layer.cross_attn.sampling_offsets.weight.count_nonzero() == 0
    assert neck.token_embed.bias.tolist() == [-4.0] * 5
    assert neck.reference_points.bias.count_nonzero() == 2  # PyTorch's default, unlike in Deformable DETR
    assert not any(name.startswith(("enc_", "token_")) for name, _ in make_neck(classes=None)[0].named_parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Fusion against bilinear interpolation by hand, its order and its names (specification T20).


FUSION_SIZES = [(12, 10), (6, 5), (3, 3), (2, 2)]


def corner_aligned(array, height, width):
    """Bilinear resize [h, w] whose corner cells keep their values, cell by cell."""
    out = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            y = row * (array.shape[0] - 1) / (height - 1)
            x = column * (array.shape[1] - 1) / (width - 1)
            top, left = min(int(y), array.shape[0] - 2), min(int(x), array.shape[1] - 2)
            weights = np.outer([1 - (y - top), y - top], [1 - (x - left), x - left])
            out[row, column] = (weights * array[top : top + 2, left : left + 2]).sum()
    return out


@torch.no_grad()
def test_coarse_maps_are_enlarged_with_aligned_corners():
    block = FusionBlock(4, coarsest=False)
    for unit in (block.resConfUnit1, block.resConfUnit2):
        torch.nn.init.zeros_(unit.conv3.weight)
        torch.nn.init.zeros_(unit.conv3.bias)
    torch.manual_seed(0)
    features, coarser = torch.randn(1, 4, 7, 9), torch.randn(1, 4, 4, 5)
    enlarged = torch.from_numpy(np.stack([corner_aligned(channel, 7, 9) for channel in coarser[0].numpy()])).float()
    expected = features[0] + torch.einsum("oc,chw->ohw", block.smoothing.weight[:, :, 0, 0], enlarged)
    expected = expected + block.smoothing.bias[:, None, None]
    torch.testing.assert_close(block(features, coarser)[0], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_maps_come_out_coarse_first_and_know_only_coarser_ones():
    torch.manual_seed(0)
    fusion = PyramidFusion([3, 5, 6, 8], 32)
    maps = [torch.randn(2, width, *size) for width, size in zip([3, 5, 6, 8], FUSION_SIZES, strict=True)]
    before = fusion(maps)
    assert [tuple(m.shape) for m in before] == [(2, 32, *size) for size in reversed(FUSION_SIZES)]
    changed = [*maps]
    changed[1] = maps[1] + torch.randn_like(maps[1])
    after = fusion(changed)
    equal = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert equal == [True, True, False, False]
    assert all(torch.equal(m, kept) for m, kept in zip(maps[2:], changed[2:], strict=True))  # inputs are not touched


@torch.no_grad()
def test_residual_unit_by_hand():
    torch.manual_seed(0)
    unit = ResidualUnit(8)
    features = torch.randn(1, 8, 5, 5)
    hidden = unit.conv3(unit.conv2(unit.conv1(features.relu()).relu()).relu())
    torch.testing.assert_close(unit(features), features + hidden)
    assert unit.conv2.weight.shape == (2, 2, 3, 3)


def test_names_and_count_of_the_original():
    fusion = PyramidFusion([192, 384, 768, 256], 256)
    names = {name.split(".")[1] for name in fusion.state_dict()}
    assert names == {f"{kind}{level}{end}" for level in range(4) for kind, end in KINDS}
    assert not any(name.startswith("multi_scaler.refinenet_3.resConfUnit1") for name in fusion.state_dict())
    assert "multi_scaler.refinenet_0.resConfUnit1.conv1.weight" in fusion.state_dict()
    projections = sum(256 * (width + 1 + 2) for width in (192, 384, 768, 256))
    unused = 256 * 256 + 256 + sum(p.numel() for p in ResidualUnit(256).parameters())
    count = sum(parameter.numel() for parameter in fusion.parameters())
    assert count - projections + unused == 823_296
    assert fusion.multi_scaler["layer_2_rn"].bias.count_nonzero() == 0


KINDS = [("layer_", "_rn"), ("p_norm_", ""), ("refinenet_", "")]


def test_every_parameter_learns():
    fusion = PyramidFusion([3, 5, 6, 8], 32)
    maps = [torch.randn(2, width, *size) for width, size in zip([3, 5, 6, 8], FUSION_SIZES, strict=True)]
    sum(m.square().sum() for m in fusion(maps)).backward()
    assert all(parameter.grad is not None for parameter in fusion.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Heads: softmax as logits, initialisation, group norm over tokens.


def test_log_odds_are_softmax_probabilities():
    logits = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) * 4
    odds = softmax_log_odds(logits)
    assert odds.shape == (3, 5, 7)
    torch.testing.assert_close(odds.sigmoid(), logits.softmax(-1)[..., :-1])


def test_log_odds_stay_finite():
    sure = torch.tensor([[200.0, 0.0, 0.0], [0.0, 0.0, 200.0]], requires_grad=True)
    odds = softmax_log_odds(sure)
    odds.sum().backward()
    assert torch.isfinite(odds).all() and torch.isfinite(sure.grad).all()
    assert odds[0, 0] > 10 and (odds[1] < -10).all()


@pytest.mark.parametrize("depth", [2, 3])
def test_perceptron_by_hand(depth):
    head = Perceptron(4, 3, depth)
    states = torch.randn(2, 5, 4)
    expected = states
    for index, layer in enumerate(head.layers):
        expected = expected @ layer.weight.T + layer.bias
        expected = expected.clamp(min=0) if index < depth - 1 else expected
    torch.testing.assert_close(head(states), expected)
    assert set(head.state_dict()) == {f"layers.{i}.{kind}" for i in range(depth) for kind in ("weight", "bias")}


def test_perceptron_starts_where_it_is_told():
    start = torch.tensor([0.0, 0.0, -2.0, -2.0])
    assert torch.equal(Perceptron(8, 4, start=start)(torch.randn(2, 8)), start.expand(2, -1))


@torch.no_grad()
def test_group_norm_mixes_the_tokens_of_an_image_in_any_order():
    torch.manual_seed(0)
    projection = map_projection(6, 64)
    tokens = torch.randn(2, 5, 6)
    found = project_tokens(projection, tokens)
    assert found.shape == (2, 5, 64)
    groups = found.view(2, 5, 32, 2)  # 32 groups of 2 channels, normed over tokens and channels
    torch.testing.assert_close(groups.mean((1, 3)), torch.zeros(2, 32), rtol=0, atol=1e-5)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(project_tokens(projection, tokens[:, order]), found[:, order])
    tokens[0, 4] += 1.0
    changed = project_tokens(projection, tokens)
    assert not torch.allclose(changed[0, 0], found[0, 0]) and torch.equal(changed[1], found[1])


def test_neck_free_head():
    head = NeckFreeHead(12, 32, 7)
    classes, boxes = head(torch.randn(2, 5, 12))
    assert classes.shape == (2, 5, 8) and boxes.shape == (2, 5, 4)
    assert ((boxes > 0) & (boxes < 1)).all()
