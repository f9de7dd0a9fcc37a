"""Remembered answers are the answers: whatever runs on fake tensors gives the same tensors a second time."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from stackwise.planning import recall
from stackwise.planning.recall import Look, Recall


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch):
    monkeypatch.setattr(recall, "_ANSWERS", {})


def seen(tensors):
    """How the tensors look, and which of them share memory."""
    places = [tensor.untyped_storage()._cdata for tensor in tensors]
    sizes = [tensor.untyped_storage().nbytes() for tensor in tensors]
    return [Look.of(tensor) for tensor in tensors], [places.index(place) for place in places], sizes


def attend():
    x = torch.empty(2, 5, 3, 8, requires_grad=True)
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    turned = torch.view_as_real(pairs * pairs.conj()).flatten(-2)
    q, k, v = (t.transpose(1, 2) for t in (turned, x * 2, x + x[:, :1]))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out.square().mean().backward()
    return [x, pairs.conj(), turned, q, k, v, out, x.grad]


def views():
    x = torch.empty(4, 6)
    rows = x.unbind()
    x[1].add_(1)
    same = x.mul_(2)
    return [x, *rows, x.t(), x[:, ::2], x.view(torch.int32), same, torch.cat([x, x.t().reshape(4, 6)])]


def kinds():
    x = torch.empty(3, dtype=torch.int64)
    return [x * 2, x * 2.0, x * True, x / 2, x.to(torch.bfloat16), torch.full((2,), 1), torch.full((2,), 1.0)]


def in_place():
    """The input looks otherwise afterwards, which no answer says."""
    x, y = torch.empty(3, 5), torch.empty(7)
    x.t_()
    y.resize_(2, 3)
    return [x, y, x @ y.view(3, 2)]


def losses():
    hidden, labels = torch.empty(6, 8, requires_grad=True), torch.empty(6, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(F.layer_norm(hidden, (8,)), torch.empty(11, 8))
    loss = F.cross_entropy(logits.float(), labels, reduction="sum")
    (grad,) = torch.autograd.grad(loss, hidden)
    return [hidden, logits, loss, grad, *torch.topk(logits, 2), logits.argmax(-1)]


@pytest.mark.parametrize("work", [attend, views, kinds, in_place, losses])
def test_the_second_time_is_like_the_first_and_like_no_memory_at_all(work):
    with FakeTensorMode() as fakes:
        plain = seen(work())
        with Recall(fakes):
            assert seen(work()) == plain
            asked = len(recall._ANSWERS)
            assert seen(work()) == plain
    assert asked > 5
    assert len(recall._ANSWERS) == asked, "nothing is asked twice"


def test_answers_serve_other_tensors_and_another_mode():
    for _ in range(2):
        with FakeTensorMode() as fakes, Recall(fakes):
            x = torch.empty(3, 4)
            y = x.t()
            assert y.fake_mode is fakes
            assert y.untyped_storage()._cdata == x.untyped_storage()._cdata


def test_memory_for_answers_is_bounded(monkeypatch):
    monkeypatch.setattr(recall, "LIMIT", 10)
    with FakeTensorMode() as fakes, Recall(fakes):
        for size in range(30):
            torch.empty(size, 2).exp()
            assert len(recall._ANSWERS) <= 10


def test_what_depends_on_numbers_is_asked_for():
    with FakeTensorMode() as fakes, Recall(fakes):
        for value in (2, 3):
            assert torch.empty(5).narrow(0, 0, int(torch.tensor(value))).shape == (value,)
