"""What the tests of streaming share: racks, what trains in them, and one pass forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.split import Split, apply_training, trained_units
from stackwise.curriculum.stage import Stage
from stackwise.model.describe import rack_spec
from stackwise.model.rack import Rack


class Lab:
    """Small racks with random weights."""

    cpu = torch.device("cpu")
    vocab = 37

    def config(self, stacks: int, blocks: int = 1, tail: int = 1, **model: Any) -> StackWiseConfig:
        return StackWiseConfig.from_dict(
            {
                "model": {
                    "d_model": 16,
                    "n_heads": 2,
                    "vocab_size": self.vocab,
                    "max_seq_len": 32,
                    "architecture": {"n_stacks": stacks, "blocks_per_stack": blocks},
                    **model,
                },
                "training": {"seq_len": 12, "progressive": {"max_stacks": 64, "global_head_blocks": tail}},
            }
        )

    def rack(self, stacks: int = 4, blocks: int = 1, tail: int = 1, **model: Any) -> Rack:
        """Keyword arguments are keys of `model`."""
        rack = Rack(rack_spec(self.config(stacks, blocks, tail, **model), stacks))
        generator = torch.Generator().manual_seed(stacks)
        with torch.no_grad():
            for parameter in rack.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return rack

    def stage(self, rack: Rack, *selectors: str) -> Stage:
        return Stage("test", len(rack.stacks), selectors, 1)

    def train(self, rack: Rack, *selectors: str) -> Split:
        """Thaw what the selectors of a stage name, and nothing else."""
        return apply_training(rack, trained_units(rack.spec, self.stage(rack, *selectors)))

    def ids(self, rows: int = 3, tokens: int = 12, seed: int = 0) -> Tensor:
        return torch.randint(0, self.vocab, (rows, tokens), generator=torch.Generator().manual_seed(seed))

    def both_ways(self, rack: Rack, prefix: int = 0, ids: Tensor | None = None, **options: Any) -> Tensor:
        """One pass forward, under autocast to bfloat16 where `half`, and backward; returns the hidden states."""
        torch.manual_seed(5)  # dropout
        half = options.pop("half", False)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            hidden = rack.forward_features(self.ids() if ids is None else ids, prefix=prefix, **options)
            loss = rack.head(hidden).float().square().mean()
        loss.backward()
        return hidden.detach()

    def gradients(self, rack: Rack) -> dict[str, Tensor]:
        return {name: p.grad for name, p in rack.named_parameters() if p.grad is not None}

    def assert_same(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
        """Equal to the last bit, name by name."""
        assert a.keys() == b.keys()
        assert len(a) > 0
        for name, tensor in a.items():
            assert torch.equal(tensor, b[name]), name


@pytest.fixture
def lab() -> Lab:
    return Lab()
