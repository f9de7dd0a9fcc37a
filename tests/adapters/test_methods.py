"""DoRA, MoRA and bottlenecks against their formulas."""

from __future__ import annotations

from math import floor, sqrt

import pytest
import torch
from torch.nn import functional as F

from stackwise.adapters.attach import adapter_parameters, attach
from stackwise.adapters.bottleneck import Bottleneck
from stackwise.adapters.mora import Mora
from stackwise.model.spec import AdapterSpec

from .conftest import teach


def test_dora_scales_the_rows_of_the_changed_weight(rack):
    """W' = m (W + s B A) / ||W + s B A||, norms of rows [O] of W [O, I] (columns in the paper's layout)."""
    stack = rack.stacks[0]
    attach(stack, AdapterSpec("stack", "dora", rank=3, alpha=5.0))
    layer = stack.blocks[0].ffn.up
    torch.testing.assert_close(
        layer.lora_magnitude_vector["stack"].weight, layer.base_layer.weight.norm(dim=1)
    )
    teach(stack)
    x = torch.randn(4, 24)
    changed = layer.base_layer.weight + 5 / 3 * layer.lora_B["stack"].weight @ layer.lora_A["stack"].weight
    weight = (
        layer.lora_magnitude_vector["stack"].weight[:, None] * changed / changed.norm(dim=1, keepdim=True)
    )
    torch.testing.assert_close(layer(x), x @ weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_the_changes_of_all_methods_add_up_in_any_order_and_mode(make_rack, training):
    """Each set changes what the base layer gives; none acts on what another set added."""
    methods = ["dora", "lora", "mora"]
    outputs, x = [], torch.randn(4, 24)
    for order in (methods, methods[::-1]):
        stack = make_rack().stacks[0].train(training)
        for method in order:
            attach(stack, AdapterSpec(method, method, rank=3, dropout=1e-9))
        torch.manual_seed(0)
        for method in methods:
            teach(stack, method)
        layer = stack.blocks[0].attn.q
        base, changes = layer.base_layer(x), 0
        for method in methods:
            layer.set_adapter(method)
            changes = changes + layer(x) - base
        layer.set_adapter(order)
        torch.testing.assert_close(layer(x), base + changes, atol=1e-5, rtol=1e-5)
        outputs.append(layer(x))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n_in", "n_out"), [(24, 24), (24, 40), (40, 24), (7, 100), (100, 7), (24, 12)])
@pytest.mark.parametrize("rank", [1, 2, 5, 16])
def test_mora_has_one_square_matrix_and_no_more_parameters_than_lora(n_in, n_out, rank):
    mora = Mora(n_in, n_out, rank)
    assert mora.weight.shape == (floor(sqrt((n_in + n_out) * rank)),) * 2
    assert mora.weight.numel() <= (n_in + n_out) * rank


def rotation(side: int, turns: int) -> torch.Tensor:
    """R_j of the first 2 (side // 2) coordinates, i paired with i + side // 2."""
    half = side // 2
    matrix = torch.eye(side, dtype=torch.float64)
    for i in range(half):
        angle = torch.tensor(turns * 10_000.0 ** (-i / half), dtype=torch.float64)
        matrix[i, i] = matrix[i + half, i + half] = angle.cos()
        matrix[i, i + half], matrix[i + half, i] = -angle.sin(), angle.sin()
    return matrix


@pytest.mark.parametrize(("n_in", "n_out"), [(24, 24), (24, 40), (40, 24), (7, 100), (100, 7)])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_mora_is_the_block_matrix_of_turned_copies(n_in, n_out, rank):
    mora = Mora(n_in, n_out, rank).double()
    torch.nn.init.normal_(mora.weight)
    side = mora.side
    columns, rows = -(-n_in // side), -(-n_out // side)
    expected = torch.zeros(rows * side, columns * side, dtype=torch.float64)
    for j in range(max(rows, columns)):
        r, c = j % rows * side, j % columns * side
        expected[r : r + side, c : c + side] += mora.weight.detach() @ rotation(side, j)
    expected = expected[:n_out, :n_in]
    torch.testing.assert_close(mora.delta_weight().detach(), expected, atol=1e-10, rtol=1e-10)
    x = torch.randn(3, 2, n_in, dtype=torch.float64)
    torch.testing.assert_close(mora(x).detach(), x @ expected.T, atol=1e-10, rtol=1e-10)


def test_the_rank_of_mora_exceeds_that_of_lora_and_every_input_and_output_takes_part(rack):
    stack = rack.stacks[0]
    attach(stack, AdapterSpec("stack", "mora", rank=2))
    teach(stack)
    for layer in (stack.blocks[0].attn.q, stack.blocks[0].ffn.down, stack.blocks[0].ffn.up):
        delta = layer.get_delta_weight("stack")
        assert torch.linalg.matrix_rank(delta) > 2
        assert (delta.abs().sum(0) > 0).all()
        assert (delta.abs().sum(1) > 0).all()


def test_a_bottleneck_sits_behind_each_sub_layer(rack, ids):
    stack = rack.stacks[0]
    attach(stack, AdapterSpec("stack", "bottleneck", rank=5))
    names = {name.partition(".lora_bottleneck")[0] for name in adapter_parameters(stack)}
    assert names == {"blocks.0.attn.o", "blocks.0.ffn.down"}
    assert sum(p.numel() for p in adapter_parameters(stack).values()) == 2 * (2 * 24 * 5 + 24 + 5)
    teach(stack)
    layer = stack.blocks[0].ffn.down
    own = dict(layer.lora_bottleneck["stack"].named_parameters())
    x = torch.randn(3, 40)
    h = layer.base_layer(x)
    middle = F.gelu(h @ own["down.weight"].T + own["down.bias"])
    torch.testing.assert_close(layer(x), h + middle @ own["up.weight"].T + own["up.bias"])


def test_a_bottleneck_reads_what_the_linear_sets_give(rack):
    stack = rack.stacks[0]
    attach(stack, AdapterSpec("narrow", "bottleneck", rank=3))
    attach(stack, AdapterSpec("low", "lora", rank=3))
    teach(stack)
    layer, x = stack.blocks[0].attn.o, torch.randn(3, 24)
    h = layer.base_layer(x) + x @ layer.get_delta_weight("low").T
    torch.testing.assert_close(layer(x), h + layer.lora_bottleneck["narrow"](h))


def test_a_bottleneck_has_as_many_parameters_as_the_formula_says():
    for width, middle in ((24, 5), (7, 1)):
        assert (
            sum(p.numel() for p in Bottleneck(width, middle).parameters())
            == 2 * width * middle + width + middle
        )


@pytest.mark.parametrize("method", ["lora", "dora", "mora", "bottleneck"])
def test_every_method_learns(rack, ids, method):
    for stack in rack.stacks:
        stack.freeze_all()
        attach(stack, AdapterSpec("stack", method, rank=4))
    rack.requires_grad_(False)
    parameters = [p for stack in rack.stacks for p in adapter_parameters(stack).values()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(rack(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
