"""Embedding and head: what stands in front of the blocks and behind them."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from stackwise.inference.plan import uncovered
from stackwise.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from stackwise.model.block_spec import BlockSpec
from stackwise.model.own_io import InOut
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec, StackSpec
from stackwise.objectives.causal import CausalLM

V, D = 31, 16
BERT = {
    "tied": True,
    "token_types": 2,
    "embedding_norm": "learned",
    "head_transform": True,
    "head_bias": True,
    "final_norm": False,
    "norm": "layernorm",
    "positions": "learned",
}
ENDS = {
    "bert": BERT,
    "gemma": {"tied": True, "embedding_scale": math.sqrt(D), "logit_softcap": 3.0},
    "capped": {"head_bias": True, "logit_softcap": 2.0, "embedding_norm": True},
    "narrow": {"tied": True, "embedding_width": 6},
    "wide": {"tied": True, "embedding_width": 24, "head_transform": True},
    "mlp": {"tied": True, "embedding_width": 6, "adapter_hidden": 9},
    "mlp of one's own": {"adapter_hidden": 9},
    "transposed": {"tied": True, "embedding_width": 6, "tie_adapter": "transpose"},
    "low rank": {"head_rank": 5, "head_bias": True},
}


def spec_of(**options):
    bert = options.get("norm") == "layernorm"
    block = BlockSpec(
        d_model=D,
        n_heads=2,
        d_ff=24,
        causal=not bert,
        bias=bert,
        norm=options.get("norm", "rmsnorm"),
        norm_placement="post" if bert else "pre",
        rope_theta=None if bert else 1e4,
    )
    stacks = tuple(StackSpec(f"s{i}", (block,), i) for i in range(2))
    return RackSpec(V, D, stacks, max_seq_len=32, **options)


def rack_of(seed=0, **options):
    """A rack in float64 whose biases and type vectors are not their start."""
    rack = Rack(spec_of(**options), seed=seed).double().eval()
    with torch.no_grad():
        for name, parameter in rack.named_parameters():
            if "stacks" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return rack


def by_hand(rack, ids, types=None):
    """Logits from the parameters by name; the blocks are the rack's."""
    spec, p = rack.spec, dict(rack.named_parameters())

    def norm(x, name):
        if spec.norm == "layernorm":
            return F.layer_norm(x, (D,), p[f"{name}.weight"], p.get(f"{name}.bias"), spec.norm_eps)
        return F.rms_norm(x, (D,), p[f"{name}.weight"], spec.norm_eps)

    x = p["embedding.weight"][ids]
    if spec.adapter_hidden:
        x = F.gelu(x @ p["embedding.adapter.inner.weight"].T + p["embedding.adapter.inner.bias"])
        x = x @ p["embedding.adapter.outer.weight"].T + p["embedding.adapter.outer.bias"]
    elif spec.embedding_width:
        x = x @ p["embedding.adapter.weight"].T
    if spec.embedding_norm is True:
        x = x / (x.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt()
    x = x * spec.embedding_scale
    if spec.positions == "learned":
        x = x + p["positions.weight"][: ids.shape[1]]
    if spec.token_types:
        x = x + p["embedding.types"][torch.zeros_like(ids) if types is None else types]
    if spec.embedding_norm == "learned":
        x = norm(x, "embedding.norm")
    h = rack.run(x, rack.make_context(ids), 0)
    if spec.final_norm:
        h = norm(h, "norm")
    if spec.head_transform:
        dense = h @ p["head.transform.dense.weight"].T + p.get("head.transform.dense.bias", 0)
        h = norm(F.gelu(dense), "head.transform.norm")
    if spec.tied and spec.tie_adapter == "transpose":
        h = h @ p["embedding.adapter.weight"]
    elif "head.adapter.weight" in p:
        h = h @ p["head.adapter.weight"].T
    logits = h @ p["embedding.weight" if spec.tied else "head.weight"].T + p.get("head.bias", 0)
    cap = spec.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("name", ENDS)
def test_logits_are_those_of_the_formulas(name):
    rack, ids = rack_of(**ENDS[name]), torch.randint(0, V, (3, 7))
    types = torch.randint(0, 2, ids.shape) if rack.spec.token_types else None
    torch.testing.assert_close(rack(ids, token_type_ids=types), by_hand(rack, ids, types))
    torch.testing.assert_close(rack(ids), by_hand(rack, ids))


@pytest.mark.parametrize("name", ENDS)
def test_the_chunked_loss_and_its_gradients_are_those_of_all_logits(name):
    rack, ids = rack_of(**ENDS[name]), torch.randint(0, V, (3, 7))
    example = CausalLM().corrupt({"input_ids": ids})
    total, count = CausalLM().loss(rack.forward_features(ids), rack.head, example, rows_per_chunk=4)
    total.backward()
    ours = {n: p.grad for n, p in rack.named_parameters()}
    rack.zero_grad()
    whole = F.cross_entropy(by_hand(rack, ids).flatten(0, 1), example.labels.flatten(), reduction="sum")
    whole.backward()
    assert count == 18
    torch.testing.assert_close(total, whole)
    for parameter_name, parameter in rack.named_parameters():
        torch.testing.assert_close(ours[parameter_name], parameter.grad)


@pytest.mark.parametrize("name", ENDS)
def test_descriptions_come_back_and_values_by_name(name):
    rack = rack_of(**ENDS[name])
    assert RackSpec.from_dict(json.loads(json.dumps(rack.spec.to_dict()))) == rack.spec
    other = Rack(rack.spec, seed=9).double()
    other.load_state_dict(rack.state_dict())
    ids = torch.randint(0, V, (2, 5))
    assert torch.equal(rack(ids), other.eval()(ids))
    own = InOut(rack.spec).double().copy_from(rack)
    hidden = torch.randn(4, D, dtype=torch.float64)
    torch.testing.assert_close(own.head(hidden), rack.head(hidden))


@pytest.mark.parametrize("name", [n for n in ENDS if n != "bert"])
def test_generation_follows_the_forward_pass(name):
    rack = rack_of(**ENDS[name]).float()
    ids = torch.randint(0, V, (2, 4))
    out, seen = rack.generate(ids, max_new_tokens=6, temperature=0.0), ids
    for _ in range(6):
        seen = torch.cat((seen, rack(seen)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(out, seen)


def test_what_the_packed_pass_does_not_compute_it_refuses():
    assert uncovered(rack_of(**ENDS["gemma"]).float()) is None
    assert "head" in uncovered(rack_of(**ENDS["wide"]).float())
    assert "head" in uncovered(rack_of(**ENDS["transposed"]).float())
    assert "embedding" in uncovered(rack_of(embedding_norm="learned").float())
    assert "Identity" in uncovered(rack_of(final_norm=False).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_bias_and_cap_inside_the_chunks(dtype, softcap):
    labels = torch.randint(0, V, (23,))
    labels[::5] = -100
    weights, z = torch.rand(23), 0.1
    inputs = [torch.randn(23, 8), torch.randn(V, 8), torch.randn(V)]
    results = []
    for function, more in (
        (linear_cross_entropy, {"rows_per_chunk": 5}),
        (linear_cross_entropy_reference, {}),
    ):
        wide = dtype if function is linear_cross_entropy else torch.float64
        h, w, b = ((t.to(dtype).to(wide)).requires_grad_() for t in inputs)
        options = {"row_weights": weights.to(wide), "banned": 3, "z_loss": z, "softcap": softcap}
        kept = torch.where(labels == 3, 4, labels)
        loss = function(h, w, kept, bias=b, **options, **more)
        results.append((loss, *torch.autograd.grad(loss, (h, w, b))))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2}[dtype]
    for ours, wanted in zip(*results, strict=True):
        scale = wanted.abs().max()
        assert (ours.double() - wanted).abs().max() <= tolerance * scale


def test_a_tied_table_of_another_width_is_one_tensor():
    rack = rack_of(tied=True, embedding_width=48)
    assert rack.head.matrix is rack.embedding.weight
    assert [n for n, p in rack.named_parameters() if p.shape == (V, 48)] == ["embedding.weight"]
    assert rack(torch.randint(0, V, (1, 4))).shape == (1, 4, V)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tied": True, "head_rank": 4}, "embedding_width"),
        ({"tied": True, "tie_adapter": "transpose", "adapter_hidden": 4}, "no transpose"),
        ({"embedding_norm": "unit"}, "learned"),
        ({"tie_adapter": "mlp"}, "transpose"),
        ({"embedding_scale": 0.0}, "above 0"),
        ({"logit_softcap": -1.0}, "above 0"),
        ({"token_types": -1}, "at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(spec_of(), **options)


def test_token_types_are_checked():
    ids = torch.randint(0, V, (2, 5))
    with pytest.raises(ValueError, match=r"model\.token_types"):
        rack_of()(ids, token_type_ids=torch.zeros_like(ids))
    rack = rack_of(token_types=2)
    with pytest.raises(ValueError, match=r"\[2, 5\]"):
        rack(ids, token_type_ids=torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(IndexError, match="0 to 1"):
        rack(ids, token_type_ids=torch.full_like(ids, 2))
