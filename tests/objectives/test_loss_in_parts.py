"""The loss of some rows does not depend on how they are cut into batches, or on how many processes share them."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed

from stackwise.data.corpus import TokenSplit
from stackwise.data.loader import TokenLoader
from stackwise.model.factory import create_simple_rack
from stackwise.model.rack import Rack
from stackwise.objectives.base import Objective
from stackwise.objectives.causal import CausalLM
from stackwise.objectives.diffusion import Diffusion
from stackwise.objectives.head import hidden_of
from stackwise.objectives.masked import MaskedLM, Vocabulary

V, T, ROWS = 30, 16, 32
VOCABULARY = Vocabulary(V, 29, (28,))
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "clm": CausalLM,
    "mlm": lambda: MaskedLM(VOCABULARY, 5, "bert", fraction=0.3),
    "diffusion": lambda: Diffusion(VOCABULARY, 5, "absorbing"),
    "diffusion, t form": lambda: Diffusion(VOCABULARY, 5, "absorbing", form="t"),
    "diffusion, antithetic": lambda: Diffusion(VOCABULARY, 5, "absorbing", t_sampling="antithetic"),
}
Sums = dict[str, list[float]]


@pytest.fixture
def split() -> TokenSplit:
    tokens = np.random.default_rng().integers(0, 28, 40 * T + 1)
    return TokenSplit.from_arrays(tokens, doc_starts=[0, 33, 90, 300])


@pytest.fixture
def racks() -> dict[bool, Rack]:
    """Models that see one direction and both."""
    presets = {True: "gpt_style", False: "bert_style"}
    return {
        causal: create_simple_rack(2, 1, 16, 24, 2, V, attention_preset=preset, max_seq_len=T).eval()
        for causal, preset in presets.items()
    }


def sums_of(
    racks: dict[bool, Rack], split: TokenSplit, batch_size: int, steps: int, rank: int = 0, world: int = 1
) -> Sums:
    """[summed loss, summed divisor] of each objective over some batches of a rank."""
    sums = {}
    for name, make in OBJECTIVES.items():
        loader = TokenLoader(split, seq_len=T, batch_size=batch_size, seed=3, rank=rank, world_size=world)
        objective = make()
        rack = racks[objective.causal]
        found = []
        for _ in range(steps):
            example = objective.corrupt(next(loader))
            with torch.no_grad():
                hidden = hidden_of(rack, objective, example)
                total, weight = objective.loss(hidden, rack.head, example)
            found.append([float(total), float(weight)])
        sums[name] = np.sum(found, 0).tolist()
    return sums


def same(found: Sums, expected: Sums) -> None:
    for name, (total, weight) in expected.items():
        assert found[name][1] == weight
        assert found[name][0] / weight == pytest.approx(total / weight, rel=1e-6)


def test_four_batches_of_8_cost_what_one_of_32_costs(racks: dict[bool, Rack], split: TokenSplit) -> None:
    """Over more than one pass, so that rows come twice, with other masks."""
    whole = sums_of(racks, split, ROWS, 3)
    same(sums_of(racks, split, 8, 12), whole)
    assert all(weight > 0 for _, weight in whole.values())


def _member(rank: int, world: int, folder: str, racks: dict[bool, Rack], split: TokenSplit) -> None:
    """One process: its part of the rows, then the sum over all processes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
    sums = sums_of(racks, split, ROWS // world, 2, rank, world)
    table = torch.tensor(list(sums.values()), dtype=torch.float64)
    distributed.all_reduce(table)
    Path(folder, f"{rank}.json").write_text(json.dumps(dict(zip(sums, table.tolist(), strict=True))))
    distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_that_share_the_rows_find_the_same_loss(
    racks: dict[bool, Rack], split: TokenSplit, tmp_path: Path, world: int
) -> None:
    alone = sums_of(racks, split, ROWS, 2)
    context = multiprocessing.get_context("fork")  # modules need not be loaded again
    members = [
        context.Process(target=_member, args=(rank, world, str(tmp_path), racks, split))
        for rank in range(world)
    ]
    for member in members:
        member.start()
    for member in members:
        member.join(120)
    try:
        assert [member.exitcode for member in members] == [0] * world
    finally:
        for member in members:
            member.kill()
    for rank in range(world):
        same(json.loads((tmp_path / f"{rank}.json").read_text()), alone)
