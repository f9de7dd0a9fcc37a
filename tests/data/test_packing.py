"""Rows hold consecutive tokens, every token is a target once, and nothing crosses a document edge."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stackwise.data.corpus import TokenSplit
from stackwise.data.errors import DataError
from stackwise.data.packing import PackedRows, PaddedRows, make_rows


def all_rows(rows):
    return rows.batch(np.arange(rows.n_rows))


def split_of(*lengths):
    """Documents of these lengths over tokens 0, 1, 2, ... so that a token names its own place."""
    starts = np.cumsum([0, *lengths])
    return TokenSplit.from_arrays(np.arange(starts[-1]), starts[:-1])


def test_rows_are_consecutive_and_the_next_token_is_the_last_target():
    batch = all_rows(PackedRows(split_of(14), 4))
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert batch["next_ids"].tolist() == [4, 8, 12]
    assert batch["sample_ids"].tolist() == [0, 1, 2]
    assert set(batch) == {"input_ids", "next_ids", "sample_ids"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize(("tokens", "rows"), [(5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_a_row_needs_the_token_after_it(tokens, rows):
    assert PackedRows(split_of(tokens), 4).n_rows == rows


def test_document_and_position_ids_restart_at_each_document_of_a_row():
    rows = PackedRows(split_of(6, 1, 3, 7), 8)
    batch = all_rows(rows)
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0, 0, 0, 1, 2], [0, 0, 1, 1, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 0], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert batch["next_ids"].tolist() == [8, 16]
    assert batch["document_ids"].dtype == torch.int32
    assert batch["position_ids"].dtype == torch.int64


def test_a_document_edge_between_two_rows_takes_the_target_away_and_needs_no_document_ids():
    batch = all_rows(PackedRows(split_of(4, 9), 4))
    assert batch["next_ids"].tolist() == [-100, 8, 12]
    assert "document_ids" not in batch


def test_without_doc_mask_the_split_is_one_document():
    batch = all_rows(PackedRows(split_of(4, 2, 7), 4, doc_mask=False))
    assert batch["next_ids"].tolist() == [4, 8, 12]
    assert set(batch) == {"input_ids", "next_ids", "sample_ids"}


def test_rows_without_an_edge_in_a_batch_with_one_are_a_single_document():
    batch = PackedRows(split_of(10, 7), 4).batch(np.array([2, 0]))
    assert batch["document_ids"].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert batch["sample_ids"].tolist() == [2, 0]


def test_padded_rows_hold_one_document_each():
    batch = all_rows(PaddedRows(split_of(6, 1, 3, 8), 4, pad_id=99))
    assert batch["input_ids"].tolist() == [
        [0, 1, 2, 3],
        [4, 5, 99, 99],
        [7, 8, 9, 99],
        [10, 11, 12, 13],
        [14, 15, 16, 17],
    ]
    assert batch["attention_mask"].tolist() == [
        [True] * 4,
        [True, True, False, False],
        [True, True, True, False],
        [True] * 4,
        [True] * 4,
    ]
    assert batch["next_ids"].tolist() == [4, -100, -100, 14, -100]
    assert "document_ids" not in batch


def test_padded_rows_without_padding_have_no_mask():
    rows = PaddedRows(split_of(6, 8), 4)
    assert "attention_mask" not in rows.batch(np.array([0, 2]))
    assert "attention_mask" in rows.batch(np.array([0, 1]))


def targets_of(batch):
    """{(token, its target)} of a batch of place tokens, by a plain loop over the definition."""
    pairs = []
    B, T = batch["input_ids"].shape
    documents = batch.get("document_ids", torch.zeros(B, T))
    real = batch.get("attention_mask", torch.ones(B, T))
    for b in range(B):
        for t in range(T):
            if t + 1 < T:
                if real[b, t + 1] and documents[b, t] == documents[b, t + 1]:
                    pairs.append((int(batch["input_ids"][b, t]), int(batch["input_ids"][b, t + 1])))
            elif real[b, t] and batch["next_ids"][b] != -100:
                pairs.append((int(batch["input_ids"][b, t]), int(batch["next_ids"][b])))
    return pairs


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 7))
def test_every_pair_inside_a_document_is_a_target_once(lengths, seq_len):
    split = split_of(*lengths)
    starts = set(split.doc_starts.tolist())
    inside = [(i, i + 1) for i in range(split.n_tokens - 1) if i + 1 not in starts]
    if split.n_tokens > seq_len:
        packed = PackedRows(split, seq_len)
        covered = [pair for pair in inside if pair[0] < packed.n_rows * seq_len]
        assert targets_of(all_rows(packed)) == covered
        assert len(inside) - len(covered) < seq_len
        everything = [(i, i + 1) for i in range(packed.n_rows * seq_len)]
        assert targets_of(all_rows(PackedRows(split, seq_len, doc_mask=False))) == everything
    if inside:
        assert targets_of(all_rows(PaddedRows(split, seq_len))) == inside


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 7), st.data())
def test_a_row_is_the_same_in_every_batch(lengths, seq_len, data):
    split = split_of(*lengths)
    kinds = [PackedRows] * (split.n_tokens > seq_len) + [PaddedRows] * (max(lengths) > 1)
    for kind in kinds:
        rows = kind(split, seq_len)
        whole = all_rows(rows)
        ids = data.draw(st.lists(st.integers(0, rows.n_rows - 1), min_size=1, max_size=6))
        part = rows.batch(np.array(ids))
        for key, tensor in part.items():
            assert torch.equal(tensor, whole[key][ids])


def test_a_batch_owns_its_memory():
    split = split_of(20)
    rows = PackedRows(split, 4)
    batch = all_rows(rows)
    batch["input_ids"].zero_()
    batch["next_ids"].zero_()
    assert split.tokens.tolist() == list(range(20))
    assert all_rows(rows)["input_ids"][0].tolist() == [0, 1, 2, 3]


def test_a_text_shorter_than_a_row_is_refused_with_both_numbers():
    with pytest.raises(
        DataError, match=r"the train split has 8 tokens and a row needs 9 .*lower training\.seq_len"
    ):
        make_rows(split_of(8), 8)
    with pytest.raises(
        DataError, match=r"validation split has 0 tokens.*data\.eval_fraction or data\.eval_path"
    ):
        make_rows(TokenSplit.from_arrays([], [], name="validation"), 8)
    with pytest.raises(DataError, match="a row needs 2"):
        make_rows(split_of(1, 1, 1), 8, packing=False)
    with pytest.raises(ValueError, match="seq_len is 0"):
        make_rows(split_of(8), 0)
