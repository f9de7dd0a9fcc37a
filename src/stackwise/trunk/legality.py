"""Whether the outputs of a frozen prefix may be kept: the one place that decides, with the reason.

They may where they are a function of the sample and its draw alone:

1. the prefix holds no tensor that trains: no adapter, no matrix tied to a training head;
2. it runs in eval mode, so that dropout is off;
3. nothing behind the boundary reads states from before it;
4. the corruption repeats: always for clm, for masked objectives with a fixed number of draws (`mask_draws`);
5. the range of noise is the one of the writing stage.

Rows must have one length, and the loader must name each by an id of its own that never changes. Padding, documents
and positions may differ between rows: they are part of the sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from stackwise.model.names import adapter_set_of

if TYPE_CHECKING:
    from stackwise.model.rack import Rack


@dataclass(frozen=True)
class Corruption:
    """What an objective does to its inputs. `draws`: different corruptions of a sample that come again; null: each is new.

    `noise`: share of corrupted tokens, lowest and highest; null where nothing is corrupted or the objective decides.
    `on_embeddings`: noise is added to embeddings.
    """

    objective: str = "clm"
    draws: int | None = 1
    noise: tuple[float, float] | None = None
    on_embeddings: bool = False


CLM = Corruption()


def cache_refusal(
    rack: Rack,
    prefix: int,
    corruption: Corruption = CLM,
    *,
    written_under: Corruption | None = None,
    has_sample_ids: bool = True,
) -> str | None:
    """Why the outputs of the first `prefix` units (the embedding, then blocks) may not be kept; null where they may.

    The rack is as the stage trains it: `requires_grad` and train mode are set. `written_under`: the corruption of the
    stage whose outputs this one goes on from.
    """
    if not has_sample_ids:
        return "the batches carry no sample_ids, so a sample cannot be known again"
    if corruption.draws is None:
        return (
            f"the objective {corruption.objective} corrupts a sample anew at every visit; fix the number of its "
            "corruptions with mask_draws"
        )
    if corruption.on_embeddings:
        return "noise is added to the embeddings, which are part of the prefix"
    if written_under is not None and written_under.noise != corruption.noise:
        return (
            f"the stage trains on noise {_range(corruption.noise)}, the stage before it on "
            f"{_range(written_under.noise)}"
        )
    if prefix < 2:
        return _no_prefix(rack)
    units = rack.units()[:prefix]
    for unit, modules in units:
        for name, parameter in _parameters(modules):
            if parameter.requires_grad:
                return f"the prefix holds a tensor that trains: {name} of {unit}"
    if any(_drops(module) for _, modules in units for module in modules) or _drops(rack.dropout):
        return "the prefix is not in eval mode, so its dropout is on"
    for index, block in enumerate(rack.blocks()[prefix - 1 :], start=prefix - 1):
        if any(getattr(module, "reads_earlier_states", False) for module in block.modules()):
            return f"block {index}, behind the boundary, reads states from before it"
    return None


def _no_prefix(rack: Rack) -> str:
    """Why no block lies before the first trained tensor."""
    if any(p.requires_grad for p in rack.embedding.parameters()):
        if rack.is_tied:
            return "the embedding trains, to which the head is tied, so no block before it is frozen"
        return "the embedding trains, so there is no frozen prefix"
    units = rack.units()
    if len(units) < 4:
        return "there is no block"
    name, modules = units[1]
    trained = [n for n, p in _parameters(modules) if p.requires_grad]
    if not trained:
        return "one stack runs alone, so no frozen block lies before it"
    if all(adapter_set_of(n) for n in trained):
        return f"adapters train in {name}, the first block, so no block before them is frozen"
    return f"{name} trains, which is next to the embedding, so no block before it is frozen"


def _parameters(modules: Iterable[nn.Module]) -> Iterable[tuple[str, nn.Parameter]]:
    for module in modules:
        yield from module.named_parameters()


def _drops(module: nn.Module | None) -> bool:
    """Whether anything in the module is in train mode and drops numbers at random."""
    if module is None:
        return False
    for part in module.modules():
        rate = part.p if isinstance(part, nn.Dropout) else getattr(part, "dropout", 0.0)
        if part.training and isinstance(rate, float) and rate > 0:
            return True
    return False


def _range(noise: tuple[float, float] | None) -> str:
    return "none" if noise is None else f"{noise[0]:g} to {noise[1]:g}"
