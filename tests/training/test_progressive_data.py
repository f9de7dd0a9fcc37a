"""ProgressiveDataLoader gives any loader's batches the causal targets, masks and trunk activations."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from stackwise.data.corpus import TokenSplit
from stackwise.data.loader import EvalLoader, TokenLoader
from stackwise.objectives.causal import CausalLM
from stackwise.training.progressive_data import ProgressiveDataLoader

IDS = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 0]])
REAL = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def progressive(base, **options):
    return ProgressiveDataLoader(base, **options)


def test_causal_targets_and_masks():
    (batch,) = progressive([{"input_ids": IDS, "attention_mask": REAL}], stack_idx=2)
    assert batch["labels"].tolist() == [[6, 7, 8, -100], [2, 3, -100, -100]]
    assert torch.equal(batch["targets"], batch["labels"])
    assert torch.equal(batch["input_ids"], IDS)
    assert batch["clm_mask"].tolist() == [True, True, True, False]
    assert batch["combined_masks"].tolist() == [[True, True, True, False], [True, True, False, False]]
    assert batch["masks"].tolist() == [[False] * 4] * 2
    assert batch["masking_ids"].shape == (0, 2)
    assert (batch["time_step"], batch["mask_ratio"], batch["stack_idx"]) == (None, 0.0, 2)
    assert batch["training_objective"] == "clm"
    assert torch.equal(batch["original_batch"]["input_ids"], IDS)


def test_every_key_is_always_there():
    (batch,) = progressive([{"input_ids": IDS}])
    expected = (
        "input_ids targets labels masks masking_ids time_step mask_ratio stack_idx attention_mask sample_ids"
    )
    expected += " trunk_activations training_objective original_batch clm_mask combined_masks"
    assert set(batch) == set(expected.split())
    assert batch["attention_mask"] is batch["sample_ids"] is batch["trunk_activations"] is None


def test_the_next_token_of_a_row_is_scored_and_document_ids_pass_through():
    split = TokenSplit.from_arrays(range(20), [0, 6])
    (batch,) = progressive(EvalLoader(split, seq_len=4, batch_size=4))
    assert batch["labels"].tolist() == [[1, 2, 3, 4], [5, -100, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
    assert batch["clm_mask"].all()
    assert {"document_ids", "position_ids"} <= set(batch)
    assert batch["sample_ids"].tolist() == [0, 1, 2, 3]


def test_tuple_batches():
    dataset = TensorDataset(IDS, REAL)
    (batch,) = progressive(DataLoader(dataset, batch_size=2))
    assert torch.equal(batch["attention_mask"], REAL)
    (batch,) = progressive([(IDS,)])
    assert batch["attention_mask"] is None
    for wrong in ((IDS, IDS), (IDS, REAL, IDS), (IDS, REAL[:, :2])):
        with pytest.raises(ValueError, match="name its members in a dict"):
            list(progressive([wrong]))
    with pytest.raises(TypeError, match="a batch is a Tensor"):
        list(progressive([IDS]))


def test_a_batch_without_ids_is_a_key_error():
    with pytest.raises(KeyError, match="input_ids"):
        list(progressive([{"ids": IDS}]))


def test_length_is_that_of_the_wrapped_loader():
    split = TokenSplit.from_arrays(range(40))
    assert len(progressive(EvalLoader(split, seq_len=4, batch_size=2))) == 5
    with pytest.raises(TypeError):
        len(progressive(TokenLoader(split, seq_len=4, batch_size=2, seed=0)))


def test_trunk_activations_are_computed_once_per_sample_when_cached():
    split = TokenSplit.from_arrays(range(41))
    table = torch.randn(41, 3, requires_grad=True)
    calls = []

    def trunk(batch):
        calls.append(batch["sample_ids"].tolist())
        return table[batch["input_ids"]]

    base = EvalLoader(split, seq_len=4, batch_size=3)
    plain = progressive(base, trunk_activations=trunk)
    expected = [batch["trunk_activations"] for batch in plain]
    assert not any(hidden.requires_grad for hidden in expected)
    assert plain.cache_info()["entries"] == 0

    calls.clear()
    cached = progressive(base, trunk_activations=trunk, cache_activations=True)
    for _ in range(2):
        for batch, hidden in zip(cached, expected, strict=True):
            assert torch.equal(batch["trunk_activations"], hidden)
    assert sorted(sum(calls, start=[])) == list(range(10))  # noqa: RUF017
    assert cached.cache_info() == {"entries": 10, "bytes": 10 * 4 * 3 * 4, "hits": 10, "misses": 10}
    assert torch.equal(cached.get_cached_activations([4, 3]), torch.stack([expected[1][1], expected[1][0]]))
    with pytest.raises(KeyError, match=r"\[99\]"):
        cached.get_cached_activations([3, 99])
    cached.clear_cache()
    assert cached.cache_info() == {"entries": 0, "bytes": 0, "hits": 0, "misses": 0}
    with pytest.raises(ValueError, match="needs 'sample_ids'"):
        list(progressive([{"input_ids": IDS}], trunk_activations=trunk, cache_activations=True))


def test_combinations_that_mean_nothing_are_refused():
    class Masked(CausalLM):
        name = "mlm"

    with pytest.raises(ValueError, match="the objective is 'mlm'"):
        ProgressiveDataLoader([], objective=Masked())
    with pytest.raises(ValueError, match="masks nothing"):
        progressive([], masking_strategy=object())
    with pytest.raises(ValueError, match="nothing to cache"):
        progressive([], cache_activations=True)
