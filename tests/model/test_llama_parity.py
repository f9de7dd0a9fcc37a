"""A Llama-shaped rack computes what Transformers' Llama computes."""

from __future__ import annotations

import pytest
import torch

from stackwise import create_simple_rack
from stackwise.kernels.linear_cross_entropy import linear_cross_entropy
from stackwise.objectives.causal import CausalLM

transformers = pytest.importorskip("transformers", reason="needs pip install 'stackwise[hf]'")


def to_adjacent_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k from pairs (i, i + H/2) to adjacent pairs (2i, 2i + 1)."""
    head_dim = weight.shape[0] // heads
    return weight.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(("kv_heads", "tied"), [(4, False), (2, True)])
def test_same_weights_same_logits_loss_and_gradients(kv_heads, tied):
    config = transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    llama = transformers.LlamaForCausalLM(config).double()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    rack = create_simple_rack(
        3,
        1,
        32,
        48,
        4,
        67,
        n_kv_heads=kv_heads,
        attention_preset="gpt_style",
        tie_embeddings=tied,
        max_seq_len=64,
    ).double()
    theirs = dict(llama.named_parameters())
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not tied:
        names["head.weight"] = "lm_head.weight"
    for i in range(3):
        here, there = f"stacks.s{i}.blocks.0.", f"model.layers.{i}."
        pairs = {
            "attn.q": "self_attn.q_proj",
            "attn.k": "self_attn.k_proj",
            "attn.v": "self_attn.v_proj",
            "attn.o": "self_attn.o_proj",
            "ffn.gate": "mlp.gate_proj",
            "ffn.up": "mlp.up_proj",
            "ffn.down": "mlp.down_proj",
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }
        names |= {f"{here}{a}.weight": f"{there}{b}.weight" for a, b in pairs.items()}
    heads = {".attn.q.weight": 4, ".attn.k.weight": kv_heads}

    def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return next((to_adjacent_pairs(tensor, n) for end, n in heads.items() if name.endswith(end)), tensor)

    own = dict(rack.named_parameters())
    assert set(own) == set(names)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(moved(name, theirs[names[name]]))

    ids = torch.randint(0, 67, (2, 21))
    # fp64, but Transformers keeps its rotation tables in fp32
    torch.testing.assert_close(rack(ids), llama(ids).logits, atol=5e-6, rtol=1e-5)

    llama(input_ids=ids, labels=ids).loss.backward()
    example = CausalLM().corrupt({"input_ids": ids})
    hidden = rack.forward_features(example.input_ids)
    total = linear_cross_entropy(hidden.flatten(0, 1), rack.head.matrix, example.labels.flatten())
    (total / (example.labels >= 0).sum()).backward()
    for name, parameter in own.items():
        expected = moved(name, theirs[names[name]].grad)
        torch.testing.assert_close(
            parameter.grad, expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
