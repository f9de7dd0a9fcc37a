"""Causal language modelling: what is a target, and what the loss is."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stackwise.model.factory import create_simple_rack
from stackwise.model.own_io import Head
from stackwise.objectives.causal import CausalLM

NO = -100
ids = torch.tensor


def labels_of(**batch: torch.Tensor) -> list[list[int]]:
    return CausalLM().corrupt(batch).labels.tolist()


def test_every_token_predicts_the_next_one_and_the_last_predicts_nothing() -> None:
    assert labels_of(input_ids=ids([[5, 6, 7, 8]])) == [[6, 7, 8, NO]]


def test_next_ids_are_the_targets_of_the_last_position() -> None:
    rows = ids([[5, 6, 7], [1, 2, 3]])
    assert labels_of(input_ids=rows, next_ids=ids([8, NO])) == [[6, 7, 8], [2, 3, NO]]


def test_the_last_real_token_of_a_padded_row_has_no_target() -> None:
    mask = ids([[1, 1, 1, 0, 0]])
    assert labels_of(input_ids=ids([[5, 6, 7, 0, 0]]), attention_mask=mask) == [[6, 7, NO, NO, NO]]


def test_padding_on_the_left_predicts_nothing() -> None:
    mask = ids([[0, 0, 1, 1]]).bool()
    assert labels_of(input_ids=ids([[0, 0, 5, 6]]), attention_mask=mask, next_ids=ids([7])) == [
        [NO, NO, 6, 7]
    ]


def test_no_target_crosses_the_edge_of_a_document() -> None:
    documents = ids([[0, 0, 1, 1, 2]], dtype=torch.int32)
    rows = ids([[5, 6, 7, 8, 9]])
    assert labels_of(input_ids=rows, document_ids=documents, next_ids=ids([4])) == [[6, NO, 8, NO, 4]]


def test_the_batch_is_left_as_it_was_and_its_other_fields_are_passed_on() -> None:
    batch = {
        "input_ids": ids([[5, 6, 7]], dtype=torch.int32),
        "position_ids": ids([[0, 1, 0]]),
        "sample_ids": ids([11]),
    }
    before = {key: value.clone() for key, value in batch.items()}
    example = CausalLM().corrupt(batch)
    assert all(torch.equal(batch[key], before[key]) for key in batch)
    assert example.input_ids.dtype == example.labels.dtype == torch.int64
    assert example.position_ids is batch["position_ids"]
    assert example.sample_ids is batch["sample_ids"]
    assert example.document_ids is None


def test_a_batch_without_input_ids_is_a_key_error_that_names_what_is_there() -> None:
    with pytest.raises(KeyError, match=r"no 'input_ids'.*text"):
        CausalLM().corrupt({"text": ids([[1]])})


@pytest.mark.parametrize("mask", [None, torch.ones(1, 6, dtype=torch.bool)])
def test_a_later_token_changes_no_earlier_logit(mask: torch.Tensor | None) -> None:
    rack = create_simple_rack(1, 2, 16, 32, 2, 11, attention_preset="gpt_style").double().eval()
    first = ids([[1, 2, 3, 4, 5, 6]])
    second = first.clone()
    second[0, 4] = 9
    with torch.no_grad():
        difference = (rack(first, mask) - rack(second, mask)).abs().amax(dim=(0, 2))
    assert difference[:4].max() == 0
    assert difference[4:].min() > 0


@pytest.mark.parametrize("rows", [1, 5, 8, 1000, None])
def test_the_chunked_loss_is_the_plain_one_in_value_and_gradients(rows: int | None) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 8, 6).double(), torch.randn(13, 6).double()
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 5:] = False
    batch = {"input_ids": torch.randint(0, 13, (3, 8)), "attention_mask": mask, "next_ids": ids([2, NO, 3])}
    objective = CausalLM()
    example = objective.corrupt(batch)

    results = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if chunked:
            loss, weight = objective.loss(h, Head.of(w), example, rows)
            assert int(weight) == 8 + 4 + 8
        else:
            loss = F.cross_entropy((h @ w.t()).flatten(0, 1), example.labels.flatten(), reduction="sum")
        (loss * 0.7).backward()
        results.append((loss, h.grad, w.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_rows_without_a_target_weigh_nothing() -> None:
    objective = CausalLM()
    example = objective.corrupt({"input_ids": ids([[5]])})
    loss, weight = objective.loss(torch.randn(1, 1, 4), Head.of(torch.randn(9, 4)), example)
    assert float(loss) == 0.0
    assert int(weight) == 0
