"""Depth diagnostics: what each stack of a rack is good for, on held-out rows.

Letters: h_0 is the embedding's output, h_i the state after the i-th stack of a route, [D] at every token; S the sum of the
objective's losses over all rows, W what it is divided by, L = S / W the held-out loss. The ends are tail, final norm and
head. The tail trains together with the head at every stage, so it belongs to what reads a state.

    removed    L with the state going past the stack, minus L. Below 0: the model is better without it.
    exit       L read by the ends from h_i (logit lens, nostalgebraist 2020). After the last stack it is L itself.
    gradient   |dL/dw_i| over all parameters of the stack, in nats per unit of a weight. Null where the matrices are packed.
    signal     sqrt(mean over tokens of |dS/dh_i|^2), in nats per unit of the state: how much still depends on it.
    stream     sqrt(mean over tokens and channels of h_i^2)
    update     mean over tokens of |h_i - h_(i-1)| / |h_(i-1)|
    cka, cosine  between h_0 ... h_N, see `similarity`

Norms are Euclidean. Tokens are all that are not padding, scored or not. Everything is computed in float32 (stacks that insist on
another dtype in that one) and summed in float64. Where stacks run alone, each from an embedding of its own, h_(i-1) is that
embedding, `exit` is the loss with this stack in the owner's place, and only the owner has removed, gradient and signal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from stackwise.data.corpus import TokenSplit
from stackwise.data.loader import EvalLoader
from stackwise.evaluation.depth_sums import Sums, View
from stackwise.evaluation.routes import Route, whole_route
from stackwise.evaluation.windows import Progress, check_windows, unseen
from stackwise.model.modes import eval_mode
from stackwise.model.rack import Rack
from stackwise.objectives.base import Objective
from stackwise.objectives.masked import Masked
from stackwise.training.device import computing_in


@dataclass(frozen=True)
class Depth:
    """All routes of a rack over `windows` windows of `seq_len` tokens, each corrupted `passes` times."""

    views: tuple[View, ...]
    windows: int
    seq_len: int
    passes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def depth(
    rack: Rack,
    objective: Objective,
    split: TokenSplit,
    *,
    seq_len: int,
    routes: Sequence[Route] | None = None,
    batch_size: int = 8,
    windows: int | None = None,
    passes: int = 1,
    packing: bool = True,
    doc_mask: bool = True,
    pad_id: int | None = None,
    progress: Progress = unseen,
) -> Depth:
    """Measure a rack over windows of a split, in order, without overlap; `windows`: as many, spread evenly, null all.

    `routes` null: all stacks for all rows (`routes.routes_of` has those of a configuration). The corruption of masked
    objectives is one that training never meets, another in each of `passes`. In float32 the figures do not depend on
    `batch_size` (up to 1e-6), and the same call gives the same. Of N stacks a route costs about N / 2 + 5 forward passes.
    Memory: a batch's states after every stack and one recomputed block, the gradients of the stacks in float64, and the sums of
    `Similarity`. `progress` hears of every batch. The rack is left as it was.

    ValueErrors: nothing to score; a causal objective for a rack that is not; windows longer
    than the rack's `max_seq_len`, token ids it does not know, passes below 1.
    """
    if objective.causal and not rack.is_causal:
        raise ValueError(
            f"the objective {objective.name} needs a causal rack, and this one attends in both directions"
        )
    if passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes}")
    check_windows(rack, split, seq_len)
    rows = EvalLoader(
        split,
        seq_len=seq_len,
        batch_size=batch_size,
        n_rows=windows,
        packing=packing,
        doc_mask=doc_mask,
        pad_id=pad_id,
    )
    objective = objective.for_evaluation()
    if isinstance(objective, Masked) and objective.one_time:
        objective = replace(objective, one_time=False)  # else the time would depend on who shares a batch
    routes = [whole_route(rack)] if routes is None else routes
    total, done, views = len(routes) * passes * len(rows), 0, []
    with eval_mode(rack), computing_in(torch.float32, rack.device), _own_gradients(rack):
        for route in routes:
            sums = Sums(rack, objective, route)
            for number in range(passes):
                place = 0
                for batch in rows:
                    places = torch.arange(place, place + len(batch["input_ids"]))
                    place += len(places)
                    keys = {"draws": torch.full_like(places, number), "places": places}
                    sums.add(objective.corrupt({**batch, **keys}, route.noise).to(rack.device))
                    done += 1
                    progress(done, total)
            views.append(sums.view())
    return Depth(tuple(views), rows.rows, seq_len, passes)


@contextmanager
def _own_gradients(rack: Rack) -> Iterator[None]:
    """Inside, what needs a gradient and how blocks run are ours to set; afterwards all is as it was."""
    needed, runner = {p: p.requires_grad for p in rack.parameters()}, rack.runner
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        rack.runner = runner
        for parameter, before in needed.items():
            parameter.requires_grad_(before)
