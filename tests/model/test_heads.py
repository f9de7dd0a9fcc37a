"""Heads for tasks: padding never counts, wherever it is; every head learns what it is for."""

from dataclasses import replace

import pytest
import torch

from stackwise import (
    MLGKATextClassifier,
    PairClassifier,
    SequenceClassifier,
    SequenceRegressor,
    TokenClassifier,
    ValueHead,
)
from stackwise.model.factory import create_simple_rack
from stackwise.model.heads import POOLINGS, padded, pool
from stackwise.model.rack import Rack

V, D = 40, 16


def rack_of(preset="bert_style", seed=0, **options):
    return create_simple_rack(2, 1, D, 24, 2, V, attention_preset=preset, seed=seed, **options)


def pair_rack(seed=0):
    return Rack(replace(rack_of().spec, token_types=2), seed=seed)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_is_over_real_tokens(side):
    hidden = torch.randn(3, 6, D, dtype=torch.float64)
    lengths, mask = [2, 6, 4], torch.zeros(3, 6)
    expected = {how: [] for how in POOLINGS}
    for row, n in enumerate(lengths):
        kept = slice(6 - n, 6) if side == "left" else slice(0, n)
        mask[row, kept] = 1
        real = hidden[row, kept]
        for how, value in (("mean", real.mean(0)), ("cls", real[0]), ("last", real[-1])):
            expected[how].append(value)
    hidden[mask == 0] = torch.nan
    for how in POOLINGS:
        torch.testing.assert_close(pool(hidden, mask, how), torch.stack(expected[how]))
    torch.testing.assert_close(pool(hidden[1:2], how="mean"), hidden[1:2].mean(1))


def test_what_cannot_be_pooled_is_refused():
    hidden = torch.randn(2, 3, D)
    with pytest.raises(ValueError, match=r"rows \[1\] are all padding"):
        pool(hidden, torch.tensor([[1, 1, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        pool(hidden, how="meen")


HEADS = {
    "sequence": lambda: SequenceClassifier(rack_of(), 3),
    "cls": lambda: SequenceClassifier(rack_of(), 3, pooling="cls"),
    "last, causal": lambda: SequenceClassifier(rack_of("gpt_style"), 3, pooling="last"),
    "learned positions": lambda: SequenceClassifier(rack_of(use_rope=False, short_conv=3), 3),
    "regression": lambda: SequenceRegressor(rack_of()),
    "token": lambda: TokenClassifier(rack_of(), 4),
    "value": lambda: ValueHead(rack_of("gpt_style")),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side):
    model = HEADS[name]().double().eval()
    alone = torch.randint(0, V, (1, 5))
    other = torch.randint(0, V, (2, 9))
    kept = slice(4, 9) if side == "left" else slice(0, 5)
    other[:, kept] = alone
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, kept] = True
    out, expected = model(other, mask), model(alone)
    if name in ("token", "value"):
        out = out[:, kept]
    torch.testing.assert_close(out, expected.expand_as(out))


def test_the_second_sentence_of_a_pair_is_another_input():
    model = PairClassifier(pair_rack(), 2).double().eval()
    rows = padded([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]], pad_id=11)
    assert rows.input_ids.tolist() == [[1, 2, 3, 5, 6], [4, 7, 8, 9, 11]]
    assert rows.token_type_ids.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 0]]
    assert rows.attention_mask.tolist() == [[True] * 5, [True] * 4 + [False]]
    given = model(rows.input_ids, rows.attention_mask, token_type_ids=rows.token_type_ids)
    swapped = model(rows.input_ids, rows.attention_mask, token_type_ids=1 - rows.token_type_ids)
    assert not torch.allclose(given, swapped)
    with pytest.raises(ValueError, match="token_type_ids"):
        model(rows.input_ids, rows.attention_mask)


