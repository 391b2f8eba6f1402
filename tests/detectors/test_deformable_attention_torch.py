"""The two formulations in plain PyTorch against each other; test_deformable_attention.py has loops and gradcheck."""

import pytest
import torch

from simdetr.detectors import deformable_attention_torch
from simdetr.detectors.deformable_attention_torch import by_grid_sample, by_rows, constant_table


def results(function, shapes, value, locations, weights):
    """Output and gradients for a fixed random gradient of the output."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (value, locations, weights)]
    found = function(inputs[0], shapes, inputs[1], inputs[2])
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(9), dtype=found.dtype)
    return [found.detach(), *torch.autograd.grad(found, inputs, grad)]


@pytest.mark.parametrize(
    "shapes",
    [[(6, 4), (3, 2)], [(1, 7), (5, 1), (1, 1)], [(2, 2), (1, 2), (2, 1)], [(9, 11)]],
    ids=["usual", "one cell wide", "two cells wide", "one level"],
)
@pytest.mark.parametrize("queries", [1, 5, 60])
@pytest.mark.parametrize("together", [1, 2**20])
def test_rows_agree_with_grid_sample(monkeypatch, shapes, queries, together, attention_inputs):
    """With few and many points per cell, images one by one and together, points inside and outside."""
    monkeypatch.setattr(deformable_attention_torch, "_POINTS_AT_ONCE", together)
    inputs = attention_inputs(shapes, batch=3, queries=queries)
    for found, expected in zip(
        results(by_rows, shapes, *inputs), results(by_grid_sample, shapes, *inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gradients_agree_on_the_lines_between_cells(attention_inputs):
    """The first points of a fresh model lie on centres of cells, where the sample bends; 0.125 is exact in binary."""
    shapes = [(4, 8)]
    xs, ys = (torch.arange(-3, 20) + 0.5) / 8, (torch.arange(-3, 20) + 0.5) / 4
    locations = torch.cartesian_prod(xs, ys).double().view(1, -1, 1, 1, 1, 2)
    value, _, weights = attention_inputs(shapes, heads=1, queries=locations.shape[1], points=1)
    for found, expected in zip(
        results(by_rows, shapes, value, locations, weights),
        results(by_grid_sample, shapes, value, locations, weights),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_float32_is_as_exact_as_grid_sample(attention_inputs):
    shapes = [(40, 60), (20, 30)]
    inputs = attention_inputs(shapes, batch=2, queries=300, dtype=torch.float32)
    exact = results(by_grid_sample, shapes, *(tensor.double() for tensor in inputs))
    ours, usual = results(by_rows, shapes, *inputs), results(by_grid_sample, shapes, *inputs)
    for found, other, expected in zip(ours, usual, exact, strict=True):
        assert (found - expected).abs().max() < 2 * (other - expected).abs().max()


@pytest.mark.parametrize("place", [float("nan"), float("inf"), -1e30])
def test_impossible_places_read_no_memory_elsewhere(place, attention_inputs):
    value, locations, weights = attention_inputs([(6, 4)], batch=2)
    locations[0, 2, 1, 0, 1, 0] = place
    found, *gradients = results(by_rows, [(6, 4)], value, locations, weights)
    assert found[1].isfinite().all()
    assert found[0, :2].isfinite().all()
    if place == place:
        assert found.isfinite().all()
        assert gradients[1][0, 2, 1, 0, 1].count_nonzero() == 0
    else:
        assert found[0, 2, 4:].isnan().all(), "a mistake upstream must not be hidden"


def test_rows_take_values_in_any_memory_layout(attention_inputs):
    shapes = [(6, 4), (3, 2)]
    value, locations, weights = attention_inputs(shapes, batch=2)
    turned = value.transpose(1, 2).contiguous().transpose(1, 2)
    moved = locations.movedim(-1, 0).contiguous().movedim(0, -1)
    assert not turned.is_contiguous()
    assert not moved.is_contiguous()
    for found, expected in zip(
        results(by_rows, shapes, turned, moved, weights),
        results(by_rows, shapes, value, locations, weights),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # within opcheck
def test_rows_are_a_well_behaved_operator(attention_inputs):
    inputs = [tensor.requires_grad_() for tensor in attention_inputs([(6, 4), (3, 2)])]
    arguments = (inputs[0], [6, 4, 3, 2], inputs[1], inputs[2])
    found = torch.library.opcheck(deformable_attention_torch._forward, arguments)
    assert set(found.values()) == {"SUCCESS"}


def test_rows_keep_no_samples_for_the_gradient(attention_inputs):
    """What autograd keeps is the inputs themselves."""
    inputs = [tensor.requires_grad_() for tensor in attention_inputs([(6, 4), (3, 2)])]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        by_rows(inputs[0], [(6, 4), (3, 2)], inputs[1], inputs[2])
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in inputs}


def test_constant_tables_are_made_once_and_serve_training():
    with torch.inference_mode():
        first = constant_table(((3, 5),), torch.float64, torch.device("cpu"))
    assert constant_table(((3, 5),), torch.float64, torch.device("cpu")) is first
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (weight * first).sum().backward()
    assert weight.grad.tolist() == [3.0, 5.0]
