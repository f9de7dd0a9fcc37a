"""Imported models compute what the classes of Transformers compute: logits, text, losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from stackwise.interop.families import families, family_of
from stackwise.interop.hf_import import read_model

Saved = Callable[..., tuple[Any, Path]]
KINDS = list(families())
VOCAB = 320


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, saved: Saved) -> None:
    model, folder = saved(kind)
    rack = read_model(folder, stacks=2).rack
    ids = random_ids(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(rack(ids), model(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_transformers(kind: str, saved: Saved) -> None:
    model, folder = saved(kind)
    rack = read_model(folder).rack
    if not rack.is_causal:
        pytest.skip(f"{kind} sees all positions, so it continues no text")
    ids = random_ids(1, 9)
    wanted = model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(rack.generate(ids, max_new_tokens=64, temperature=0.0), wanted)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
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
            torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


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
