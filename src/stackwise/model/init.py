"""The one place where weights get their first values.

| tensor                                   | start                                             |
|------------------------------------------|---------------------------------------------------|
| linear weights                           | N(0, 1 / fan_in)                                  |
| output projections (attn.o, ffn.down)    | the same / sqrt(2 * planned blocks); or 0         |
| frozen up projections                    | N(0, 1 / d_model)                                 |
| embedding, learned positions             | N(0, 1 / d_model): tied logits start near N(0, 1) |
| head of its own                          | N(0, 0.02^2 * 768 / d_model), near-uniform start  |
| norm weights; biases                     | 1; 0                                              |

Every tensor draws from a generator keyed by (seed, its name), so a rack starts from the same numbers whether it is
built at once or stack by stack.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn


def keyed_generator(seed: int, *key: object) -> torch.Generator:
    """A CPU generator that depends on `seed` and `key` only."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def init_tensor(name: str, tensor: Tensor, *, seed: int, planned_blocks: int, zero_outputs: bool) -> None:
    """Give one named parameter of a rack its first values, in place."""
    leaf, owner = name.rsplit(".", 1)[-1], name.rsplit(".", 2)[-2] if name.count(".") else ""
    if leaf == "bias":
        tensor.zero_()
    elif tensor.dim() < 2:
        tensor.fill_(1.0)
    elif owner in ("o", "down") and zero_outputs:
        tensor.zero_()
    else:
        if name in ("embedding.weight", "positions.weight"):
            std = tensor.shape[-1] ** -0.5
        elif name == "head.weight":
            std = 0.02 * math.sqrt(768 / tensor.shape[-1])
        else:
            std = tensor.shape[-1] ** -0.5
            if owner in ("o", "down"):
                std /= math.sqrt(2 * max(1, planned_blocks))
        values = torch.empty(tensor.shape, dtype=torch.float32)
        values.normal_(0.0, std, generator=keyed_generator(seed, name))
        tensor.copy_(values)


def init_weights(module: nn.Module, *, seed: int, planned_blocks: int, prefix: str = "") -> None:
    """Initialise every parameter below `module`; `prefix` is the module's own name inside its rack."""
    zeroed = {
        f"{path}." if path else ""
        for path, child in module.named_modules()
        if getattr(getattr(child, "spec", None), "zero_init_outputs", False)
    }
    for name, parameter in module.named_parameters():
        init_tensor(
            prefix + name,
            parameter,
            seed=seed,
            planned_blocks=planned_blocks,
            zero_outputs=any(name.startswith(path) for path in zeroed),
        )
