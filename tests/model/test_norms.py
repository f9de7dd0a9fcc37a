"""Norms whose weights are kept as their distance from 1."""

from __future__ import annotations

import pytest
import torch

from stackwise.model.factory import create_simple_rack
from stackwise.model.norms import OffsetRMSNorm, RMSNorm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_offset_norm_is_the_plain_one_with_1_added(dtype: torch.dtype) -> None:
    offset, plain = OffsetRMSNorm(16, 1e-6), RMSNorm(16, 1e-6)
    with torch.no_grad():
        offset.weight.normal_(0.0, 1e-3)  # 1 + weight would round to 1 or 1.0078 in bf16
    offset.to(dtype)
    plain.to(torch.promote_types(dtype, torch.float32))
    with torch.no_grad():
        plain.weight.copy_(1.0 + offset.weight.to(plain.weight.dtype))
    x = torch.randn(5, 16, dtype=dtype)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, wanted = offset(mine), plain(theirs)
    assert got.dtype == dtype
    assert torch.equal(got, wanted)
    way = torch.randn_like(got)
    got.backward(way)
    wanted.backward(way)
    assert torch.equal(mine.grad, theirs.grad)
    assert torch.equal(offset.weight.grad, plain.weight.grad.to(dtype))


def test_every_norm_of_a_model_starts_as_the_identity() -> None:
    options = {"attention_preset": "gpt_style", "norm_placement": "both", "qk_norm": True, "seed": 3}
    rack = create_simple_rack(1, 2, 16, 24, 4, 23, norm="rmsnorm_offset", **options)
    plain = create_simple_rack(1, 2, 16, 24, 4, 23, norm="rmsnorm", **options)
    norms = [module for module in rack.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 2 * 6 + 1
    assert all(type(norm) is OffsetRMSNorm and not norm.weight.any() for norm in norms)
    ids = torch.randint(0, 23, (2, 9))
    assert torch.equal(rack(ids), plain(ids))


def test_latents_have_the_norm_of_the_model() -> None:
    latent = {"q_rank": 6, "kv_rank": 8, "rope_dim": 4}
    rack = create_simple_rack(
        1,
        1,
        16,
        24,
        4,
        23,
        norm="rmsnorm_offset",
        attention_type="mla",
        latent=latent,
        attention_preset="gpt_style",
    )
    attn = rack.stacks[0].blocks[0].attn
    assert type(attn.q_norm) is type(attn.kv_norm) is OffsetRMSNorm
    assert not attn.kv_norm.weight.any()
