"""The body with tokens against timm's own Swin, which it must equal on whole windows (specification T9)."""

import math

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformer

from simdetr.detectors.position_encoding import sine_cell_positions
from simdetr.detectors.swin_ram import HIDDEN, RamSwin, create_swin, resize_mask


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
