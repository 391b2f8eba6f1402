"""Triton's kernels against the reference in float64: on a CUDA device, or through Triton's interpreter on the CPU.

The interpreter must be chosen before the kernels are imported: one test runs this file again in a process of its own.
"""

import os
import subprocess
import sys

import pytest
import torch

from simdetr.detectors.deformable_attention_torch import by_grid_sample

triton = pytest.importorskip("triton")

from simdetr.detectors import deformable_attention_triton  # noqa: E402 - there may be no Triton
from simdetr.detectors.deformable_attention_triton import by_triton, try_out  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
USUAL = [(6, 4), (3, 2)]
FLOAT = torch.float32


def on_device(test):
    """Run on a CUDA device, or in the interpreter's process."""
    if INTERPRETED:
        return test
    reason = "no CUDA device; test_through_the_interpreter runs it"
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)(test))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_through_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout[-5000:]
    assert " passed" in result.stdout


def results(function, shapes, inputs, grad):
    """Output and gradients, each in float64 on the CPU."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    found = function(leaves[0], shapes, leaves[1], leaves[2])
    gradients = torch.autograd.grad(found, leaves, grad.to(found))
    assert [found.dtype, *(tensor.dtype for tensor in gradients)] == [inputs[0].dtype, *(x.dtype for x in inputs)]
    return [tensor.detach().double().cpu() for tensor in (found, *gradients)]


def relative_errors(shapes, inputs):
    """Largest error of output and gradients of value, locations and weights, relative to the largest true number."""
    # drawn in the type of the output, so that both get the same numbers
    grad = torch.randn(inputs[1].shape[0], inputs[1].shape[1], inputs[0].shape[2] * inputs[0].shape[3])
    grad = grad.to(inputs[0].dtype)
    filled = [level for level, (height, width) in enumerate(shapes) if height * width]

    def reference(value, shapes, locations, weights):
        return by_grid_sample(value, [shapes[i] for i in filled], locations[:, :, :, filled], weights[:, :, :, filled])

    exact = results(reference, shapes, [tensor.double() for tensor in inputs], grad)
    found = results(by_triton, shapes, [tensor.to(DEVICE) for tensor in inputs], grad)
    return [float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, exact, strict=True)]


@on_device
@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        (USUAL, {"batch": 2, "heads": 3, "dim": 5, "queries": 7, "points": 3}),
        ([(1, 7), (5, 1), (1, 1)], {"dim": 1, "queries": 130, "points": 1, "heads": 1}),
        ([(7, 9)], {"batch": 3, "dim": 33, "queries": 9, "heads": 1}),
        ([(4, 5), (0, 3), (3, 2), (2, 0)], {"dim": 8, "queries": 3}),
        ([(5, 3), (3, 2), (2, 1), (1, 1), (2, 2)], {"dim": 16, "queries": 2, "points": 4, "heads": 1}),
    ],
    ids=["odd sizes", "one cell wide", "one level", "empty levels", "five levels"],
)
def test_float32_agrees_with_float64(shapes, sizes, attention_inputs):
    assert max(relative_errors(shapes, attention_inputs(shapes, dtype=FLOAT, **sizes))) < 1e-5


@on_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_values_with_full_locations(dtype, attention_inputs):
    """As under autocast: sums are float32, so only results in the reduced type are rounded, and only once."""
    value, locations, weights = attention_inputs(USUAL, dtype=FLOAT, queries=40)
    output, grad_value, grad_locations, grad_weights = relative_errors(USUAL, (value.to(dtype), locations, weights))
    once = torch.finfo(dtype).eps
    assert max(output, grad_value) < once
    assert max(grad_locations, grad_weights) < 1e-5


@on_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_reduced(dtype, attention_inputs):
    inputs = [tensor.to(dtype) for tensor in attention_inputs(USUAL, dtype=FLOAT)]
    assert max(relative_errors(USUAL, inputs)) < torch.finfo(dtype).eps


@on_device
@pytest.mark.parametrize("sizes", [{"queries": 0}, {"batch": 0}])
def test_nothing_to_compute(sizes, attention_inputs):
    inputs = [tensor.to(DEVICE).requires_grad_() for tensor in attention_inputs(USUAL, dtype=FLOAT, **sizes)]
    found = by_triton(inputs[0], USUAL, inputs[1], inputs[2])
    assert found.shape == (inputs[1].shape[0], inputs[1].shape[1], 8)
    found.sum().backward()
    assert inputs[0].grad.count_nonzero() == 0


@on_device
def test_any_memory_layout(attention_inputs):
    value, locations, weights = (tensor.to(DEVICE) for tensor in attention_inputs(USUAL, dtype=FLOAT))
    turned = value.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    torch.testing.assert_close(
        by_triton(turned, USUAL, locations, weights), by_triton(value, USUAL, locations, weights)
    )


@on_device
def test_places_far_outside_read_nothing(attention_inputs):
    value, locations, weights = attention_inputs(USUAL, dtype=FLOAT)
    locations[0, 0], locations[0, 1], locations[0, 2] = float("inf"), -1e30, 1e9
    assert by_triton(value.to(DEVICE), USUAL, locations.to(DEVICE), weights.to(DEVICE))[0, :3].count_nonzero() == 0


@on_device
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # within opcheck
def test_is_a_well_behaved_operator(attention_inputs):
    inputs = [
        tensor.to(DEVICE).requires_grad_()
        for tensor in attention_inputs([(3, 2)], dtype=FLOAT, queries=2, heads=1, points=1)
    ]
    arguments = (inputs[0], [3, 2], inputs[1], inputs[2])
    found = torch.library.opcheck(deformable_attention_triton._forward, arguments)
    assert set(found.values()) == {"SUCCESS"}


@on_device
def test_compiles_without_graph_breaks(attention_inputs):
    inputs = [tensor.to(DEVICE).requires_grad_() for tensor in attention_inputs(USUAL, dtype=FLOAT, queries=3, heads=1)]

    def loss(value, locations, weights):
        return by_triton(value, USUAL, locations, weights).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for found, gradient in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(found, gradient)
    torch.compiler.reset()


@on_device
def test_try_out_finds_wrong_numbers(monkeypatch):
    try_out(torch.device(DEVICE))
    monkeypatch.setattr(deformable_attention_triton, "by_grid_sample", lambda *inputs: by_grid_sample(*inputs) * 1.03)
    with pytest.raises(RuntimeError, match=r"differ from PyTorch's by \d\.\de-02"):
        try_out(torch.device(DEVICE))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("element", ["fp32", "bf16"])
def test_compiles_for_a_gpu_that_is_not_here(kernel, element, attention_inputs):
    """Whole rows are loaded at once, and on Hopper added at once."""
    pytest.importorskip("triton", minversion="3.5", reason="its compiler was called otherwise")
    from triton.backends.compiler import GPUTarget

    function = getattr(deformable_attention_triton, f"_{kernel}_kernel")
    value, locations, _ = attention_inputs(USUAL, dtype=FLOAT, heads=8, dim=32, points=4)
    warps = {"forward": 4, "backward": 1}[kernel]
    constants = deformable_attention_triton._options(value, locations, warps)
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    types = {
        "levels": "*i32",
        "num_cells": "i32",
        "num_queries": "i32",
        **dict.fromkeys(("grad", "value", "out"), f"*{element}"),
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {name: types.get(name, "*fp32") for name in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    numbered = {(function.arg_names.index(name),): number for name, number in constants.items()}
    source = triton.compiler.ASTSource(fn=function, signature=signature, constexprs=numbered, attrs=aligned)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert ("ld.global.v4.b32" if element == "fp32" else "ld.global.v2.b32") in code
    assert ("red.global.gpu.relaxed.add.v4.f32" in code) == (kernel == "backward")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is never chosen")
@on_device
def test_is_chosen_on_cuda():
    from simdetr.detectors.deformable_attention import choose_implementation

    assert choose_implementation("cuda", None, torch.bfloat16) == "triton"
