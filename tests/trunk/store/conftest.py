"""A small frozen rack with rows of its own, stores for its outputs, and children that die where they are told to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.curriculum.split import apply_training
from stackwise.model.block_spec import BlockSpec
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec, StackSpec
from stackwise.objectives.base import Example
from stackwise.objectives.causal import CausalLM
from stackwise.trunk.store import ActivationStore


class Kit:
    """SAMPLES rows of TOKENS tokens, and racks of width WIDTH."""

    SAMPLES, TOKENS, WIDTH = 12, 8, 16
    ENTRY = TOKENS * WIDTH * 4
    IDENTITY = dict.fromkeys(("tokenizer", "data", "rows", "corruption", "compute"), "x")

    def __init__(self, child: Callable[..., int]) -> None:
        self.child = child

    def rack(self, stacks: int = 3, blocks: int = 2, tied: bool = False, **options: Any) -> Rack:
        """A rack of which the last stack, the tail, the norm and the head train."""
        block = BlockSpec(self.WIDTH, 2, causal=True, **options)
        listed = tuple(StackSpec(f"s{i}", (block,) * blocks, i) for i in range(stacks))
        spec = RackSpec(23, self.WIDTH, listed, tail=(block,), max_seq_len=64, tied=tied)
        rack = Rack(spec, seed=3)
        self.train(rack, f"stack:s{stacks - 1}", "tail", "norm", "head")
        return rack

    def train(self, rack: Rack, *units: str) -> int:
        """Let the units train; the prefix that is left."""
        return apply_training(rack, units).prefix

    def rows(self, *ids: int) -> Example:
        """Some of the rows; the odd ones hold two documents, every third is padded."""
        tokens = torch.randint(0, 23, (self.SAMPLES, self.TOKENS), generator=torch.Generator().manual_seed(5))
        index, place = torch.tensor(ids), torch.arange(self.TOKENS)
        second = (index % 2 == 1)[:, None] & (place >= 3)
        batch = {
            "input_ids": tokens[index],
            "sample_ids": index,
            "document_ids": second.int(),
            "position_ids": torch.where(second, place - 3, place),
            "attention_mask": ~((index % 3 == 0)[:, None] & (place >= 6)),
        }
        return CausalLM().corrupt(batch)

    @torch.no_grad()
    def computed(self, rack: Rack, example: Example, blocks: int) -> Tensor:
        """The output of the first blocks, by running them."""
        context = rack.make_context(
            example.input_ids, example.attention_mask, example.position_ids, example.document_ids
        )
        return rack.run(rack.embed(example.input_ids, context), context, 0, blocks)

    def entries(self, count: int, seed: int = 0) -> Tensor:
        """Distinct activations, [count, TOKENS, WIDTH]."""
        return torch.randn(count, self.TOKENS, self.WIDTH, generator=torch.Generator().manual_seed(seed))

    def store(self, folder: Path, **options: Any) -> ActivationStore:
        """A float32 store of [TOKENS, WIDTH] entries that goes to disk at once."""
        given: dict[str, Any] = {
            "key": {"boundary": 2, "prefix": "p"},
            "shape": (self.TOKENS, self.WIDTH),
            "n_samples": self.SAMPLES,
            "dtype": "float32",
            "ram_bytes": 0,
            "disk_bytes": 10**9,
        }
        return ActivationStore(folder, **{**given, **options})

    def size(self, folder: Path) -> int:
        """Bytes of all files below a folder."""
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def flip(self, path: Path, at: int) -> None:
        """Change one bit of a file."""
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(bytes(data))


@pytest.fixture
def kit(child: Callable[..., int]) -> Kit:
    return Kit(child)


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of syncs is tested by recording them; waiting for the disk shows nothing."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
