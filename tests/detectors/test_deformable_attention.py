"""Deformable attention against explicit loops, exact cases and finite differences (specification T1 to T3)."""

import math

import pytest
import torch

from simdetr.detectors.deformable_attention import MSDeformAttn, multi_scale_deformable_attention

SHAPES = [(6, 4), (3, 2)]


def random_inputs(seed=0, batch=1, heads=2, dim=2, queries=2, points=2, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    value = rand(batch, sum(h * w for h, w in shapes), heads, dim)
    locations = rand(batch, queries, heads, len(shapes), points, 2) * 1.6 - 0.3
    weights = rand(batch, queries, heads, len(shapes) * points).softmax(-1).unflatten(-1, (len(shapes), points))
    return value, locations, weights


def bilinear(level, x, y):
    """Bilinear sample of [h, w, D] at continuous pixel coordinates; outside is zero."""
    height, width = level.shape[:2]
    total = torch.zeros(level.shape[2], dtype=level.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(x - column)) * (1 - abs(y - row)) * level[row, column]
    return total


def by_loops(value, shapes, locations, weights):
    batch, _, heads, dim = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    out = torch.zeros(batch, queries, heads, dim, dtype=value.dtype)
    for b in range(batch):
        for n in range(queries):
            for m in range(heads):
                start = 0
                for level, (height, width) in enumerate(shapes):
                    cells = value[b, start : start + height * width, m].view(height, width, dim)
                    start += height * width
                    for p in range(points):
                        x, y = locations[b, n, m, level, p].tolist()
                        sample = bilinear(cells, x * width - 0.5, y * height - 0.5)
                        out[b, n, m] += weights[b, n, m, level, p] * sample
    return out.flatten(2)


@pytest.mark.parametrize("seed", range(5))
def test_matches_explicit_loops(seed):
    value, locations, weights = random_inputs(seed, batch=2, heads=3, dim=5, queries=4)
    found = multi_scale_deformable_attention(value, SHAPES, locations, weights)
    torch.testing.assert_close(found, by_loops(value, SHAPES, locations, weights), rtol=0, atol=1e-12)


def test_passes_gradcheck():
    value, locations, weights = (tensor.requires_grad_() for tensor in random_inputs(seed=2))

    def function(v, x, w):
        return multi_scale_deformable_attention(v, SHAPES, x, w)

    assert torch.autograd.gradcheck(function, (value, locations, weights))


def test_cell_centres_return_the_cells():
    height, width = 3, 5
    value = torch.randn(1, height * width, 1, 4, generator=torch.Generator().manual_seed(0))
    ys, xs = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    locations = torch.stack((xs, ys), dim=-1).view(1, -1, 1, 1, 1, 2)
    found = multi_scale_deformable_attention(value, [(height, width)], locations, torch.ones(1, 15, 1, 1, 1))
    torch.testing.assert_close(found, value[:, :, 0], rtol=0, atol=1e-6)


def test_constant_map_returns_the_constant_inside_and_fades_outside():
    value = torch.full((1, 24, 1, 1), 3.0)
    places = torch.tensor([[0.2, 0.5], [0.8, 0.3], [0.0, 0.5], [-1.0, 0.5]]).view(1, 4, 1, 1, 1, 2)
    found = multi_scale_deformable_attention(value, [(6, 4)], places, torch.ones(1, 4, 1, 1, 1))
    # at the outer edge of the first cell half of the sample lies outside
    torch.testing.assert_close(found.flatten(), torch.tensor([3.0, 3.0, 1.5, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision_is_computed_in_float32(dtype):
    value, locations, weights = (tensor.float() for tensor in random_inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = multi_scale_deformable_attention(value.to(dtype), SHAPES, locations, weights)
    expected = multi_scale_deformable_attention(value.to(dtype).float(), SHAPES, locations, weights)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=0)


def identity_attention(dim=8, levels=1, heads=1, points=1):
    attention = MSDeformAttn(dim, levels, heads, points)
    with torch.no_grad():
        attention.sampling_offsets.bias.zero_()
        for projection in (attention.value_proj, attention.output_proj):
            projection.weight.copy_(torch.eye(dim))
    return attention


def test_offsets_are_in_cells_x_first():
    """On a map that is not square an offset of (1, 0) moves exactly one column."""
    height, width = 3, 5
    attention = identity_attention()
    with torch.no_grad():
        attention.sampling_offsets.bias.copy_(torch.tensor([1.0, 0.0]))
    memory = torch.randn(1, height * width, 8, generator=torch.Generator().manual_seed(1))
    ys, xs = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    reference = torch.stack((xs, ys), dim=-1).view(1, -1, 1, 2)
    found = attention(torch.zeros(1, 15, 8), reference, memory, [(height, width)]).view(height, width, 8)
    cells = memory.view(height, width, 8)
    torch.testing.assert_close(found[:, :-1], cells[:, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, -1], torch.zeros(height, 8), rtol=0, atol=1e-5)


def test_offsets_at_boxes_are_fractions_of_half_their_size():
    """With P points an offset of P reaches the edge of the reference box."""
    attention = identity_attention(points=2)
    with torch.no_grad():
        attention.sampling_offsets.bias.copy_(torch.tensor([2.0, 0.0, 2.0, 0.0]))
    memory = torch.arange(10.0)[None, :, None].expand(1, 10, 8)
    box = torch.tensor([0.35, 0.5, 0.4, 1.0]).view(1, 1, 1, 4)
    found = attention(torch.zeros(1, 1, 8), box, memory, [(1, 10)])
    # the right edge 0.55 is the centre of column 5; the map is one row high, so y = 0.5 hits it squarely
    torch.testing.assert_close(found, torch.full((1, 1, 8), 5.0))


def test_padding_reads_as_zero_after_the_projection():
    attention = MSDeformAttn(8, 2, 2, 2)
    with torch.no_grad():
        attention.value_proj.bias.fill_(1.0)
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(1, 30, 8, generator=generator)
    padding = torch.zeros(1, 30, dtype=torch.bool)
    padding[:, 10:20] = True
    query, reference = torch.randn(1, 3, 8, generator=generator), torch.rand(1, 3, 2, 2, generator=generator)
    found = attention(query, reference, memory, SHAPES, padding)
    garbage = memory.masked_fill(padding[..., None], 1e6)
    torch.testing.assert_close(attention(query, reference, garbage, SHAPES, padding), found)
    everything = torch.ones(1, 30, dtype=torch.bool)
    silent = attention(query, reference, memory, SHAPES, everything)
    torch.testing.assert_close(silent, attention.output_proj.bias.expand_as(silent))


def test_initialisation():
    attention = MSDeformAttn(32, 3, 8, 4)
    offsets = attention.sampling_offsets.bias.view(8, 3, 4, 2)
    compass = torch.tensor(
        [[1.0, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]],
    )
    for level in range(3):
        for point in range(4):
            torch.testing.assert_close(offsets[:, level, point], compass * (point + 1), rtol=0, atol=1e-5)
    assert attention.sampling_offsets.weight.count_nonzero() == 0
    assert attention.attention_weights.weight.count_nonzero() == 0
    assert attention.attention_weights.bias.count_nonzero() == 0
    bound = math.sqrt(6 / 64)
    for projection in (attention.value_proj, attention.output_proj):
        assert projection.bias.count_nonzero() == 0
        assert 0.9 * bound < projection.weight.abs().max() <= bound


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="multiple of num_heads, got 10 and 4"):
        MSDeformAttn(10, 1, 4, 1)
