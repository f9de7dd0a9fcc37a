"""ProgressiveDataLoader gives any loader's batches the targets and masks of an objective, and trunk activations."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from stackwise import ConfigError, ProgressiveMasking, StackWiseConfig, TimeStepMasking
from stackwise.data.corpus import TokenSplit
from stackwise.data.loader import EvalLoader, TokenLoader
from stackwise.objectives.build import objective_of
from stackwise.objectives.causal import CausalLM
from stackwise.objectives.custom import Custom
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


# --- masked objectives -------------------------------------------------------------------------------------------

V, MASK, SPECIAL = 60, 59, (0, 1)
BASIC = "input_ids targets labels masks masking_ids time_step mask_ratio stack_idx attention_mask sample_ids"
BASIC += " trunk_activations training_objective original_batch"


def config_of(name="mlm", objective=None, **progressive):
    config = StackWiseConfig()
    config.model.vocab_size = V
    keys = {"training_objective": name, "building_mode": "prepend", "target_stacks": 4, **progressive}
    for key, value in keys.items():
        setattr(config.training.progressive, key, value)
    for key, value in {"mask_token_id": MASK, **(objective or {})}.items():
        setattr(config.objective, key, value)
    return config


def random_batches(count=3, rows=8, length=50):
    ids = torch.randint(2, MASK, (count, rows, length))
    real = torch.arange(length) < torch.randint(length // 2, length + 1, (count, rows, 1))
    special = torch.rand(count, rows, length) < 0.1
    ids = ids.masked_fill(special, 1).masked_fill(~real, 0)
    return [{"input_ids": i, "attention_mask": r.long()} for i, r in zip(ids, real, strict=True)]


def mlm(config=None, **keys):
    return objective_of(config or config_of(time_interpretation="none", **keys), SPECIAL)


@pytest.mark.parametrize("name", ["mlm", "diffusion"])
def test_ids_are_replaced_at_masks_only(name):
    base = random_batches()
    objective = objective_of(config_of(name, time_interpretation="none"), SPECIAL)
    for given, batch in zip(base, progressive(base, objective=objective, stack_idx=3), strict=True):
        ids, masks = given["input_ids"], batch["masks"]
        assert set(batch) == set(BASIC.split())
        assert masks.dtype == torch.bool
        assert masks.any(1).all()
        assert torch.equal(batch["input_ids"][~masks], ids[~masks])
        assert torch.equal(batch["labels"], torch.where(masks, ids, -100))
        assert torch.equal(batch["targets"], batch["labels"])
        assert torch.equal(batch["masking_ids"], masks.nonzero())
        assert torch.equal(batch["original_batch"]["input_ids"], ids)
        free = (ids >= 2) & given["attention_mask"].bool()
        assert not (masks & ~free).any()
        assert batch["mask_ratio"] == pytest.approx(float(masks.sum() / free.sum()))
        assert (batch["stack_idx"], batch["training_objective"]) == (3, name)
        assert batch["time_step"] is None
        if name == "mlm":
            expected = (0.15 * free.sum(1)).round().clamp_min(1)
            assert torch.equal(masks.sum(1), expected.long())
        else:
            assert (batch["input_ids"][masks] == MASK).all()
            assert masks.sum(1).unique().numel() > 2


def test_the_noise_of_every_stack():
    """Depth as time: the tuple batches of a stack are masked as its interval says."""
    base = [(torch.randint(2, MASK, (64, 50)),) for _ in range(4)]
    config = config_of("diffusion", time_per_stack=100, time_overlap=0.0)
    strategy = TimeStepMasking(config, special_ids=SPECIAL)
    for stack in range(4):
        loader = progressive(base, masking_strategy=strategy, stack_idx=stack)
        low, high = strategy.get_interval_for_stack(stack)
        for batch in loader:
            shares = batch["masks"].sum(1) / 50
            assert bool((shares > low).all())
            assert bool((shares <= high + 1 / 50).all())
            assert batch["mask_ratio"] == pytest.approx((low + high) / 2, abs=0.02)
            assert (batch["time_step"], batch["stack_idx"]) == (100 * stack, stack)
    config.training.progressive.time_overlap = 0.4
    (batch, *_) = progressive(
        base, masking_strategy=TimeStepMasking(config, special_ids=SPECIAL), stack_idx=1
    )
    shares = batch["masks"].sum(1) / 50
    assert 0.15 <= shares.min() < 0.2  # a quarter and 0.4 of it on both sides
    assert 0.56 < shares.max() <= 0.62
    with pytest.raises(IndexError, match="stack 4 is outside 0 to 3"):
        progressive(base, masking_strategy=strategy, stack_idx=4)


def test_point_masks_by_stack():
    base = [{"input_ids": torch.randint(2, MASK, (8, 100))}]
    strategy = ProgressiveMasking(config_of(), special_ids=SPECIAL)
    ratios = []
    for stack in range(4):
        (batch,) = progressive(base, masking_strategy=strategy, stack_idx=stack)
        assert (batch["masks"].sum(1) == round(100 * strategy.mask_ratio(batch["time_step"]))).all()
        ratios.append(batch["mask_ratio"])
    assert ratios == pytest.approx([0.15, 0.40, 0.65, 0.90])


def test_time_as_input_gives_every_row_its_time():
    base = [{"input_ids": torch.randint(2, MASK, (16, 100)), "sample_ids": torch.randint(0, 10**9, (16,))}]
    config = config_of("diffusion", time_interpretation="input")
    (batch,) = progressive(base, masking_strategy=TimeStepMasking(config), stack_idx=1)
    time = batch["time_step"]
    assert time.shape == (16,)
    # The linear schedule masks the share t, in whole tokens.
    assert torch.equal(batch["masks"].sum(1), (time.double() * 100).ceil().long())
    assert time.unique().numel() > 8


def test_the_masks_are_those_of_a_run():
    """By sample id and pass, whatever the batch size; without ids, by place; a new corruption in every pass."""
    split = TokenSplit.from_arrays(torch.randint(2, MASK, (640,)).numpy())
    objective = mlm()

    def passes(batch_size, **options):
        loader = progressive(EvalLoader(split, seq_len=16, batch_size=batch_size), **options)
        return [torch.cat([batch["masks"] for batch in loader]) for _ in range(3)]

    first, second, third = passes(8, objective=objective)
    assert all(map(torch.equal, passes(5, objective=objective), (first, second, third)))
    assert (first != second).any(1).float().mean() > 0.9
    twice = passes(8, objective=mlm(objective={"mask_draws": 2}))
    assert torch.equal(twice[0], twice[2])
    assert not torch.equal(twice[0], twice[1])

    rows = torch.randint(2, MASK, (6, 1, 30))
    (a, b, *_) = progressive([{"input_ids": row} for row in rows], objective=objective)
    assert not torch.equal(a["masks"], b["masks"])  # no ids, and yet the batches differ

    train = TokenLoader(split, seq_len=16, batch_size=8, seed=3)
    again = TokenLoader(split, seq_len=16, batch_size=8, seed=3)
    for batch, given, _ in zip(progressive(train, objective=objective), again, range(12), strict=False):
        expected = objective.corrupt(given)
        assert torch.equal(batch["input_ids"], expected.input_ids)  # the loader's own draws and places hold
        assert torch.equal(batch["labels"], expected.labels)


def test_a_shifted_objective_scores_one_position_earlier():
    base = [{"input_ids": torch.randint(2, MASK, (8, 40))}]
    objective = objective_of(
        config_of("diffusion", {"target_shift": True}, time_interpretation="none"), SPECIAL
    )
    (batch,) = progressive(base, objective=objective)
    masks, ids = batch["masks"], base[0]["input_ids"]
    assert torch.equal(masks, batch["input_ids"] == MASK)
    assert not masks[:, 0].any()
    assert torch.equal(batch["labels"][:, :-1], torch.where(masks, ids, -100)[:, 1:])


def test_rows_cut_short_and_rows_with_nothing_to_corrupt():
    base = [{"input_ids": torch.randint(2, MASK, (200, 40))}]
    objective = mlm(objective={"random_length_fraction": 0.5})
    (batch,) = progressive(base, objective=objective)
    lengths = batch["attention_mask"].sum(1)
    assert 50 < (lengths < 40).sum() < 150
    assert not (batch["masks"] & ~batch["attention_mask"].bool()).any()

    (batch,) = progressive([{"input_ids": torch.ones(2, 5, dtype=torch.long)}], objective=mlm())
    assert batch["masking_ids"].shape == (0, 2)
    assert batch["mask_ratio"] == 0.0
    assert (batch["labels"] == -100).all()


def test_a_model_that_echoes_its_input_is_right_on_kept_tokens_only():
    base = [{"input_ids": torch.randint(2, MASK, (50, 200))}]
    (batch,) = progressive(base, objective=mlm())
    masks = batch["masks"]
    hidden = masks & (batch["input_ids"] == MASK)
    right = batch["input_ids"] == batch["labels"]
    assert not right[hidden].any()
    assert float(right[masks].float().mean()) == pytest.approx(0.1, abs=0.03)


def test_custom_targets_are_verbatim():
    targets = torch.tensor([[4, -100, 2, 1], [3, 3, 3, 3]])
    (batch,) = progressive([{"input_ids": IDS, "targets": targets}], objective=Custom())
    assert torch.equal(batch["labels"], targets)
    assert torch.equal(batch["input_ids"], IDS)
    assert "clm_mask" not in batch
    assert not batch["masks"].any()
    with pytest.raises(KeyError, match="neither 'targets' nor 'labels'"):
        list(progressive([{"input_ids": IDS}], objective=Custom()))


def test_cached_activations_need_one_corruption_for_each_sample():
    split = TokenSplit.from_arrays(torch.randint(2, MASK, (150,)).numpy())
    base = EvalLoader(split, seq_len=16, batch_size=4)

    def trunk(batch):
        return torch.nn.functional.one_hot(batch["input_ids"], V).float()

    options = {"trunk_activations": trunk, "cache_activations": True}
    with pytest.raises(ValueError, match=r"set objective\.mask_draws to 1"):
        progressive(base, objective=mlm(), **options)
    loader = progressive(base, objective=mlm(objective={"mask_draws": 1}), **options)
    for _ in range(2):
        for batch in loader:
            assert torch.equal(batch["trunk_activations"].argmax(-1), batch["input_ids"])
    assert loader.cache_info()["hits"] == loader.cache_info()["entries"] == 9


def test_combinations_that_mean_nothing_are_refused():
    strategy = TimeStepMasking(config_of())
    with pytest.raises(ValueError, match="brings its own objective, 'mlm'; leave out objective \\('clm'\\)"):
        progressive([], masking_strategy=strategy, objective=CausalLM())
    with pytest.raises(ValueError, match="nothing to cache"):
        progressive([], cache_activations=True)
    with pytest.raises(ValueError, match="has only ids"):
        progressive([], objective=mlm(objective={"corruption": "gaussian"}))
    unknown = config_of(objective={"mask_token_id": None, "add_mask_token": False})
    with pytest.raises(ConfigError, match="no mask token is known"):
        progressive([], masking_strategy=TimeStepMasking(unknown))
    with pytest.raises(KeyError, match="input_ids"):
        list(progressive([{"ids": IDS}], masking_strategy=strategy))
