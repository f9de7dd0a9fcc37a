"""What a rack trained on hidden tokens says about them, at every share of hidden ones.

Where stacks own intervals of noise (depth as time), each row is run by the stacks that are responsible for its share.
Shape letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from stackwise.config.notes import tunes_jointly
from stackwise.config.objective_rules import time_of
from stackwise.kernels.linear_cross_entropy import chunk_rows
from stackwise.objectives.base import IGNORE, Example
from stackwise.objectives.depth import stack_noise
from stackwise.objectives.head import context_of
from stackwise.objectives.intervals import Intervals
from stackwise.objectives.schedules import NoiseSchedule

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig
    from stackwise.model.own_io import InOut
    from stackwise.model.rack import Rack

PATHS = ("rack", "alone", "suffix", "prefix")


class Denoiser:
    """`path`: which stacks run for the interval of a stack: rack, all; alone, the stack by itself; suffix, it and all
    next to the head; prefix, it and all next to the embedding. `intervals` null: one, and the whole rack.

    `shifted`: the hidden state before a token predicts it. `banned`: ids that are never predicted, besides `mask_id`.
    `schedule`: for a rack that is told the time. `points`: each stack learned a single share of hidden tokens, and
    answers for the interval around it. `forwards` counts passes of rows through the rack.
    """

    def __init__(
        self,
        rack: Rack,
        mask_id: int,
        *,
        intervals: Intervals | None = None,
        path: str = "rack",
        shifted: bool = False,
        banned: Sequence[int] = (),
        schedule: NoiseSchedule | None = None,
        points: bool = False,
    ) -> None:
        if path not in PATHS:
            raise ValueError(f"unknown path {path!r}; allowed: {', '.join(PATHS)}")
        if intervals is not None and intervals.count != len(rack.stacks):
            raise ValueError(f"{intervals.count} intervals of noise for a rack of {len(rack.stacks)} stacks")
        if intervals is None and path != "rack":
            raise ValueError(f"the path {path} needs intervals of noise")
        self.rack, self.mask_id, self.intervals, self.path = rack, mask_id, intervals, path
        self.shifted, self.banned, self.schedule = shifted, (mask_id, *banned), schedule
        self.points, self.forwards = points, 0

    def logits(
        self,
        input_ids: Tensor,
        positions: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Tensor:
        """float32 [n, V] at `positions` int64 [n], counted through the rows of input_ids [B, T]; -inf for banned ids.

        `shares` [B] in (0, 1]: the share of hidden tokens of each row, which routes it; null: as it is. A position
        without one before it is a ValueError where the rack is shifted.
        """
        shares = self.shares_of(input_ids, attention_mask) if shares is None else shares
        hidden = self.hidden(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            shares=shares,
        )
        return self.read(hidden, positions, shares)

    def read(self, hidden: Tensor, positions: Tensor, shares: Tensor) -> Tensor:
        """What the head makes of hidden states [B, T, D] of rows with these shares: `logits` at `positions`."""
        if self.shifted:
            if bool((positions % hidden.shape[1] == 0).any()):
                raise ValueError(
                    "the first token of a row cannot be predicted: the model looks at the one before it"
                )
            positions = positions - 1
        return self._head(hidden, positions, self._owners(shares))

    def _head(self, hidden: Tensor, positions: Tensor, owners: Tensor) -> Tensor:
        """float32 [n, V] from the hidden states at `positions`, by the heads of the owners [B] of the rows."""
        states, heads = hidden.flatten(0, 1)[positions], self._ios(owners)
        if len(heads) == 1:
            logits = next(iter(heads)).head(states).float()
        else:
            of_position = owners.to(positions.device)[positions // hidden.shape[1]]
            logits = states.new_empty(len(states), self.rack.spec.vocab_size, dtype=torch.float32)
            for io, distances in heads.items():
                rows = torch.isin(of_position, torch.tensor(distances, device=of_position.device))
                logits[rows] = io.head(states[rows]).float()
        logits[:, list(self.banned)] = -torch.inf
        return logits

    def hidden(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Tensor:
        """What the head reads, [B, T, D]."""
        if shares is None:
            shares = self.shares_of(input_ids, attention_mask)
        time = None if self.schedule is None else self.schedule.inverse(1 - shares.double()).float()
        example = Example(input_ids, input_ids, attention_mask, position_ids, document_ids, time=time)
        self.forwards += 1
        owners = self._owners(shares)
        listed = owners.unique().tolist() or [0]  # no rows are anybody's
        if len(listed) == 1:
            return self._run(example, listed[0])
        rows = [(owners == owner).nonzero().squeeze(1) for owner in listed]
        parts = [self._run(example.rows(row), owner) for row, owner in zip(rows, listed, strict=True)]
        joined = torch.cat(parts)
        return joined[torch.cat(rows).argsort().to(joined.device)]

    def shares_of(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Share of hidden tokens of each row, float64 [B]; at least one token counts as hidden."""
        hidden = (input_ids == self.mask_id).sum(1)
        present = torch.full_like(hidden, input_ids.shape[1])
        if attention_mask is not None:
            present = attention_mask.bool().sum(1)
        return hidden.clamp_min(1).double() / present.clamp_min(1)

    def spans(self, distance: int) -> list[tuple[int, int | None]]:
        """Ranges of blocks, in forward order, that run for the interval of the stack at this distance from the head."""
        ends = [0]
        for stack in self.rack.stacks:
            ends.append(ends[-1] + len(stack.blocks))
        position = len(self.rack.stacks) - 1 - distance
        first = 0 if self.path in ("rack", "prefix") else ends[position]
        last = ends[-1] if self.path in ("rack", "suffix") else ends[position + 1]
        tail: list[tuple[int, int | None]] = [] if self.path == "alone" else [(ends[-1], None)]
        return [(first, last), *tail]

    def _owners(self, shares: Tensor) -> Tensor:
        """int64 [B], in host memory: distance of the stack that owns the share of each row; 0 where none does."""
        if self.intervals is None:
            return torch.zeros(len(shares), dtype=torch.int64)
        return torch.tensor([self.intervals.owner(float(share)) for share in shares])

    def _io(self, distance: int) -> Rack | InOut:
        """Who has the embedding, norm and head for the interval at this distance."""
        if self.path != "alone":
            return self.rack
        return self.rack.io_of(len(self.rack.stacks) - 1 - distance)

    def _ios(self, owners: Tensor) -> dict[Rack | InOut, list[int]]:
        """All that these owners have, and whose they are."""
        listed: dict[Rack | InOut, list[int]] = {}
        for distance in owners.unique().tolist():
            listed.setdefault(self._io(distance), []).append(distance)
        return listed

    def _run(self, example: Example, distance: int) -> Tensor:
        """What the head reads of rows that belong to the interval at this distance."""
        context, io = context_of(self.rack, example), self._io(distance)
        x_BTD = self.rack.embed(example.input_ids, context, io)
        for start, stop in [(0, None)] if self.intervals is None else self.spans(distance):
            x_BTD = self.rack.run(x_BTD, context, start, stop)
        hidden: Tensor = io.norm(x_BTD)
        return hidden

    def judge(self, example: Example, shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(-log p of every scored label, float32 [n]; whether the label is the likeliest token, bool [n]).

        In the order of `scored`; 0 and false where a position has no label. `shares` as of `logits`.
        """
        assert example.scored is not None
        if shares is None:
            shares = self.shares_of(example.input_ids, example.attention_mask)
        owners = self._owners(shares)
        hidden = self.hidden(
            example.input_ids,
            attention_mask=example.attention_mask,
            position_ids=example.position_ids,
            document_ids=example.document_ids,
            shares=shares,
        )
        labels = example.labels.flatten()[example.scored]
        nll, right = [], []
        size = chunk_rows(self.rack.spec.vocab_size, device=hidden.device.type)
        for positions, wanted in zip(example.scored.split(size), labels.split(size), strict=True):
            logits = self._head(
                hidden, positions, owners
            )  # labels are aligned with the positions that predict them
            nll.append(F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="none"))
            right.append(logits.argmax(-1) == wanted)
        return torch.cat(nll), torch.cat(right)


def denoiser_of(rack: Rack, config: StackWiseConfig, special_ids: Sequence[int] = ()) -> Denoiser:
    """The denoiser of a rack that was trained by a resolved configuration for mlm or diffusion.

    Where time is depth, the stacks that trained on a share of noise run for it. A joint phase makes the stacks one
    denoiser: the whole rack runs at every share.
    """
    keys, progressive = config.objective, config.training.progressive
    assert keys.mask_token_id is not None, "resolve() fills it"
    time = time_of(config)
    schedule = NoiseSchedule(keys.noise_schedule, keys.noise_power, keys.noise_table)
    shares_out = time == "depth" and not tunes_jointly(config)
    noise = stack_noise(config, len(rack.stacks)) if shares_out else None
    path = {"independent": "alone", "prepend": "suffix", "append": "prefix"}.get(
        progressive.building_mode, "rack"
    )
    return Denoiser(
        rack,
        keys.mask_token_id,
        intervals=None if noise is None else noise.routes,
        path="rack" if noise is None else path,
        points=noise is not None and noise.points is not None,
        shifted=keys.target_shift,
        banned=[
            i
            for i in special_ids
            if i != keys.mask_token_id and progressive.training_objective == "diffusion"
        ],
        schedule=schedule if time == "input" else None,
    )
