"""In bf16, where attention, linear layers and loss run other kernels, a rack keeps its promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stackwise import create_simple_rack
from stackwise.model.rack import Rack
from stackwise.objectives.causal import CausalLM

VOCAB, LENGTH = 61, 140  # longer than one block of queries
VARIANTS = [{}, {"n_kv_heads": 2, "qk_norm": True, "short_conv": 3}]


def make(**options: object) -> Rack:
    torch.manual_seed(1)
    options = {"attention_preset": "gpt_style", "tie_embeddings": False, "max_seq_len": 160, **options}
    rack = create_simple_rack(2, 1, 32, 64, 4, VOCAB, **options)
    with torch.no_grad():  # away from the start, where norms are ones
        for parameter in rack.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return rack


def in_bf16(rack: Rack, *args: object, **kwargs: object) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return rack(*args, **kwargs).float()


def left_padded(length: int, padding: int) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :padding] = False
    return mask


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_future_never_leaks(options: dict[str, object], masked: bool) -> None:
    rack, ids = make(**options), torch.randint(0, VOCAB, (2, LENGTH))
    mask = left_padded(LENGTH, 3) if masked else None
    before = in_bf16(rack, ids, mask)
    for position in (5, 127, 128, 139):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        after = in_bf16(rack, changed, mask)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])


@pytest.mark.parametrize("options", VARIANTS)
def test_logits_and_gradients_are_those_of_fp32_up_to_rounding(options: dict[str, object]) -> None:
    rack, ids = make(**options), torch.randint(0, VOCAB, (2, LENGTH))
    objective = CausalLM()
    example = objective.corrupt({"input_ids": ids})

    def gradients(dtype: torch.dtype) -> dict[str, Tensor]:
        rack.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            total, count = objective.loss(rack.forward_features(ids), rack.head, example)
        (total / count).backward()
        return {name: p.grad for name, p in rack.named_parameters() if p.grad is not None}

    exact, rough = gradients(torch.float32), gradients(torch.bfloat16)
    assert exact.keys() == rough.keys() == dict(rack.named_parameters()).keys()
    for name, wanted in exact.items():
        assert rough[name].dtype == torch.float32
        assert (rough[name] - wanted).norm() < 0.08 * wanted.norm(), name
    wanted_logits = rack(ids)
    assert (in_bf16(rack, ids) - wanted_logits).norm() < 0.02 * wanted_logits.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["gpt_style", "bert_style"])
def test_rows_that_see_nothing_have_finite_gradients(dtype: torch.dtype, preset: str) -> None:
    rack, ids = make(attention_preset=preset), torch.randint(0, VOCAB, (2, 12))
    mask = left_padded(12, 4)
    mask[1] = False
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        rack(ids, mask)[mask].float().logsumexp(-1).sum().backward()
    assert all(p.grad.isfinite().all() for p in rack.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", VARIANTS)
def test_packed_documents_read_as_they_do_alone(options: dict[str, object]) -> None:
    rack = make(**options)
    a, b = torch.randint(0, VOCAB, (1, 50)), torch.randint(0, VOCAB, (1, 90))
    packed = in_bf16(
        rack,
        torch.cat((a, b), 1),
        document_ids=torch.tensor([[0] * 50 + [1] * 90]),
        position_ids=torch.cat((torch.arange(50), torch.arange(90)))[None],
    )
    alone = torch.cat((in_bf16(rack, a), in_bf16(rack, b)), 1)
    assert (packed - alone).norm() < 0.04 * alone.norm()


def test_a_cache_read_in_pieces_gives_the_full_pass() -> None:
    rack, ids = make(), torch.randint(0, VOCAB, (2, 40))
    with torch.no_grad():
        full = in_bf16(rack, ids)
        cache = rack.make_cache(2, 40, torch.bfloat16)
        pieces = [in_bf16(rack, ids[:, a:b], cache=cache) for a, b in ((0, 7), (7, 20), (20, 39), (39, 40))]
    assert (torch.cat(pieces, 1) - full).norm() < 0.04 * full.norm()


def test_linear_layers_hold_no_second_copy_of_their_weights() -> None:
    """What backward needs of a weight is the weight itself."""
    rack, ids = make(), torch.randint(0, VOCAB, (1, 4))
    shapes = {p.shape for p in rack.parameters() if p.dim() == 2 and p is not rack.head.matrix}
    shapes |= {torch.Size(reversed(shape)) for shape in shapes}
    own = {p.untyped_storage().data_ptr() for p in rack.parameters()}
    copies = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape in shapes and tensor.untyped_storage().data_ptr() not in own:
            copies.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        rack.forward_features(ids)
    assert copies == []
