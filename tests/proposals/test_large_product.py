"""Large products equal double precision's, and leave torch's setting as it was."""

import pytest
import torch

from simdetr.proposals.large_product import large_product


@pytest.mark.parametrize("before", ["highest", "high"])
def test_product_is_that_of_float32_and_the_setting_is_restored(before):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 40, 300, generator=generator), torch.randn(2, 300, 50, generator=generator)
    own = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    try:
        found = large_product(left, right)
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(own)
    exact = torch.bmm(left.double(), right.double())
    rounding = 300**0.5 * 2.0**-8 * 2  # of bfloat16 factors, where a processor has a unit for them
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) < rounding


def test_the_setting_is_restored_after_an_error():
    own = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError):
        large_product(torch.ones(1, 2, 3), torch.ones(1, 4, 5))
    assert torch.get_float32_matmul_precision() == own
