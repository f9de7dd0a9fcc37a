"""Rows of about the same length come together, and nothing but the padding changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise.data.corpus import TokenSplit
from stackwise.data.loader import TokenLoader
from stackwise.data.packing import GRAIN, PaddedRows
from stackwise.model.factory import create_simple_rack
from stackwise.objectives.base import Objective
from stackwise.objectives.causal import CausalLM
from stackwise.objectives.diffusion import Diffusion
from stackwise.objectives.masked import Vocabulary

LONGEST = 96


def documents(seed: int, n: int = 400) -> TokenSplit:
    """A split of documents of 2 to 2 * LONGEST tokens of 11 kinds."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 2 * LONGEST, n)
    starts = np.concatenate(([0], lengths.cumsum()[:-1]))
    return TokenSplit.from_arrays(random.integers(0, 11, lengths.sum()), starts)


def loader(split: TokenSplit, bucketing: bool, batch_size: int = 8, seed: int = 3) -> TokenLoader:
    return TokenLoader(
        split, seq_len=LONGEST, batch_size=batch_size, seed=seed, packing=False, bucketing=bucketing
    )


def test_rows_of_a_batch_are_about_as_long():
    split = documents(1)
    padded = {}
    for bucketing in (False, True):
        stream = loader(split, bucketing)
        batches = [next(stream) for _ in range(stream.steps_per_epoch)]
        wide = sum(batch["input_ids"].numel() for batch in batches)
        real = sum(
            int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
            for batch in batches
        )
        padded[bucketing] = 1 - real / wide
        assert all(batch["input_ids"].shape[1] <= LONGEST for batch in batches)
    assert padded[True] < padded[False] / 2


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_an_epoch_holds_every_row_once_in_an_order_that_does_not_depend_on_the_batch_size(seed, batch_size):
    split = documents(seed, 60)
    streams = [loader(split, True, size, seed) for size in (1, batch_size)]
    orders = []
    for stream in streams:
        ids: list[int] = []
        while len(ids) < stream.rows:
            ids += next(stream)["sample_ids"].tolist()
        orders.append(ids[: stream.rows])
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == list(range(streams[0].rows))


def test_epochs_come_in_new_orders_and_a_saved_position_goes_on():
    split = documents(2)
    stream, other = loader(split, True), loader(split, True)
    first = [next(stream)["sample_ids"] for _ in range(stream.steps_per_epoch)]
    state = stream.state_dict()
    again = [next(stream)["sample_ids"] for _ in range(20)]
    assert not torch.equal(torch.stack(first[:20]), torch.stack(again))
    other.load_state_dict(state)
    assert torch.equal(torch.stack([next(other)["sample_ids"] for _ in range(20)]), torch.stack(again))


def test_a_batch_is_as_wide_as_its_longest_row():
    split = documents(3)
    whole, trimmed = PaddedRows(split, LONGEST), PaddedRows(split, LONGEST, trim=True)
    for row in range(0, whole.n_rows, 7):
        ids = np.array([row])
        left, right = whole.batch(ids), trimmed.batch(ids)
        width = right["input_ids"].shape[1]
        assert width == trimmed.widths[row]
        assert width == LONGEST or width % GRAIN == 0
        assert torch.equal(left["input_ids"][:, :width], right["input_ids"])
        assert torch.equal(left["next_ids"], right["next_ids"])
        real = left.get("attention_mask", torch.ones(1, LONGEST, dtype=torch.bool)).sum()
        assert width - GRAIN < real <= width


@pytest.mark.parametrize(
    ("objective", "preset"),
    [(CausalLM(), "gpt_style"), (Diffusion(Vocabulary(12, 11), 5, "absorbing"), "bert_style")],
    ids=["clm", "diffusion"],
)
def test_the_loss_of_a_trimmed_batch_is_that_of_the_padded_one(objective: Objective, preset):
    split = documents(4)
    rack = create_simple_rack(
        1, 2, 16, 32, 2, 12, attention_preset=preset, seed=1, max_seq_len=LONGEST
    ).double()
    short = np.array([i for i, width in enumerate(PaddedRows(split, LONGEST).widths) if width <= 32][:5])
    losses = []
    for trim in (False, True):
        batch = PaddedRows(split, LONGEST, trim=trim).batch(short)
        example = objective.corrupt(batch)
        hidden = rack.forward_features(example.input_ids, example.attention_mask)
        losses.append(torch.stack(objective.loss(hidden, rack.io.head, example)))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)
