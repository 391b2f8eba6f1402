"""Deformable attention against explicit loops, exact cases and finite differences (specification T1 to T3)."""

import importlib.util
import math

import pytest
import torch
from torch import nn

from simdetr.detectors import deformable_attention
from simdetr.detectors.deformable_attention import (
    ENVIRONMENT_VARIABLE,
    IMPLEMENTATIONS,
    MSDeformAttn,
    choose_implementation,
    multi_scale_deformable_attention,
    obstacle,
    set_implementation,
)

SHAPES = [(6, 4), (3, 2)]
on_cpu = pytest.mark.parametrize("implementation", ["rows", "grid_sample"])


@pytest.fixture(autouse=True)
def _no_choice_from_outside(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


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


@on_cpu
@pytest.mark.parametrize("seed", range(5))
def test_matches_explicit_loops(seed, implementation, attention_inputs):
    value, locations, weights = attention_inputs(SHAPES, seed=seed, batch=2, heads=3, dim=5, queries=4)
    found = multi_scale_deformable_attention(value, SHAPES, locations, weights, implementation)
    torch.testing.assert_close(found, by_loops(value, SHAPES, locations, weights), rtol=0, atol=1e-12)


@on_cpu
def test_passes_gradcheck(implementation, attention_inputs):
    """Some places lie outside; nine queries give the coarse level more points than cells, not the fine one."""

    def function(v, x, w):
        return multi_scale_deformable_attention(v, SHAPES, x, w, implementation)

    inputs = [tensor.requires_grad_() for tensor in attention_inputs(SHAPES, seed=2, dim=2, queries=9)]
    assert torch.autograd.gradcheck(function, inputs)


@on_cpu
def test_cell_centres_return_the_cells(implementation):
    height, width = 3, 5
    value = torch.randn(1, height * width, 1, 4, generator=torch.Generator().manual_seed(0))
    ys, xs = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    locations = torch.stack((xs, ys), dim=-1).view(1, -1, 1, 1, 1, 2)
    found = multi_scale_deformable_attention(
        value, [(height, width)], locations, torch.ones(1, 15, 1, 1, 1), implementation
    )
    torch.testing.assert_close(found, value[:, :, 0], rtol=0, atol=1e-6)


@on_cpu
def test_constant_map_returns_the_constant_inside_and_fades_outside(implementation):
    value = torch.full((1, 24, 1, 1), 3.0)
    places = torch.tensor([[0.2, 0.5], [0.8, 0.3], [0.0, 0.5], [-1.0, 0.5]]).view(1, 4, 1, 1, 1, 2)
    found = multi_scale_deformable_attention(value, [(6, 4)], places, torch.ones(1, 4, 1, 1, 1), implementation)
    # at the outer edge of the first cell half of the sample lies outside
    torch.testing.assert_close(found.flatten(), torch.tensor([3.0, 3.0, 1.5, 0.0]))


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision_is_computed_in_float32(dtype, implementation, attention_inputs):
    value, locations, weights = (tensor.float() for tensor in attention_inputs(SHAPES))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = multi_scale_deformable_attention(value.to(dtype), SHAPES, locations, weights, implementation)
    expected = multi_scale_deformable_attention(value.to(dtype).float(), SHAPES, locations, weights, implementation)
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


@on_cpu
def test_levels_without_cells_count_as_zero(implementation, attention_inputs):
    value, locations, weights = (tensor.requires_grad_() for tensor in attention_inputs([(6, 4), (0, 3), (3, 2)]))
    found = multi_scale_deformable_attention(value, [(6, 4), (0, 3), (3, 2)], locations, weights, implementation)
    filled = [0, 2]
    expected = by_loops(value, SHAPES, locations[:, :, :, filled], weights[:, :, :, filled])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    found.sum().backward()
    assert locations.grad[:, :, :, 1].count_nonzero() == weights.grad[:, :, :, 1].count_nonzero() == 0


@on_cpu
@pytest.mark.parametrize(("batch", "queries"), [(2, 0), (0, 3)])
def test_nothing_to_compute(implementation, batch, queries, attention_inputs):
    value, locations, weights = attention_inputs(SHAPES, batch=batch, queries=queries)
    value.requires_grad_()
    found = multi_scale_deformable_attention(value, SHAPES, locations, weights, implementation)
    assert found.shape == (batch, queries, 8)
    found.sum().backward()
    assert value.grad.count_nonzero() == 0


def test_sizes_must_fit_together(attention_inputs):
    value, locations, weights = attention_inputs(SHAPES)
    with pytest.raises(ValueError, match=r"shapes must have as many cells.*\(3, 3\)\] and 30"):
        multi_scale_deformable_attention(value, [(6, 4), (3, 3)], locations, weights)
    with pytest.raises(ValueError, match="one at least"):
        multi_scale_deformable_attention(value[:, :0], [(0, 4), (3, 0)], locations, weights)
    with pytest.raises(ValueError, match="a level for each of shapes, got 2 and 1"):
        multi_scale_deformable_attention(value[:, :24], SHAPES[:1], locations, weights)


def used_names(monkeypatch):
    """Names of the CPU's implementations, in the order of their use from now on."""
    used = []
    for name in ("rows", "grid_sample"):
        original = getattr(deformable_attention, f"by_{name}")
        recorded = lambda *args, name=name, original=original: (used.append(name), original(*args))[1]  # noqa: E731
        monkeypatch.setattr(deformable_attention, f"by_{name}", recorded)
    return used


def test_argument_before_environment_before_choice(monkeypatch, attention_inputs):
    inputs = attention_inputs(SHAPES)
    used = used_names(monkeypatch)
    multi_scale_deformable_attention(inputs[0], SHAPES, *inputs[1:])
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "grid_sample")
    multi_scale_deformable_attention(inputs[0], SHAPES, *inputs[1:])
    multi_scale_deformable_attention(inputs[0], SHAPES, *inputs[1:], "rows")
    assert used == ["rows", "grid_sample", "rows"]