def fit(model, steps, batch):
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(steps):
        inputs, labels = batch()
        loss = model.loss(model(**inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_every_head_learns():
    torch.manual_seed(0)

    def ids():
        return torch.randint(0, V, (32, 6))

    def whether_first_is_large():
        rows = ids()
        return {"input_ids": rows}, (rows[:, 0] >= V // 2).long()

    def share_of_large():
        rows = ids()
        return {"input_ids": rows}, (rows >= V // 2).float().mean(1)

    def large():
        rows = ids()
        labels = (rows >= V // 2).long()
        labels[:, 0] = -100
        return {"input_ids": rows}, labels

    def which_are_large():
        inputs, labels = large()
        return inputs, (labels > 0).float()

    def same_kind():
        first, second = ids()[:, :1], ids()[:, :1]
        rows = padded(first.tolist(), second.tolist())
        labels = ((first >= V // 2) == (second >= V // 2)).long().squeeze(1)
        return {"input_ids": rows.input_ids, "token_type_ids": rows.token_type_ids}, labels

    assert fit(SequenceClassifier(rack_of(), 2, pooling="cls"), 60, whether_first_is_large) < 0.2
    assert fit(SequenceRegressor(rack_of()), 60, share_of_large) < 0.02
    assert fit(TokenClassifier(rack_of(), 2), 40, large) < 0.2
    assert fit(PairClassifier(pair_rack(), 2), 150, same_kind) < 0.3
    assert fit(ValueHead(rack_of("gpt_style")), 60, which_are_large) < 0.1


def test_values_of_padding_are_not_scored():
    model = ValueHead(rack_of("gpt_style"))
    values, targets = torch.randn(2, 4), torch.randn(2, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    expected = ((values - targets) ** 2)[mask.bool()].mean()
    torch.testing.assert_close(model.loss(values, targets, mask), expected)


def test_starts_follow_the_seed_and_names_are_plain():
    a, b, c = (SequenceClassifier(rack_of(), 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.out.weight, b.out.weight)
    assert not torch.equal(a.out.weight, c.out.weight)
    names = [name for name, _ in a.named_parameters()]
    assert {"out.weight", "out.bias", "rack.embedding.weight"} <= set(names)
    assert a.get_parameter_count() == a.rack.get_parameter_count() + 3 * D + 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SequenceClassifier(rack_of(), 1), "SequenceRegressor"),
        (lambda: TokenClassifier(rack_of(), 0), "ValueHead"),
        (lambda: SequenceClassifier(rack_of(), 2, pooling="max"), "mean, cls, last"),
        (lambda: SequenceRegressor(rack_of(), dropout=1.0), r"\[0, 1\)"),
        (lambda: PairClassifier(rack_of(), 2), "token_types=2"),
        (lambda: padded([[1], []]), "needs a token"),
        (lambda: padded([[1]], [[1], [2]]), "1 first sentences and 2"),
        (
            lambda: TokenClassifier(rack_of(), 2).loss(torch.zeros(1, 2, 2), torch.full((1, 2), -100)),
            "no token",
        ),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_mlgka_classifier_has_the_size_and_attention_of_its_name():
    with torch.device("meta"):
        large = MLGKATextClassifier()
    assert 26.4e6 < large.get_parameter_count() < 26.9e6
    small = MLGKATextClassifier(
        2000, 128, 512, n_heads=4, n_kv_heads=2, n_layers=4, n_classes=3, max_seq_len=64
    )
    assert 1.15e6 < small.get_parameter_count() < 1.25e6
    info = small.get_attention_info()
    assert (info["family"], info["kernel"], info["n_kv_heads"]) == ("mla", "laplacian", 2)
    assert (info["query_rank"], info["kv_rank"], info["rope_dim"], info["bandwidth"]) == (32, 16, 8, 16.0)
    small.double().eval()
    alone, other = torch.randint(0, 2000, (1, 5)), torch.randint(0, 2000, (2, 9))
    other[:, :5] = alone
    mask = torch.arange(9)[None].expand(2, 9) < 5
    torch.testing.assert_close(small(other, mask), small(alone).expand(2, 3))
    assert not torch.allclose(small(other), small(alone))
    with pytest.raises(ValueError, match="n_heads"):
        MLGKATextClassifier(50, 16, 16, n_heads=3, n_kv_heads=1, n_layers=1)


def test_a_wide_kernel_keeps_the_gradient_of_the_embedding_small():
    ids, labels = torch.randint(0, 50, (16, 12)), torch.randint(0, 2, (16,))

    def gradient(bandwidth):
        total = 0.0
        for seed in range(3):
            model = MLGKATextClassifier(50, 32, 32, 4, 1, 2, kernel_bandwidth=bandwidth, seed=seed)
            model.loss(model(ids), labels).backward()
            total += float(model.rack.embedding.weight.grad.norm())
        return total

    assert gradient(16.0) < 0.5 * gradient(1.0)
