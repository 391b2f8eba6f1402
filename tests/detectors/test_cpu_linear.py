"""Linear layers by oneDNN: torch's values and gradients, and torch itself where oneDNN is not for."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simdetr.detectors import cpu_linear
from simdetr.detectors.cpu_linear import Linear, linear


def rand(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def products(monkeypatch):
    """How often oneDNN multiplied."""
    calls = []
    cpu_linear._has_onednn()  # which multiplies as well, once
    own = cpu_linear._product
    monkeypatch.setattr(cpu_linear, "_product", lambda *args: (calls.append(args), own(*args))[1])
    return calls


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (2, 1, 4, 8), (1, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_torchs(shape, bias, products):
    results = []
    for function in (linear, F.linear):
        inputs = [rand(*shape), rand(6, 8, seed=1), *([rand(6, seed=2)] if bias else [])]
        leaves = [value.requires_grad_() for value in inputs]
        out = function(*leaves, *([] if bias else [None]))
        (out * rand(*out.shape, seed=3)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert len(products) == 3
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_rows_and_weights_in_any_layout():
    rows, weight = rand(3, 8, 5).transpose(1, 2), rand(8, 6).t()
    torch.testing.assert_close(linear(rows, weight, None), F.linear(rows, weight))
    torch.testing.assert_close(linear(rows[:, ::2], weight, None), F.linear(rows[:, ::2], weight))


def test_only_the_gradients_that_are_wanted(products):
    weight = rand(6, 8, seed=1).requires_grad_()
    linear(rand(5, 8), weight, rand(6)).sum().backward()
    assert len(products) == 2 and weight.grad is not None


def test_the_result_can_be_changed_in_place():
    layer, reference = Linear(8, 6), nn.Linear(8, 6)
    reference.load_state_dict(layer.state_dict())
    rows = [rand(2, 3, 8).requires_grad_() for _ in range(2)]
    layer(rows[0]).relu_().pow(2).sum().backward()
    F.relu(reference(rows[1])).pow(2).sum().backward()
    torch.testing.assert_close(rows[0].grad, rows[1].grad)
    torch.testing.assert_close(layer.weight.grad, reference.weight.grad)


def test_torch_multiplies_everything_else(products, monkeypatch):
    layer = Linear(8, 6)
    rows = rand(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(rows).dtype == torch.bfloat16
    assert layer.double()(rows.double()).dtype == torch.float64
    layer.float()
    assert layer(rows[:0]).shape == (0, 6)
    assert layer.to("meta")(rows.to("meta")).device.type == "meta"
    compiled = torch.compile(Linear(8, 6), backend="eager", fullgraph=True)
    assert compiled(rows).shape == (5, 6)
    monkeypatch.setattr(cpu_linear, "_has_onednn", lambda: False)
    Linear(8, 6)(rows)
    assert products == []


def test_double_precision_passes_gradcheck():
    inputs = [rand(*size, dtype=torch.float64).requires_grad_() for size in ((3, 4), (2, 4), (2,))]
    assert torch.autograd.gradcheck(linear, inputs)


def test_a_torch_without_the_operator_is_seen(monkeypatch):
    cpu_linear._has_onednn.cache_clear()
    monkeypatch.setattr(cpu_linear, "_product", lambda *args: torch.ops.mkldnn.there_is_no_such_operator(*args))
    assert not cpu_linear._has_onednn()
    cpu_linear._has_onednn.cache_clear()


def test_layers_are_torchs_to_everything_that_keeps_them():
    layer = Linear(8, 6)
    assert isinstance(layer, nn.Linear) and list(layer.state_dict()) == ["weight", "bias"]
    again = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(again(rand(2, 8)), layer(rand(2, 8)))
