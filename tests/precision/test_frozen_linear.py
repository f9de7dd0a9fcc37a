"""The linear layer over packed weights: equal to the dense layer of the same values, in value and in gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from stackwise.model.linear import Linear
from stackwise.precision.base import Format
from stackwise.precision.formats import FORMATS, format_of
from stackwise.precision.frozen_linear import FrozenLinear

STORED = [name for name in FORMATS if name != "fp32"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def pair(name: str, n_in: int = 48, n_out: int = 40, bias: bool = True) -> tuple[FrozenLinear, nn.Linear]:
    """A frozen layer, and PyTorch's own with the values it holds, in fp64."""
    frozen = FrozenLinear.of(Linear(n_in, n_out, bias=bias), name)
    dense = nn.Linear(n_in, n_out, bias=bias).double()
    with torch.no_grad():
        dense.weight.copy_(frozen.weight)
        if bias:
            dense.bias.copy_(frozen.bias)
    return frozen, dense


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", STORED)
@given(
    n_in=st.integers(1, 70),
    n_out=st.integers(1, 70),
    rows=st.sampled_from([(), (1,), (3, 5), (0,)]),
    bias=st.booleans(),
)
@settings(deadline=None, max_examples=8)
def test_value_and_gradients_are_those_of_the_dense_layer(
    name: str, dtype: torch.dtype, n_in: int, n_out: int, rows: tuple[int, ...], bias: bool
) -> None:
    frozen, dense = pair(name, n_in, n_out, bias)
    x = torch.randn(*rows, n_in, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = frozen(x)
    assert y.dtype == dtype
    wanted = dense(exact)
    direction = torch.randn_like(y)
    y.backward(direction)
    wanted.backward(direction.double())
    results = [(y, wanted), (x.grad, exact.grad)]
    if bias:
        results.append((frozen.bias.grad, dense.bias.grad))
    for got, want in results:
        assert got is not None
        assert want is not None
        assert torch.isfinite(got).all()
        error = (got.double() - want).abs().amax() if want.numel() else torch.zeros(())
        scale = want.abs().amax() if want.numel() else torch.zeros(())
        assert error <= TOLERANCE[dtype] * (scale + 1)


@pytest.mark.parametrize("name", STORED)
def test_a_gradient_passes_through_a_chain_of_frozen_layers(name: str) -> None:
    first = Linear(16, 32)
    chain = nn.Sequential(
        first, FrozenLinear.of(Linear(32, 24), name), nn.Tanh(), FrozenLinear.of(Linear(24, 8), name)
    )
    before = {key: value.clone() for key, value in chain[1:].state_dict().items()}
    optimizer = torch.optim.SGD([p for p in chain.parameters() if p.requires_grad], lr=0.1)
    chain[1].bias.requires_grad_(False)
    chain[3].bias.requires_grad_(False)
    chain(torch.randn(4, 16)).square().sum().backward()
    assert first.weight.grad is not None
    assert first.weight.grad.abs().sum() > 0
    optimizer.step()
    after = chain[1:].state_dict()
    assert all(torch.equal(after[key].double(), before[key].double()) for key in before)


@pytest.mark.parametrize("name", STORED)
def test_the_matrix_is_unpacked_once_per_pass_and_not_kept_between(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = FrozenLinear.of(Linear(64, 96), name)
    layer.bias.requires_grad_(False)
    unpacked: list[torch.dtype] = []
    original = Format.dequantise

    def counted(self: Format, tensors: object, shape: object, dtype: torch.dtype) -> Tensor:
        unpacked.append(dtype)
        return original(self, tensors, shape, dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(Format, "dequantise", counted)
    held: list[Tensor] = []
    own = {tensor.data_ptr() for tensor in layer.packed().values()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t), t)[1], lambda t: t):
        y = layer(torch.randn(7, 64, requires_grad=True))
    assert {tensor.data_ptr() for tensor in held} <= own
    assert len(unpacked) == 1
    y.sum().backward()
    assert len(unpacked) == 2
    with torch.no_grad():
        layer(torch.randn(7, 64))
    assert len(unpacked) == 3


@pytest.mark.parametrize("name", STORED)
def test_asking_to_train_it_is_an_error_with_the_ways_out(name: str) -> None:
    layer = FrozenLinear.of(Linear(4, 4), name)
    with pytest.raises(
        ValueError, match=f"stored as {name} cannot be trained.*add adapters.*restore_full_precision"
    ):
        layer.requires_grad_()
    assert layer.requires_grad_(False) is layer
    assert not layer.bias.requires_grad
    assert [key for key, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("name", STORED)
def test_its_tensors_travel_by_name_through_safetensors(name: str) -> None:
    source, target = (FrozenLinear.of(Linear(40, 30), name) for _ in range(2))
    x = torch.randn(3, 40)
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(load(save(source.state_dict())))
    assert set(source.state_dict()) == {"bias", *format_of(name).layout((30, 40))}
    assert torch.equal(source(x), target(x))
    empty = FrozenLinear.shaped_like(nn.Linear(40, 30, device="meta"), name)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(source(x), empty(x))
    assert torch.equal(source(x), copy.deepcopy(source)(x))


@pytest.mark.parametrize("name", STORED)
def test_casting_a_model_leaves_packed_tensors_alone_and_moving_takes_them_along(name: str) -> None:
    layer = FrozenLinear.of(Linear(40, 30), name)
    before = {key: (tensor.dtype, tensor.clone()) for key, tensor in layer.packed().items()}
    for cast in (layer.bfloat16, layer.double, layer.half, layer.float):
        cast()
        for key, tensor in layer.packed().items():
            assert tensor.dtype == before[key][0]
            assert torch.equal(tensor.float(), before[key][1].float())
    assert layer.double().bias.dtype == torch.float64
    assert layer(torch.randn(2, 40, dtype=torch.float64)).dtype == torch.float64
    assert all(tensor.is_meta for tensor in layer.to("meta").packed().values())


@pytest.mark.parametrize("name", STORED)
def test_another_matrix_is_quantised_in_place(name: str) -> None:
    layer, other = FrozenLinear.of(Linear(40, 30), name), torch.randn(30, 40)
    places = {key: tensor.data_ptr() for key, tensor in layer.packed().items()}
    layer.set_weight(other)
    assert torch.equal(layer.weight, format_of(name).round(other))
    assert places == {key: tensor.data_ptr() for key, tensor in layer.packed().items()}
    with pytest.raises(ValueError, match=r"matrix is \[30, 40\], got \[40, 30\]"):
        layer.set_weight(other.t())
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = nn.Parameter(other)  # type: ignore[assignment]


@pytest.mark.parametrize("name", STORED)
def test_the_dense_layer_of_it_computes_the_same_and_trains(name: str) -> None:
    layer, x = FrozenLinear.of(Linear(40, 30), name), torch.randn(3, 40)
    state = torch.get_rng_state()
    dense = layer.dense()
    assert torch.equal(torch.get_rng_state(), state)
    assert type(dense) is Linear
    torch.testing.assert_close(dense(x), layer(x))
    before = {key: tensor.clone() for key, tensor in layer.packed().items()}
    with torch.no_grad():
        dense.weight.add_(1)
    assert all(torch.equal(t.float(), before[key].float()) for key, t in layer.packed().items())


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # the compiler does it itself
@pytest.mark.parametrize("name", STORED)
def test_it_compiles_as_one_graph(name: str) -> None:
    layer = FrozenLinear.of(Linear(24, 16), name)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 24, requires_grad=True)
    grads = [torch.autograd.grad(run(x).square().sum(), x)[0] for run in (layer, compiled)]
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", STORED)
def test_peft_puts_adapters_on_it(name: str, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(FrozenLinear.of(Linear(40, 30), name))
    x = torch.randn(3, 40)
    base = model(x)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=dora)
    adapted = peft.inject_adapter_in_model(config, model)
    torch.testing.assert_close(adapted(x), base, rtol=1e-5, atol=1e-5)
    adapted(x).square().sum().backward()
    grads = {key: p.grad for key, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in key and p is not None and p.dtype == torch.float32 for key, p in grads.items())
    assert grads["0.lora_B.default.weight"].abs().sum() > 0
