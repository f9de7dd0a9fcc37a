"""Losses of the objectives against enumeration, against Transformers, and against the same rows without padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.model.factory import create_simple_rack
from stackwise.model.own_io import Head
from stackwise.model.rack import Rack
from stackwise.objectives.base import IGNORE, Objective
from stackwise.objectives.causal import CausalLM
from stackwise.objectives.custom import Custom
from stackwise.objectives.diffusion import Diffusion
from stackwise.objectives.head import hidden_of
from stackwise.objectives.masked import MaskedLM, Vocabulary
from stackwise.objectives.schedules import NoiseSchedule

V, MASK, PAD = 30, 29, 28
VOCABULARY = Vocabulary(V, MASK, (PAD,))

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "clm": CausalLM,
    "custom": Custom,
    "mlm": lambda: MaskedLM(VOCABULARY, 5, "bert", fraction=0.3),
    "mlm, gaussian": lambda: MaskedLM(VOCABULARY, 5, "gaussian", fraction=0.3),
    "diffusion": lambda: Diffusion(VOCABULARY, 5, "absorbing"),
    "diffusion, t form": lambda: Diffusion(VOCABULARY, 5, "absorbing", form="t"),
    "diffusion, uniform": lambda: Diffusion(VOCABULARY, 5, "absorbing", weighting="uniform"),
    "diffusion, shifted": lambda: Diffusion(VOCABULARY, 5, "absorbing", shifted=True),
}


def rack_of(preset: str = "bert_style", **options: Any) -> Rack:
    rack = create_simple_rack(2, 1, 16, 24, 2, V, attention_preset=preset, max_seq_len=32, **options)
    with torch.no_grad():
        rack.head.matrix.mul_(8)
    return rack.eval()


# --- enumeration -----------------------------------------------------------------------------------------------


def test_both_forms_of_diffusion_agree_with_the_sum_over_all_subsets() -> None:
    """4 tokens of a vocabulary of 5: the mean over many rows is the sum over counts and sets, for any schedule."""
    T, mask = 4, 5
    rack = create_simple_rack(1, 1, 8, 8, 2, mask + 1, max_seq_len=T).eval()
    with torch.no_grad():
        rack.head.matrix.mul_(10)
    text = torch.tensor([[3, 0, 4, 1]])
    subsets = [set(s) for n in range(T + 1) for s in combinations(range(T), n)]
    inputs = torch.stack([text[0].where(torch.tensor([i not in s for i in range(T)]), mask) for s in subsets])
    with torch.no_grad():
        states = rack.forward_features(inputs)
    exact = 0.0
    for ids, hidden, subset in zip(inputs, states, subsets, strict=True):
        if subset:
            logits = (hidden @ rack.head.matrix.detach().t()).double()
            logits[:, mask] = -torch.inf
            nll = -logits.log_softmax(-1)[torch.arange(T), text[0]]
            n = len(subset)
            exact += float(nll[ids == mask].mean()) / math.comb(T, n) / T

    rows, chunks = 2000, 40
    numbers = (2 ** torch.arange(T)).double()
    codes = ((inputs == mask) * numbers).sum(1).long()
    place = torch.empty(2**T, dtype=torch.long).scatter(0, codes, torch.arange(2**T))
    for form in ("count", "t"):
        for schedule in ("linear", "cosine"):
            objective = Diffusion(
                Vocabulary(mask + 1, mask), 3, "absorbing", form=form, schedule=NoiseSchedule(schedule)
            )
            means = []
            for chunk in range(chunks):
                at = torch.arange(rows) + chunk * rows
                batch = {"input_ids": text.expand(rows, -1), "sample_ids": at, "places": at}
                example = objective.corrupt(batch)
                met = place[((example.input_ids == mask) * numbers).sum(1).long()]
                total, weight = objective.loss(states[met], rack.head, example)
                means.append(float(total / weight))
            spread = torch.tensor(means)
            error = float(spread.std()) / chunks**0.5
            assert error < 0.02 * exact
            assert float(spread.mean()) == pytest.approx(exact, abs=5 * error)


# --- Transformers ----------------------------------------------------------------------------------------------


def test_the_mlm_loss_is_that_of_bert_on_the_same_weights_and_masks() -> None:
    """The body is BERT's own; corruption, labels, head and loss are compared, with the gradient of the head."""
    transformers = pytest.importorskip("transformers", reason="needs pip install 'stackwise[hf]'")
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    bert = transformers.BertForMaskedLM(config).double().eval()
    ids = torch.randint(0, PAD, (6, 20))
    ids[1, 12:] = ids[4, 3:] = PAD
    objective = MaskedLM(VOCABULARY, 5, "bert", fraction=0.3)
    example = objective.corrupt({"input_ids": ids, "attention_mask": ids != PAD})
    theirs = bert(input_ids=example.input_ids, attention_mask=(ids != PAD).long(), labels=example.labels).loss
    with torch.no_grad():
        body = bert.bert(input_ids=example.input_ids, attention_mask=(ids != PAD).long())
        hidden = bert.cls.predictions.transform(body.last_hidden_state)
    weight = bert.cls.predictions.decoder.weight
    total, count = objective.loss(hidden, Head.of(weight), example)
    torch.testing.assert_close(total / count, theirs, rtol=1e-12, atol=0)
    (own,) = torch.autograd.grad(total / count, weight)
    theirs.backward()
    torch.testing.assert_close(own, weight.grad, rtol=1e-9, atol=1e-12)


