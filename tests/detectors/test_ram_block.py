"""One block against attention with explicit loops (T10) and timm's own, and the names of timm that it relies on."""

import math

import pytest
import torch
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformerBlock

from simdetr.detectors.swin_ram import HIDDEN, PatchAccess, attend_windows, ram_block, shift_mask

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


def test_timm_has_the_names_that_are_used():
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
