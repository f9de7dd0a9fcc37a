"""On a CUDA device the formats give the bytes and the numbers that they give on the CPU."""

from __future__ import annotations

import pytest
import torch

from stackwise.model.linear import Linear
from stackwise.precision.formats import FORMATS, format_of
from stackwise.precision.frozen_linear import FrozenLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STORED = [name for name in FORMATS if name != "fp32"]


@pytest.mark.parametrize("shape", [(7, 333), (512, 1024)])
@pytest.mark.parametrize("name", STORED)
def test_bytes_and_numbers_do_not_depend_on_the_device(name: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    here, there = format_of(name).quantise(weight), format_of(name).quantise(weight.cuda())
    for key, tensor in here.items():
        assert torch.equal(tensor.float(), there[key].cpu().float()), key
    for dtype in (torch.float32, torch.bfloat16):
        values = format_of(name).dequantise(there, shape, dtype)
        assert values.is_cuda
        assert torch.equal(values.cpu(), format_of(name).dequantise(here, shape, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STORED)
def test_value_and_gradient_of_a_frozen_layer(name: str, dtype: torch.dtype) -> None:
    layer = FrozenLinear.of(Linear(512, 256), name).cuda()
    x = torch.randn(64, 512, device="cuda", requires_grad=True)
    direction = torch.randn(64, 256, device="cuda")
    with torch.autocast("cuda", dtype):
        y = layer(x)
    (grad,) = torch.autograd.grad(y, x, direction.to(y.dtype))
    wanted = x.double() @ layer.weight.double().t() + layer.bias.double()
    (exact,) = torch.autograd.grad(wanted, x, direction.double())
    assert (y - wanted).abs().max() <= 2e-2 * wanted.abs().max()
    assert (grad - exact).abs().max() <= 2e-2 * exact.abs().max()