# --- SUBS ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["count", "t"])
def test_the_mask_token_has_no_probability_and_visible_tokens_cost_nothing(form: str) -> None:
    objective = Diffusion(VOCABULARY, 5, "absorbing", form=form)
    example = objective.corrupt({"input_ids": torch.randint(0, PAD, (6, 20))})
    hidden = torch.randn(6, 20, 8, requires_grad=True)
    matrix = torch.randn(V, 8, requires_grad=True)
    total, _ = objective.loss(hidden, Head.of(matrix), example)
    total.backward()
    assert hidden.grad is not None
    assert matrix.grad is not None
    visible = example.labels == IGNORE
    assert not hidden.grad[visible].any()
    assert hidden.grad[~visible].any(-1).all()
    assert not matrix.grad[MASK].any()
    with torch.no_grad():
        other, louder = hidden.clone(), matrix.clone()
        other[visible] += 10 * torch.randn_like(other[visible])
        louder[MASK] += 100
    assert torch.equal(objective.loss(other, Head.of(louder), example)[0], total)


# --- padding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_cost_the_same_with_padding_and_without(name: str) -> None:
    """Loss and divisor of padded rows are the sums over the rows by themselves; what stands in padding is no matter."""
    objective = OBJECTIVES[name]()
    rack = rack_of("gpt_style" if name == "clm" else "bert_style").double()
    lengths = [20, 7, 1, 13]
    ids = torch.randint(0, PAD, (4, 20))
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    keys = {"sample_ids": torch.randperm(1000)[:4], "draws": torch.arange(4), "places": torch.arange(4)}

    def loss_of(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if name == "custom":
            batch = {**batch, "targets": (batch["input_ids"] * 7 + 3) % PAD}
        example = objective.corrupt(batch)
        with torch.no_grad():
            return objective.loss(hidden_of(rack, objective, example), rack.head, example)

    alone = []
    for i, n in enumerate(lengths):
        row = {"input_ids": ids[i : i + 1, :n], **{key: value[i : i + 1] for key, value in keys.items()}}
        alone.append(loss_of(row))
    found = []
    for padding in (torch.full_like(ids, PAD), torch.randint(0, PAD, ids.shape)):
        batch = {"input_ids": ids.where(mask, padding), "attention_mask": mask, **keys}
        found.append(loss_of(batch))
    for total, weight in found:
        assert weight == sum(w for _, w in alone)
        torch.testing.assert_close(total, sum(t for t, _ in alone), rtol=1e-6, atol=1e-6)
