"""Imported models compute what the classes of Transformers compute: logits, text, losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from stackwise.interop.families import families, family_of
from stackwise.interop.hf_export import write_model
from stackwise.interop.hf_import import read_model

Saved = Callable[..., tuple[Any, Path]]
KINDS = list(families())
CAUSAL = [kind for kind in KINDS if families()[kind].settings["attention_preset"] == "gpt_style"]
VOCAB = 320
S = "sliding_attention"
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, saved: Saved) -> None:
    model, folder = saved(kind)
    rack = read_model(folder, stacks=2).rack
    ids = random_ids(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(rack(ids), model(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", CAUSAL)
def test_greedy_text_is_that_of_transformers(kind: str, saved: Saved) -> None:
    model, folder = saved(kind)
    rack = read_model(folder).rack
    ids = random_ids(1, 9)
    wanted = model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(rack.generate(ids, max_new_tokens=64, temperature=0.0), wanted)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "gemma3_text"])
def test_losses_and_gradients_are_those_of_transformers(kind: str, saved: Saved) -> None:
    model, folder = saved(kind)
    read = read_model(folder, blocks_per_stack=2)
    model, rack = model.double(), read.rack.double()
    ids = random_ids(2, 20)
    losses = []
    for logits in (model(ids).logits, rack(ids)):
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    theirs, ours = dict(model.named_parameters()), dict(rack.named_parameters())
    for row in read.family.rows(rack.spec):
        moved = row.change.save([ours[name].grad for name in row.ours])
        for name, gradient in zip(row.theirs, moved, strict=True):
            wanted = theirs[name].grad
            torch.testing.assert_close(
                gradient, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item() + 1e-12
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_number_format_is_read_to_the_last_bit(kind: str, dtype: torch.dtype, saved: Saved) -> None:
    model, folder = saved(kind, dtype=dtype)
    read = read_model(folder)
    theirs, ours = model.state_dict(), read.rack.state_dict()
    for row in family_of(kind, "here").rows(read.rack.spec):
        moved = row.change.load([theirs[name].float() for name in row.theirs if name in theirs])
        for name, tensor in zip(row.ours, moved, strict=False):
            assert torch.equal(ours[name], tensor)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 16}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"rope_scaling": LLAMA3}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 32}),
        ("gpt2", {"n_inner": 80}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "layer_types": [S, S, "full_attention"]}),
        ("bert", {"type_vocab_size": 3}),
        ("modernbert", {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}),
        ("mixtral", {"num_experts_per_tok": 4}),
        ("deepseek_v2", {"q_lora_rank": 24, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}),
        ("deepseek_v2", {"rope_scaling": YARN}),
        ("deepseek_v3", {"rope_scaling": YARN}),
        ("deepseek_v3", {"q_lora_rank": None, "routed_scaling_factor": 2.5, "norm_topk_prob": False}),
        ("gemma", {"attention_bias": True, "num_key_value_heads": 1}),
        ("gemma2", {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
        ("gemma3_text", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("gemma3_text", {"rope_scaling": LLAMA3}),
        ("gemma3_text", {"layer_types": [S] * 5}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 5}),
    ],
)  # fmt: skip
def test_what_models_of_a_family_differ_in(
    kind: str, changes: dict[str, Any], saved: Saved, tmp_path: Path
) -> None:
    model, folder = saved(kind, **changes)
    read = read_model(folder, stacks=2)
    ids = random_ids(2, 60)
    with torch.no_grad():
        torch.testing.assert_close(read.rack(ids), model(ids).logits, atol=1e-4, rtol=0)
    written = write_model(read.rack, read.tokenizer, tmp_path / "out", config=read.config)
    assert written.notes == []
    again = type(model).from_pretrained(written.path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_padding_and_token_types_of_bert(saved: Saved) -> None:
    model, folder = saved("bert")
    rack = read_model(folder).rack
    ids, kinds, mask = random_ids(2, 20), torch.randint(0, 2, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[1, 12:] = 0
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, token_type_ids=kinds).logits
        found = rack(ids, mask, token_type_ids=kinds)
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=0)


def test_shards_hold_the_same_model(saved: Saved) -> None:
    _, whole = saved("llama")
    one = read_model(whole).rack.state_dict()
    whole.rename(whole.with_name("whole"))
    _, folder = saved("llama", shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    many = read_model(folder, stacks=1).rack.state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(kind: str, tied: bool, saved: Saved) -> None:
    model, folder = saved(kind, tie_word_embeddings=tied)
    rack = read_model(folder).rack
    ids = random_ids(1, 12)
    assert rack.is_tied == tied
    with torch.no_grad():
        torch.testing.assert_close(rack(ids), model(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ({}, [3]),
        ({"stacks": 3}, [1, 1, 1]),
        ({"stacks": 2}, [2, 1]),
        ({"blocks_per_stack": 1}, [1, 1, 1]),
        ({"blocks_per_stack": 2}, [2, 1]),
    ],
)
def test_layers_are_cut_as_asked(asked: dict[str, int], sizes: list[int], saved: Saved) -> None:
    model, folder = saved("llama")
    rack = read_model(folder, **asked).rack
    assert [len(stack.blocks) for stack in rack.stacks] == sizes
    ids = random_ids(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(rack(ids), model(ids).logits, atol=1e-4, rtol=0)


def test_a_bare_model_is_read_without_its_prefix(saved: Saved) -> None:
    model, folder = saved("gpt2")
    model.transformer.save_pretrained(folder)
    ids = random_ids(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(read_model(folder).rack(ids), model(ids).logits, atol=1e-4, rtol=0)


def test_reading_holds_one_row_of_the_table_at_a_time(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    from stackwise.interop.folder import ModelFolder

    _, folder = saved("llama")
    alive: list[weakref.ref[torch.Tensor]] = []
    most, read = 0, ModelFolder.get

    def counted(self: ModelFolder, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(entry() is not None for entry in alive))
        return tensor

    monkeypatch.setattr(ModelFolder, "get", counted)
    read_model(folder)
    assert len(alive) == 30
    assert most <= 2
