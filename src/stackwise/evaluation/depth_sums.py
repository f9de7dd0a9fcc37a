"""The sums behind the depth diagnostics of one route. `depth` says what each figure is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stackwise.evaluation.routes import Route, spans_of
from stackwise.evaluation.similarity import Matrix, Similarity
from stackwise.model.rack import Rack, recompute_block
from stackwise.objectives.base import Example, Objective
from stackwise.objectives.head import context_of

if TYPE_CHECKING:
    from stackwise.model.block import Context
    from stackwise.model.own_io import InOut


@dataclass(frozen=True)
class StackFigures:
    """One stack on one route; see `depth` for what each figure is. Null: it is not defined here."""

    position: int
    uid: str
    format: str
    exit: float
    removed: float | None
    gradient: float | None
    signal: float | None
    stream: float
    update: float | None


@dataclass(frozen=True)
class View:
    """A route. `entry`: the loss that the ends read from h_0, without any stack. `points` name rows of the matrices.

    `loss` is L and `weight` is W. `owner`: the position of the stack that answers, where stacks run alone.
    """

    name: str
    noise: tuple[float, float] | None
    alone: bool
    owner: int | None
    loss: float
    weight: float
    tokens: int
    entry: float
    entry_stream: float
    stacks: tuple[StackFigures, ...]
    points: tuple[str, ...]
    cka: Matrix
    cosine: Matrix
    directions: int


class Sums:
    """The sums of a route over batches, float64."""

    def __init__(self, rack: Rack, objective: Objective, route: Route) -> None:
        self.rack, self.objective, self.route = rack, objective, route
        self.spans, self.plain = spans_of(rack), rack.runner
        self.tail = self.spans[-1][1]
        n = len(route.positions)
        self.weight = self.entry = 0.0
        self.exits, self.removed = [0.0] * n, [0.0] * n
        self.signals, self.updates = [0.0] * n, [0.0] * n
        self.squares = [0.0] * (n + 1)
        answering = [route.owner] if route.alone else list(route.positions)
        self.trained: dict[int, list[nn.Parameter]] = {
            p: _parameters(rack.stacks[p].blocks) if rack.stacks[p].weight_format == "fp32" else []
            for p in answering
            if p is not None
        }
        self.gradients: dict[nn.Parameter, Tensor] = {}
        points = n + (0 if route.alone else 1)
        self.similarity = Similarity(points, rack.spec.d_model, rack.device)

    # --- what is computed of a batch -----------------------------------------------------------------------------

    def add(self, example: Example) -> None:
        """One batch."""
        context = context_of(self.rack, example)
        self.weight += float(self.objective.weight(example))
        present = torch.ones_like(example.input_ids, dtype=torch.bool)
        if example.attention_mask is not None:
            present = example.attention_mask.bool()
        (self._add_side_by_side if self.route.alone else self._add_series)(example, context, present)

    def _add_series(self, example: Example, context: Context, present: Tensor) -> None:
        rack, route = self.rack, self.route
        end = self.spans[route.positions[-1]][1]
        with torch.no_grad():
            x = self._embed(example, context, rack)
            states, loss = [x[present]], self._read(x, example, context, rack)
            self.entry += loss
            for i, position in enumerate(route.positions):
                start, stop = self.spans[position]
                # Without the last stack the head reads what it reads after the one before.
                past = (
                    loss
                    if stop == end
                    else self._read(rack.run(x, context, stop, end), example, context, rack)
                )
                self.removed[i] += past
                x = rack.run(x, context, start, stop)
                loss = self._read(x, example, context, rack)
                self.exits[i] += loss
                states.append(x[present])
                self.updates[i] += _relative(states[-1] - states[-2], states[-2])
            self._look_at(states)
            self.similarity.add(states)
        self._descend(example, context, present, rack, [self.spans[p] for p in route.positions])

    def _add_side_by_side(self, example: Example, context: Context, present: Tensor) -> None:
        rack, states, entry = self.rack, [], None
        with torch.no_grad():
            for i, position in enumerate(self.route.positions):
                io = rack.io_of(position)
                before = self._embed(example, context, io)
                x = rack.run(before, context, *self.spans[position])
                self.exits[i] += self._read(x, example, context, io)
                states.append(x[present])
                self.updates[i] += _relative(states[-1] - before[present], before[present])
                if position == self.route.owner:
                    entry = before[present]
                    past = self._read(before, example, context, io)
                    self.removed[i] += past
                    self.entry += past
            assert entry is not None
            self._look_at([entry, *states])
            self.similarity.add(states)
        owner = self.route.owner
        assert owner is not None
        self._descend(example, context, present, rack.io_of(owner), [self.spans[owner]])

    def _embed(self, example: Example, context: Context, io: Rack | InOut) -> Tensor:
        return self.objective.embedded(self.rack.embed(example.input_ids, context, io), example)

    def _loss(self, x_BTD: Tensor, example: Example, context: Context, io: Rack | InOut) -> Tensor:
        if self.route.tail:
            x_BTD = self.rack.run(x_BTD, context, self.tail)
        return self.objective.loss(io.norm(x_BTD), io.head, example)[0]

    def _read(self, x_BTD: Tensor, example: Example, context: Context, io: Rack | InOut) -> float:
        """What the ends lose on a state, summed over the batch."""
        return float(self._loss(x_BTD, example, context, io))

    def _look_at(self, states: Sequence[Tensor]) -> None:
        for i, state in enumerate(states):
            self.squares[i] += float(state.to(self.similarity.device).double().square().sum())

    def _descend(
        self,
        example: Example,
        context: Context,
        present: Tensor,
        io: Rack | InOut,
        spans: Sequence[tuple[int, int]],
    ) -> None:
        """Gradients with respect to the states after the spans, and to the parameters that answer."""
        wanted = [parameter for listed in self.trained.values() for parameter in listed]
        for parameter in wanted:
            parameter.requires_grad_(True)
        self.rack.runner = recompute_block
        try:
            with torch.enable_grad():
                x = self._embed(example, context, io).detach().requires_grad_()
                outs = []
                for start, stop in spans:
                    x = self.rack.run(x, context, start, stop)
                    outs.append(x)
                loss = self._loss(x, example, context, io)
            found = torch.autograd.grad(loss, [*outs, *wanted], allow_unused=True)
        finally:
            self.rack.runner = self.plain
            for parameter in wanted:
                parameter.requires_grad_(False)
        device = self.similarity.device
        first = 0 if not self.route.alone else self.route.positions.index(self.route.owner or 0)
        for i, gradient in enumerate(found[: len(outs)], start=first):
            if gradient is not None:
                self.signals[i] += float(gradient[present].to(device).double().square().sum())
        for parameter, gradient in zip(wanted, found[len(outs) :], strict=True):
            if gradient is not None:
                held = self.gradients.get(parameter)
                exact = gradient.to(device).double()
                self.gradients[parameter] = exact if held is None else held.add_(exact)

    # --- the figures ---------------------------------------------------------------------------------------------

    def view(self) -> View:
        """The figures over everything that was added."""
        route, tokens = self.route, self.similarity.tokens
        if not self.weight or not tokens:
            raise ValueError("there is nothing to evaluate: no window has a token with a target")
        width = self.rack.spec.d_model
        owner = route.positions.index(route.owner or 0) if route.alone else len(route.positions) - 1
        loss = self.exits[owner] / self.weight
        stacks = tuple(self._figures(i, loss) for i in range(len(route.positions)))
        names = tuple(stack.uid for stack in stacks)
        return View(
            name=route.name,
            noise=route.noise,
            alone=route.alone,
            owner=route.owner if route.alone else None,
            loss=loss,
            weight=self.weight,
            tokens=tokens,
            entry=self.entry / self.weight,
            entry_stream=math.sqrt(self.squares[0] / tokens / width),
            stacks=stacks,
            points=names if route.alone else ("embedding", *names),
            cka=self.similarity.cka(),
            cosine=self.similarity.cosine(),
            directions=self.similarity.directions,
        )

    def _figures(self, i: int, loss: float) -> StackFigures:
        position = self.route.positions[i]
        stack, tokens = self.rack.stacks[position], self.similarity.tokens
        answers = not self.route.alone or position == self.route.owner
        parameters = self.trained.get(position, [])
        squares = [self.gradients[p].square().sum() for p in parameters if p in self.gradients]
        gradient = math.sqrt(float(sum(squares))) / self.weight if parameters else None
        return StackFigures(
            position=position,
            uid=stack.uid,
            format=stack.weight_format,
            exit=self.exits[i] / self.weight,
            removed=self.removed[i] / self.weight - loss if answers else None,
            gradient=gradient,
            signal=math.sqrt(self.signals[i] / tokens) if answers else None,
            stream=math.sqrt(self.squares[i + 1] / tokens / self.rack.spec.d_model),
            update=self.updates[i] / tokens if math.isfinite(self.updates[i]) else None,
        )


def _parameters(blocks: nn.Module) -> list[nn.Parameter]:
    return [p for p in blocks.parameters() if p.is_floating_point()]


def _relative(change: Tensor, before: Tensor) -> float:
    """Sum over tokens [n, D] of |change| / |before|; a change from nothing is infinite."""
    sizes = torch.stack((change.float().norm(dim=-1), before.float().norm(dim=-1))).cpu().double()
    ratios = torch.where(sizes[0] == 0, 0.0, sizes[0] / sizes[1])
    return float(ratios.sum())