def test_implementation_is_set_for_a_whole_model(monkeypatch):
    model = nn.Sequential(MSDeformAttn(8, 2, 2, 2), nn.ModuleList([MSDeformAttn(8, 2, 2, 2)]))
    set_implementation(model, "grid_sample")
    used = used_names(monkeypatch)
    for attention in (model[0], model[1][0]):
        attention(torch.zeros(1, 3, 8), torch.rand(1, 3, 2, 2), torch.zeros(1, 30, 8), SHAPES)
    assert used == ["grid_sample", "grid_sample"]
    with pytest.raises(ValueError, match="one of auto, triton, rows, grid_sample, got 'cuda'"):
        set_implementation(model, "cuda")


def test_errors_of_the_choice_say_who_wanted_it_and_why_not(monkeypatch):
    with pytest.raises(
        ValueError, match=r"implementation 'rows' cannot .* written for the CPU, not for cuda.*use 'auto'"
    ):
        choose_implementation("cuda", 0, torch.float32, "rows")
    with pytest.raises(ValueError, match="implementation must be one of auto, triton, rows, grid_sample, got 'fast'"):
        choose_implementation("cpu", None, torch.float32, "fast")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE} 'triton' cannot compute"):
        choose_implementation("cpu", None, torch.float32)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE} must be one of"):
        choose_implementation("cpu", None, torch.float32)


def test_cuda_takes_triton_only_where_it_works(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for failure, chosen in ((None, "triton"), ("Triton does not work here (no compiler)", "grid_sample")):
        monkeypatch.setattr(deformable_attention, "_triton_failure", lambda index, failure=failure: failure)
        assert choose_implementation("cuda", 0, torch.bfloat16) == chosen
        assert choose_implementation("cuda", 0, torch.float64) == "grid_sample"
    with pytest.raises(ValueError, match=r"'triton' cannot .* \(no compiler\)"):
        choose_implementation("cuda", 0, torch.float32, "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert obstacle("triton", "cuda", 0) == "the package triton is not installed"
    assert choose_implementation("mps", None, torch.float32) == "grid_sample"
    assert choose_implementation("cpu", None, torch.float32) == "rows"
    assert set(IMPLEMENTATIONS) == {"triton", "rows", "grid_sample"}


def test_a_device_where_triton_fails_is_told_once(monkeypatch):
    """There is no such device: whatever goes wrong becomes the reason."""
    deformable_attention._triton_failure.cache_clear()
    tries = []

    def try_out(device):
        tries.append(device)
        raise OSError("gcc:\nnot found")

    pytest.importorskip("triton")
    monkeypatch.setattr("simdetr.detectors.deformable_attention_triton.try_out", try_out)
    for _ in range(2):
        assert obstacle("triton", "cuda", 7) == "Triton does not work here (OSError: gcc: not found)"
    assert tries == [torch.device("cuda", 7)]
    deformable_attention._triton_failure.cache_clear()


def test_exported_graphs_hold_grid_sample():
    attention = MSDeformAttn(8, 2, 2, 2)
    arguments = (torch.zeros(1, 3, 8), torch.rand(1, 3, 2, 2), torch.zeros(1, 30, 8), SHAPES)
    modules = torch.export.export(attention, arguments).graph_module.modules()
    names = [str(node.target) for module in modules for node in module.graph.nodes]
    assert sum("grid_sampler" in name for name in names) == 2
    assert not any("simdetr" in name for name in names)


@pytest.mark.parametrize(("implementation", "dynamic"), [("auto", True), ("grid_sample", False)])
def test_compiles_without_graph_breaks(implementation, dynamic):
    attention = MSDeformAttn(8, 2, 2, 2)
    nn.init.normal_(attention.sampling_offsets.weight, generator=torch.Generator().manual_seed(0))
    set_implementation(attention, implementation)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    generator = torch.Generator().manual_seed(1)
    query, reference = torch.randn(2, 3, 8, generator=generator), torch.rand(2, 3, 2, 2, generator=generator)
    gradients = []
    for function in (attention, compiled):
        memory = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
        attention.zero_grad()
        function(query, reference, memory, SHAPES).square().sum().backward()
        gradients.append([memory.grad, *(parameter.grad.clone() for parameter in attention.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.compiler.reset()
