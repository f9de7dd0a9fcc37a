"""A small state to save."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stackwise.checkpoint.store import Store

State = dict[str, dict[str, Tensor]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run" / "store")


@pytest.fixture
def make_state() -> Callable[[int], State]:
    """state(step): the embedding never changes, the stack and its optimizer do."""

    def make(step: int) -> State:
        generator = torch.Generator().manual_seed(step)
        weights = torch.randn(8, 6, generator=generator)
        return {
            "embedding/weights": {"weight": torch.arange(24.0).reshape(6, 4)},
            "stack:s0/weights": {"blocks.0.attn.weight": weights, "blocks.0.bias": torch.zeros(6)},
            "stack:s0/optimizer": {"blocks.0.attn.weight/exp_avg": weights.to(torch.bfloat16) * 0.1},
        }

    return make


@pytest.fixture
def assert_whole() -> Callable[..., None]:
    """Every part of the commit loads and is the state of its step, bit for bit."""

    def check(store: Store, step: int, state: State) -> None:
        commit = store.latest()
        assert commit is not None
        assert commit.step == step
        assert store.meta(commit) == {"step": step}
        assert sorted(commit.parts) == sorted(state)
        for part, tensors in state.items():
            loaded = store.load(commit, part)
            assert loaded.keys() == tensors.keys()
            assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)

    return check
