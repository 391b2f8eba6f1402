"""The body with tokens against timm's own Swin, which it must equal on whole windows (specification T9)."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock

from simdetr.detectors.position_encoding import sine_cell_positions
from simdetr.detectors.swin_ram import (
    HIDDEN,
    PatchAccess,
    RamSwin,
    attend_windows,
    create_swin,
    ram_block,
    resize_mask,
    shift_mask,
)


def make_ram(name="swin_pico", num_tokens=6, tail=16, **changes):
    torch.manual_seed(0)
    return RamSwin(create_swin(name, drop_path=changes.pop("drop_path", None)), num_tokens, 12, tail, **changes).eval()


def blank(images):
    return torch.zeros(1, *images.shape[-2:], dtype=torch.bool)


@pytest.mark.parametrize(("name", "size"), [("swin_nano", (224, 224)), ("swin_pico", (224, 448))])
@torch.no_grad()
def test_maps_are_timms_where_windows_fit(name, size):
    ram, images = make_ram(name), torch.randn(1, 3, *size)
    maps = ram(images, blank(images)).maps
    reference = ram.body.forward_intermediates(images, intermediates_only=True)
    assert len(maps) == len(reference) == 4
    for ours, timms in zip(maps[:3], reference[1:], strict=True):
        assert torch.equal(ours, timms)


@torch.no_grad()
def test_maps_differ_from_timms_where_windows_are_padded():
    """ViDT pads before the shift, timm after it."""
    ram, images = make_ram("swin_nano"), torch.randn(1, 3, 200, 264)
    maps = ram(images, blank(images)).maps
    reference = ram.body.forward_intermediates(images, intermediates_only=True)[1:]
    assert all((ours - timms).abs().max() > 1e-3 for ours, timms in zip(maps[:3], reference, strict=True))


@torch.no_grad()
def test_tokens_do_not_change_maps():
    ram, images = make_ram(), torch.randn(2, 3, 100, 132)
    before = ram(images, blank(images))
    ram.det_token.normal_()
    ram.det_pos_embed.normal_()
    after = ram(images, blank(images))
    assert all(torch.equal(a, b) for a, b in zip(before.maps, after.maps, strict=True))
    assert not torch.allclose(before.tokens, after.tokens, atol=1e-2)


@torch.no_grad()
def test_shapes_of_the_original():
    ram = make_ram("swin_nano", num_tokens=100, tail=256)
    images = torch.randn(1, 3, 200, 264)
    found = ram(images, blank(images))
    assert [tuple(m.shape[1:]) for m in found.maps] == [(96, 25, 33), (192, 13, 17), (384, 7, 9), (256, 4, 5)]
    assert found.tokens.shape == (1, 100, 384) == (1, 100, ram.token_channels)
    assert ram.channels == [96, 192, 384, 256] and make_ram(tail=None).channels == [64, 128, 256]


@pytest.mark.parametrize("size", [(4, 4), (30, 33), (65, 97)])
@torch.no_grad()
def test_any_size(size):
    images = torch.randn(2, 3, *size)
    ram = make_ram()
    found = ram(images, blank(images))
    assert found.maps[0].shape[-2:] == tuple(math.ceil(side / 8) for side in size)
    # patches cut by the border are filled up with zeros
    filled = torch.zeros(2, 3, *(math.ceil(side / 4) * 4 for side in size))
    filled[..., : size[0], : size[1]] = images
    assert torch.equal(ram(filled, blank(filled)).maps[3], found.maps[3])


@torch.no_grad()
def test_access_to_patches():
    """The mask is resized to an eighth of the finest grid first, positions are those of DETR."""
    ram = make_ram(num_tokens=2)
    mask = torch.zeros(2, 200, 264, dtype=torch.bool)
    mask[1, 100:] = True
    small = resize_mask(mask, (50 // 8, 66 // 8))
    access = ram._access(small, torch.zeros(2, 7, 9, 256))
    stage = resize_mask(small, (7, 9))
    assert stage[1].any(1).tolist() == [False] * 4 + [True] * 3  # rows 0 to 6 read rows 0 0 1 2 3 4 5 of the eighth
    torch.testing.assert_close(access.positions.permute(0, 3, 1, 2), sine_cell_positions(stage, 256, centred=False))
    assert (access.bias[:, 0, 0, :63] == HIDDEN).equal(stage.flatten(1))
    assert access.bias[..., 63:].count_nonzero() == 0


@torch.no_grad()
def test_only_the_last_stage_lets_tokens_read_patches():
    ram, images = make_ram(), torch.randn(1, 3, 64, 64)
    tokens = {}
    ram.body.layers[3].downsample.norm.register_forward_pre_hook(
        lambda _, args: tokens.setdefault(len(tokens), args[0])
    )
    first, second = ram(images, blank(images)), ram(images + 1.0, blank(images))
    # the norm sees the tokens of an image, then its patches: the tokens of both runs agree until here, then no more
    assert torch.equal(tokens[0], tokens[2]) and not torch.equal(tokens[1], tokens[3])
    assert not torch.allclose(first.tokens, second.tokens, atol=1e-3)


def test_checkpointing_changes_memory_alone():
    images = torch.randn(2, 3, 64, 80)
    grads = []
    for checkpointing in (False, True):
        ram = make_ram(activation_checkpointing=checkpointing, drop_path=0.5).train()
        torch.manual_seed(3)
        found = ram(images, blank(images))
        (found.tokens.square().sum() + sum(m.square().mean() for m in found.maps)).backward()
        grads.append({name: parameter.grad for name, parameter in ram.named_parameters()})
    assert all(grad is not None for grad in grads[0].values())
    torch.testing.assert_close(grads[1], grads[0])


def test_names_and_loading_stay_timms():
    ram = make_ram()
    names = {name.removeprefix("body.") for name in ram.state_dict() if name.startswith("body.")}
    plain = set(create_swin("swin_pico").state_dict())
    assert plain - names == {"norm.weight", "norm.bias"} and names <= plain
    assert {name.split(".")[0] for name in ram.state_dict()} == {
        "body",
        "det_token",
        "det_pos_embed",
        "det_pos_linear",
        "tail",
    }
    for parameter in (ram.det_token, ram.det_pos_embed):
        assert 0 < parameter.abs().max() < 0.1


@pytest.mark.parametrize(
    ("name", "rate"), [("swin_nano", 0.0), ("swin_tiny_patch4_window7_224", 0.2), ("swin_s3_tiny_224", 0.1)]
)
def test_stochastic_depth_of_the_original(name, rate):
    with torch.device("meta"):
        swin = create_swin(name)
    drops = [module.drop_prob for module in swin.modules() if isinstance(module, DropPath)]
    assert max(drops, default=0.0) == pytest.approx(rate)
    assert {block.shift_size for stage in swin.layers for block in stage.blocks} >= {(0, 0), (3, 3)}
    assert swin.layers[3].blocks[1].shift_size == (3, 3)


def test_unsuitable_bodies():
    with pytest.raises(ValueError, match="'resnet18' is no Swin transformer"):
        create_swin("resnet18")
    with pytest.raises(ValueError, match="'swinv2_tiny_window8_256' is no Swin transformer"):
        create_swin("swinv2_tiny_window8_256")
    with pytest.raises(ValueError, match="'swin_nano' has no weights in timm"):
        create_swin("swin_nano", pretrained=True)
    with torch.device("meta"):
        second = timm.create_model("swinv2_tiny_window8_256")
    with pytest.raises(ValueError, match=r"must be timm.*SwinTransformer itself, got .*SwinTransformerV2"):
        RamSwin(second, 4, 12, None)

    class Changed(SwinTransformer):
        pass

    with pytest.raises(ValueError, match=r"SwinTransformer itself, got .*Changed"):
        RamSwin(Changed(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)), 4, 12, None)
    with pytest.raises(ValueError, match="4 stages, got 2"):
        RamSwin(SwinTransformer(embed_dim=8, depths=(1, 1), num_heads=(1, 1)), 4, 12, None)


def test_timm_has_the_names_that_are_used():
    swin = create_swin("swin_pico")
    assert swin.patch_embed.patch_size == (4, 4)
    assert swin.patch_embed(torch.zeros(1, 3, 40, 56)).shape == (1, 10, 14, 32)
    assert [type(stage.downsample).__name__ for stage in swin.layers] == ["Identity"] + ["PatchMerging"] * 3
    merging = swin.layers[1].downsample
    assert merging.norm.weight.shape == (128,) and merging.reduction.weight.shape == (64, 128)
    swin.prune_intermediate_layers(prune_norm=True, prune_head=True)
    assert len(swin.layers) == 4 and not list(swin.norm.parameters()) and not list(swin.head.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# One block against attention with explicit loops (T10) and timm's own, and the names of timm that it relies on.


HEIGHT, WIDTH, TOKENS, DIM, HEADS = 3, 4, 5, 8, 2


def make_block(shift=0, drop_path=0.0):
    """A Swin block with weights that matter."""
    torch.manual_seed(0)
    block = SwinTransformerBlock(
        DIM,
        (14, 14),
        num_heads=HEADS,
        window_size=7,
        shift_size=shift,
        always_partition=True,
        dynamic_mask=True,
        drop_path=drop_path,
    )
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block.eval()


def make_inputs(batch=2):
    torch.manual_seed(1)
    patches, tokens = torch.randn(batch, HEIGHT, WIDTH, DIM), torch.randn(batch, TOKENS, DIM)
    return patches, tokens, torch.randn(1, TOKENS, 6), torch.nn.Linear(6, DIM)


def naive_tokens(block, place, patches, tokens, token_positions, access):
    """The tokens after a block: every token looks at every key, one after the other, in float64."""
    block, place = block.double(), place.double()
    tokens, size = tokens.double(), DIM // HEADS
    normed = block.norm1(tokens) + place(token_positions.double())
    out = torch.zeros_like(normed)
    for image in range(len(tokens)):
        keys = list(block.attn.qkv(normed[image]))
        hidden = [0.0] * len(keys)
        if access is not None:
            seen = block.norm1(patches.double())[image] + access.positions[image].double()
            keys = [*block.attn.qkv(seen.flatten(0, 1)), *keys]
            hidden = [*access.bias[image, 0, 0].tolist()]
        for row in range(TOKENS):
            query = block.attn.qkv(normed[image, row])[:DIM]
            for head in range(HEADS):
                part = slice(head * size, (head + 1) * size)
                scores = []
                for key, bias in zip(keys, hidden, strict=True):
                    scores.append(float(query[part] @ key[DIM : 2 * DIM][part]) / math.sqrt(size) + bias)
                total = sum(math.exp(score) for score in scores)
                for key, score in zip(keys, scores, strict=True):
                    out[image, row, part] += math.exp(score) / total * key[2 * DIM :][part]
    tokens = tokens + block.attn.proj(out)
    return (tokens + block.mlp(block.norm2(tokens))).float()


@pytest.mark.parametrize("crossing", [False, True])
@torch.no_grad()
def test_tokens_attend_as_with_explicit_loops(crossing):
    block, (patches, tokens, positions, place) = make_block(), make_inputs()
    access = None
    if crossing:
        bias = torch.zeros(2, 1, 1, HEIGHT * WIDTH + TOKENS)
        bias[1, ..., 6 : HEIGHT * WIDTH] = HIDDEN
        access = PatchAccess(torch.randn(2, HEIGHT, WIDTH, DIM), bias)
    found = ram_block(block, place, patches, tokens, positions, None, access)[1]
    expected = naive_tokens(block, place, patches, tokens, positions, access)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_hidden_patches_do_not_matter():
    block, (patches, tokens, positions, place) = make_block(), make_inputs()
    bias = torch.zeros(1, 1, 1, HEIGHT * WIDTH + TOKENS)
    bias[..., 8 : HEIGHT * WIDTH] = HIDDEN
    access = PatchAccess(torch.zeros(1, HEIGHT, WIDTH, DIM), bias)
    changed = patches.clone()
    changed[:, 2] = 3.0 * torch.randn_like(changed[:, 2])
    found = ram_block(block, place, patches, tokens, positions, None, access)[1]
    torch.testing.assert_close(ram_block(block, place, changed, tokens, positions, None, access)[1], found)
    changed[:, 0] += 1.0 * torch.randn_like(changed[:, 0])
    assert not torch.allclose(ram_block(block, place, changed, tokens, positions, None, access)[1], found, atol=1e-2)


@pytest.mark.parametrize("shift", [0, 3])
@torch.no_grad()
def test_patches_are_timms_where_windows_fit(shift):
    block, (_, tokens, positions, place) = make_block(shift), make_inputs()
    patches = torch.randn(2, 14, 21, DIM)
    found = ram_block(block, place, patches, tokens, positions, shift_mask(block, patches), None)[0]
    assert torch.equal(found, block(patches))


@torch.no_grad()
def test_zeros_come_before_the_shift():
    """The first cell of a shifted 3 x 4 map: the roll moves it to the far end of padding that stands in between."""
    block, (patches, *_) = make_block(shift=3), make_inputs()
    found = attend_windows(block, patches, shift_mask(block, patches))
    padded = torch.zeros(2, 7, 7, DIM)
    padded[:, :HEIGHT, :WIDTH] = patches
    rows, columns = (torch.arange(7) + 3) % 7, (torch.arange(7) + 3) % 7
    window = padded[:, rows][:, :, columns].flatten(1, 2)
    attended = block.attn(window, mask=shift_mask(block, patches)).unflatten(1, (7, 7))
    expected = torch.zeros_like(padded)
    for row in range(7):
        for column in range(7):
            expected[:, rows[row], columns[column]] = attended[:, row, column]
    torch.testing.assert_close(found, expected[:, :HEIGHT, :WIDTH])
    assert not torch.allclose(found, block._attn(patches), atol=1e-2)


def test_shift_mask_has_the_size_of_the_padded_map():
    patches = torch.zeros(1, 8, 15, DIM)
    assert shift_mask(make_block(shift=3), patches).shape == (2 * 3, 49, 49)
    assert shift_mask(make_block(), patches) is None


@torch.no_grad()
def test_an_image_is_dropped_for_patches_and_tokens_together():
    block, (patches, tokens, positions, place) = make_block(drop_path=0.5), make_inputs(batch=32)
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    torch.nn.init.zeros_(block.mlp.fc2.bias)
    whole = ram_block(block, place, patches, tokens, positions, None, None)
    found = ram_block(block.train(), place, patches, tokens, positions, None, None)
    kept = []
    for image in range(32):
        factors = []
        for before, full, now in zip((patches, tokens), whole, found, strict=True):
            update, now = full[image] - before[image], now[image] - before[image]
            factors.append(float((now * update).sum() / (update * update).sum()))
            torch.testing.assert_close(now, round(factors[-1]) * update, rtol=1e-3, atol=1e-4)
        assert round(factors[0]) == round(factors[1])
        kept.append(round(factors[0]))
    assert set(kept) == {0, 2}


def test_timm_has_the_names_of_a_block():
    """A timm that renames them has to fail here, not in a training."""
    block = make_block(shift=3, drop_path=0.1)
    assert (block.window_size, block.shift_size, block.dim) == ((7, 7), (3, 3), DIM)
    assert isinstance(block.drop_path1, DropPath) and isinstance(block.drop_path2, DropPath)
    assert isinstance(make_block().drop_path1, torch.nn.Identity)
    attention = block.attn
    assert (attention.num_heads, attention.scale) == (HEADS, (DIM // HEADS) ** -0.5)
    assert attention.qkv.weight.shape == (3 * DIM, DIM) and attention.qkv.bias.shape == (3 * DIM,)
    assert attention.proj.weight.shape == (DIM, DIM) and isinstance(attention.attn_drop, torch.nn.Dropout)
    assert attention.proj_drop(torch.ones(1)) == 1 and attention.relative_position_bias_table.shape == (169, HEADS)
    assert block.get_attn_mask(torch.zeros(1, 7, 7, 1)).shape == (1, 49, 49)
