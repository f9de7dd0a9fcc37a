"""The one place where weights get their first values.

| tensor                                   | start                                             |
|------------------------------------------|---------------------------------------------------|
| linear weights                           | N(0, 1 / fan_in)                                  |
| output projections (attn.o, ffn.down)    | the same / sqrt(2 * planned blocks); or 0 *       |
| frozen up projections                    | N(0, 1 / d_model)                                 |
| embedding, learned positions, token types| N(0, 1 / width): tied logits start near N(0, 1)   |
| embedding with `embedding_norm`          | N(0, 1): steps turn its rows without leaps        |
| head of its own                          | N(0, 0.02^2 * 768 / d_model), near-uniform; or 0 *|
| short convolutions                       | the identity: first tap 1, others 0               |
| table of times                           | N(0, 1)                                           |
| what of the time is added to embeddings  | as large as they are: N(0, 1 / (fan_in * d_model))|
| scales and shifts of the time            | 0: the model without it                           |
| norm weights; biases                     | 1, or 0 where the norm adds 1; 0                  |
| random features of kernels (buffers)     | see `attention.kernel`; factors on scores 1       |

* with `zero_init_outputs`.

Every tensor draws from a generator keyed by (seed, its name), so a rack starts from the same numbers whether it is
built at once or stack by stack.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stackwise.model.attention.kernel import Kernel
from stackwise.model.norms import OffsetRMSNorm
from stackwise.model.spec import RackSpec
from stackwise.model.spectral import SpectralLinear


def keyed_generator(seed: int, *key: object) -> torch.Generator:
    """A CPU generator that depends on `seed` and `key` only."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Start(NamedTuple):
    """What the first values depend on besides a tensor's name and shape."""

    seed: int
    planned_blocks: int
    embedding_norm: bool = False

    @classmethod
    def of(cls, spec: RackSpec, seed: int) -> Start:
        return cls(seed, spec.planned_blocks or len(spec.blocks), spec.embedding_norm is True)


@torch.no_grad()
def init_tensor(name: str, tensor: Tensor, start: Start, *, zero_output: bool) -> None:
    """Give one named parameter of a rack its first values, in place. `zero_output`: an output starts at zero."""
    leaf, owner = name.rsplit(".", 1)[-1], name.rsplit(".", 2)[-2] if name.count(".") else ""
    output = owner in ("o", "down", "head")
    if leaf == "bias" or (output and zero_output) or owner == "modulation":
        tensor.zero_()
    elif tensor.dim() < 2:
        tensor.fill_(1.0)
    elif owner.endswith("_conv"):
        tensor.zero_()
        tensor[0] = 1.0
    else:
        std = tensor.shape[-1] ** -0.5
        if leaf == "table" or (owner == "embedding" and start.embedding_norm):
            std = 1.0
        elif owner == "added" and not start.embedding_norm:
            std /= math.sqrt(tensor.shape[0])
        elif owner == "head":
            std = 0.02 * math.sqrt(768 / tensor.shape[-1])
        elif output:
            std /= math.sqrt(2 * max(1, start.planned_blocks))
        values = torch.empty(tensor.shape, dtype=torch.float32)
        values.normal_(0.0, std, generator=keyed_generator(start.seed, name))
        tensor.copy_(values)


def init_weights(module: nn.Module, start: Start, *, prefix: str = "", zero_outputs: bool = False) -> None:
    """Initialise every parameter below `module`; `prefix` is the module's own name inside its rack."""
    zeroed = [
        f"{path}." if path else ""
        for path, child in module.named_modules()
        if getattr(getattr(child, "spec", None), "zero_init_outputs", False)
    ]
    from_one = {
        f"{path}.weight".removeprefix(".")
        for path, child in module.named_modules()
        if isinstance(child, OffsetRMSNorm)
    }
    for name, parameter in module.named_parameters():
        if name in from_one:
            nn.init.zeros_(parameter)
            continue
        if parameter.is_meta:
            continue  # a rack that is only counted holds no numbers
        zero = zero_outputs or any(name.startswith(path) for path in zeroed)
        init_tensor(prefix + name, parameter, start, zero_output=zero)
    for path, child in module.named_modules():
        if isinstance(child, Kernel):
            child.draw(keyed_generator(start.seed, f"{prefix}{path}.features"))
    start_spectral_norm(module, start.seed, prefix)


def start_spectral_norm(module: nn.Module, seed: int, prefix: str = "") -> None:
    """Let the normalised layers below `module` find the norms of their matrices; `prefix` as in `init_weights`."""
    for path, layer in module.named_modules():
        if isinstance(layer, SpectralLinear) and not layer.weight.is_meta:
            generator = keyed_generator(seed, f"{prefix}{path}.space")
            layer.restart(torch.randn(layer.space.shape, generator=generator))
