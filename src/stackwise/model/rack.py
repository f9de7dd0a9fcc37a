"""Rack: embedding -> Stacks -> tail -> final norm -> head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stackwise.model.block import Block, Context, Stack
from stackwise.model.cache import BlockCache, RackCache
from stackwise.model.embedding import Embedding
from stackwise.model.init import Start, init_weights
from stackwise.model.linear import Linear
from stackwise.model.modes import autocast_to
from stackwise.model.names import PlainNames, adapter_set_of
from stackwise.model.own_io import Head, InOut
from stackwise.model.registry import POSITION_LAYERS
from stackwise.model.router import Routing
from stackwise.model.spec import RackSpec
from stackwise.model.spectral import fold_spectral_norm, follow_weights
from stackwise.model.time import Condition, TimeInput
from stackwise.model.visibility import Visibility

if TYPE_CHECKING:
    from stackwise.inference.denoise import Denoised


class Runner(Protocol):
    """How a block is run. `index` is its place in forward order, the tail last."""

    def __call__(
        self, index: int, block: Block, x_BTD: Tensor, context: Context, cache: BlockCache | None
    ) -> Tensor: ...


def run_block(index: int, block: Block, x_BTD: Tensor, context: Context, cache: BlockCache | None) -> Tensor:
    """Call the block."""
    output: Tensor = block(x_BTD, context, cache)
    return output


def recompute_block(
    index: int, block: Block, x_BTD: Tensor, context: Context, cache: BlockCache | None
) -> Tensor:
    """Call the block; where gradients flow keep only its input and compute the rest again in the backward pass."""
    if not torch.is_grad_enabled():
        return run_block(index, block, x_BTD, context, cache)
    output: Tensor = checkpoint(block, x_BTD, context, use_reentrant=False)
    return output


def count_parameters(module: nn.Module) -> int:
    """Numbers a module computes with; a matrix that is stored packed counts by its shape."""
    packed = [m for m in module.modules() if isinstance(m, Linear) and "weight" not in m._parameters]
    return sum(p.numel() for p in module.parameters()) + sum(m.in_features * m.out_features for m in packed)


class Stacks(nn.Module):
    """Stacks in forward order, reached by position; parameters are named by uid, which never changes."""

    def __init__(self, stacks: list[Stack]) -> None:
        super().__init__()
        for position, stack in enumerate(stacks):
            stack.stack_id = position
            self.add_module(stack.uid, stack)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Stack]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __getitem__(self, position: int) -> Stack:
        return list(self)[position]


class Rack(PlainNames):
    """A language model made of stacks.

    `rack(input_ids)` takes int64 ids [B, T] and gives logits [B, T, V]. Float ids are a TypeError, an id outside the
    vocabulary an IndexError, more than `max_seq_len` tokens a ValueError. A new rack is initialised from `seed`.
    """

    def __init__(self, spec: RackSpec, *, seed: int = 0, stacks: list[Stack] | None = None) -> None:
        """`stacks`: modules to take over as they are, in the order of `spec.stacks`."""
        super().__init__()
        d_model = spec.d_model
        self.spec = spec
        ends = InOut(spec)
        self.embedding = ends.embedding
        self.positions = POSITION_LAYERS.get(spec.positions)(spec.max_seq_len, d_model)
        self.time = None if spec.time is None else TimeInput(spec.time, d_model)
        fresh = stacks is None
        self.stacks = Stacks(stacks or [Stack.from_spec(s, i) for i, s in enumerate(spec.stacks)])
        for stack, described in zip(self.stacks, spec.stacks, strict=True):
            if described.own_io and stack.io is None:
                stack.io = InOut(spec)
        self.tail = nn.ModuleList(Block(block) for block in spec.tail)
        self.norm, self.head = ends.norm, ends.head
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else None
        self.runner: Runner = run_block
        self.routing: Routing | None = None
        """Who is told what routers of experts do; see `model.router.routed`."""
        self.span: tuple[int, int | None] = (0, None)
        """The blocks that run, from one to before another; all, but while a stack trains alone."""
        start = Start.of(spec, seed)
        zero_head = bool(spec.blocks) and all(block.zero_init_outputs for block in spec.blocks)
        for name, child in self.named_children():
            if name != "stacks" or fresh:
                init_weights(child, start, prefix=f"{name}.", zero_outputs=zero_head and name == "head")

    # --- structure ---------------------------------------------------------------------------------------------

    @property
    def is_causal(self) -> bool:
        """True when every block is causal."""
        return self.spec.is_causal

    @property
    def is_tied(self) -> bool:
        return self.spec.tied

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states outside autocast; single matrices may be kept in another one."""
        return next(self.norm.parameters(), self.embedding.weight).dtype

    def blocks(self) -> list[Block]:
        """All blocks in forward order, the tail last."""
        blocks = [block for stack in self.stacks for block in stack.blocks]
        return [*blocks, *self.tail]

    def units(self) -> list[tuple[str, list[nn.Module]]]:
        """The rack in forward order, for splitting it into prefix, active part and suffix."""
        lookup = [m for m in (self.embedding, self.positions, self.time) if m is not None]
        units: list[tuple[str, list[nn.Module]]] = [("embedding", lookup)]
        for stack in self.stacks:
            units += [(f"stack:{stack.uid}", [block]) for block in stack.blocks]
        units += [("tail", [block]) for block in self.tail]
        return [*units, ("norm", [self.norm]), ("head", [self.head])]

    def part_of(self, name: str) -> str:
        """The part a tensor belongs to: embedding, stack:<uid>, stack:<uid>/lora.<set>, tail, norm or head."""
        first, _, rest = name.partition(".")
        if first == "stacks":
            part, adapter_set = f"stack:{rest.partition('.')[0]}", adapter_set_of(name)
            return f"{part}/lora.{adapter_set}" if adapter_set else part
        return "embedding" if first in ("positions", "time") else first

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Parameters by part, each tensor once; the unit of checkpoints."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.state_dict().items():
            parts.setdefault(self.part_of(name), {})[name] = tensor
        return parts

    def get_parameter_count(self) -> int:
        """Parameters, each tensor once, packed matrices of frozen stacks included."""
        return count_parameters(self)

    def get_trainable_parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def io(self) -> Rack | InOut:
        """Who has the embedding, norm and head around the blocks that run: a stack that runs alone may."""
        start, stop = self.span
        if stop is None:
            return self
        ends = [0]
        for stack in self.stacks:
            ends.append(ends[-1] + len(stack.blocks))
        return self.io_of(ends.index(start))

    def io_of(self, position: int) -> Rack | InOut:
        """Who has the embedding, norm and head around the stack at a position where that runs alone."""
        return self.stacks[position].io or self

    def get_embedding_layer(self) -> Embedding:
        return self.embedding

    def get_lm_head(self) -> Head:
        return self.head

    # --- forward -----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: RackCache | None = None,
        time_step: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """input_ids [B, T], attention_mask 0/1 or bool [B, T] (with a cache: [B, seen + T]) -> logits [B, T, V].

        `time_step` float [B] in (0, 1]: the time of the noise, for a rack that is told it; elsewhere a ValueError.
        `token_type_ids` int64 [B, T] below `token_types`; null: all 0.
        """
        self._check_ids(input_ids)
        if time_step is not None and not bool(((time_step > 0) & (time_step <= 1)).all()):
            raise ValueError(f"time_step must lie in (0, 1], got {time_step.tolist()}")
        hidden = self.forward_features(
            input_ids,
            attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            cache=cache,
            time_step=time_step,
            token_type_ids=token_type_ids,
        )
        logits: Tensor = self.io.head(hidden)
        return logits

    def forward_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: RackCache | None = None,
        prefix: int = 0,
        time_step: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Everything but the head -> hidden [B, T, D].

        `prefix`: how many leading units (embedding, then blocks) run without gradient; see `curriculum.split`.
        """
        context = self.make_context(
            input_ids,
            attention_mask,
            position_ids,
            document_ids,
            cache,
            time_step=time_step,
            token_type_ids=token_type_ids,
        )
        if self.training and torch.is_grad_enabled():
            self.follow_weights()
        start, stop = self.span
        blocks = max(start, prefix - 1)
        with torch.no_grad() if prefix else nullcontext():
            x_BTD = self.embed(input_ids, context)
            x_BTD = self.run(x_BTD, context, start, blocks, cache)
        x_BTD = self.run(x_BTD, context, blocks, stop, cache)
        hidden: Tensor = self.io.norm(x_BTD)
        return hidden

    def follow_weights(self) -> None:
        """Bring the norms of normalised matrices up to date; a pass in train mode begins with it."""
        follow_weights(self.stacks)

    def fold_spectral_norm(self) -> None:
        """Make all normalised matrices plain ones that compute the same."""
        for stack in self.stacks:
            fold_spectral_norm(stack)
        self.spec = self.spec.with_stacks([replace(stack, spectral=False) for stack in self.spec.stacks])

    def run(
        self,
        x_BTD: Tensor,
        context: Context,
        start: int,
        stop: int | None = None,
        cache: RackCache | None = None,
    ) -> Tensor:
        """Run blocks start..stop-1 (null: to the last) in forward order, the tail included; [B, T, D] -> the same."""
        for index, (block, dtype) in list(enumerate(self._dtyped_blocks()))[start:stop]:
            held = None if cache is None else cache.blocks[index]
            with nullcontext() if dtype is None else autocast_to(dtype, x_BTD.device):
                x_BTD = self.runner(index, block, x_BTD, context, held)
        return x_BTD

    def _dtyped_blocks(self) -> list[tuple[Block, str | None]]:
        """All blocks in forward order, each with the compute dtype its stack insists on."""
        listed = [(block, stack.compute_dtype) for stack in self.stacks for block in stack.blocks]
        return [*listed, *((block, None) for block in self.tail)]  # type: ignore[list-item]

    def forward_from_stack(
        self, hidden: Tensor, start: int, end: int | None = None, *, time_step: Tensor | None = None
    ) -> Tensor:
        """Run stacks start..end-1 on hidden states [B, T, D]; with `end` null also the tail and the final norm."""
        n_stacks = len(self.stacks)
        if not 0 <= start <= n_stacks or (end is not None and not start <= end <= n_stacks):
            raise IndexError(f"stacks {start}..{end} of a rack of {n_stacks}")
        visibility = Visibility(hidden.shape[1], device=hidden.device)
        context = Context(visibility, None, self.spec.max_seq_len, self._told(time_step, hidden.shape[0]))
        bounds = [0]
        for stack in self.stacks:
            bounds.append(bounds[-1] + len(stack.blocks))
        if end is not None:
            return self.run(hidden, context, bounds[start], bounds[end])
        return self.norm(self.run(hidden, context, bounds[start]))

    def look_up(self, input_ids: Tensor, io: Rack | InOut | None = None) -> Tensor:
        """Token vectors without positions: ids of any shape -> [..., D], a new tensor. `io` null: `self.io`."""
        x: Tensor = (io or self.io).embedding(input_ids, self.dtype)
        return x

    def embed(self, input_ids: Tensor, context: Context, io: Rack | InOut | None = None) -> Tensor:
        """Token embedding, plus positions, time and kinds of sentences where they are added there. [B, T] -> [B, T, D]."""
        x_BTD = self.look_up(input_ids, io)
        if self.positions is not None:
            position_ids = context.position_ids
            if position_ids is None:
                past = context.visibility.past
                position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
            x_BTD = x_BTD + self.positions(position_ids)
        if context.time is not None and context.time.added is not None:
            x_BTD = x_BTD + context.time.added
        x_BTD = (io or self.io).embedding.close(x_BTD, context.token_types)
        return x_BTD if self.dropout is None else self.dropout(x_BTD)

    def make_context(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: RackCache | None = None,
        *,
        time_step: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Context:
        """What all blocks of a forward pass share; also checks lengths and shapes (ValueError)."""
        past = cache.length if cache is not None else 0
        n_new, limit = input_ids.shape[1], self.spec.max_seq_len
        if not self.spec.fits(past + n_new):
            raise ValueError(self.spec.too_long(past + n_new))
        if attention_mask is not None and attention_mask.shape != (input_ids.shape[0], past + n_new):
            raise ValueError(
                f"attention_mask must be [{input_ids.shape[0]}, {past + n_new}], got {list(attention_mask.shape)}"
            )
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids and a cache cannot be combined: generate each document by itself")
        capacity = None if cache is None else cache.capacity
        visibility = Visibility(n_new, past, attention_mask, document_ids, input_ids.device, capacity)
        told = self._told(time_step, input_ids.shape[0])
        kinds = self._kinds(token_type_ids, input_ids)
        return Context(visibility, position_ids, limit, told, kinds, self.routing)

    def _kinds(self, token_type_ids: Tensor | None, input_ids: Tensor) -> Tensor | None:
        """The kinds of sentences, checked: ValueError where there are none or of another shape, IndexError beyond."""
        if token_type_ids is None:
            return None
        count = self.spec.token_types
        if not count:
            raise ValueError(
                "this model has no token types: build it with model.token_types, or leave them out"
            )
        if token_type_ids.shape != input_ids.shape:
            raise ValueError(
                f"token_type_ids must be {list(input_ids.shape)} as input_ids are, got {list(token_type_ids.shape)}"
            )
        if token_type_ids.numel() and not 0 <= int(token_type_ids.min()) <= int(token_type_ids.max()) < count:
            raise IndexError(f"token types must be from 0 to {count - 1} (model.token_types is {count})")
        return token_type_ids

    def _told(self, time_step: Tensor | None, n_rows: int) -> Condition | None:
        """What the time of the noise comes to; ValueError where it is missing, not asked for, or no float [B]."""
        if self.time is None:
            if time_step is None:
                return None
            raise ValueError(
                "this model is not told the time of the noise, so it takes no time_step: leave it out, or build the "
                "model with training.progressive.time_interpretation=input"
            )
        if time_step is None:
            raise ValueError(
                "this model is told the time of the noise (training.progressive.time_interpretation=input), so it "
                f"needs time_step, a float tensor [{n_rows}] in (0, 1]; 1 is the heaviest noise"
            )
        if time_step.shape != (n_rows,) or not time_step.is_floating_point():
            raise ValueError(
                f"time_step must be a float tensor [{n_rows}], got {time_step.dtype} {list(time_step.shape)}"
            )
        told: Condition = self.time(time_step)
        return told

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids must be integers, got {input_ids.dtype}")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [batch, tokens], got shape {list(input_ids.shape)}")
        if input_ids.numel():
            low, high = (int(v) for v in input_ids.aminmax())
            if low < 0 or high >= self.spec.vocab_size:
                bad = low if low < 0 else high
                raise IndexError(f"token id {bad} is outside the vocabulary of {self.spec.vocab_size}")

    # --- generation --------------------------------------------------------------------------------------------

    def make_cache(self, batch: int, capacity: int, dtype: torch.dtype | None = None) -> RackCache:
        """An empty cache for `batch` rows of up to `capacity` tokens."""
        kind = dtype or self.dtype
        blocks = [block.make_cache(batch, capacity, kind, self.device) for block in self.blocks()]
        return RackCache(blocks, capacity)

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Continue token ids [B, T]; see `stackwise.inference.generate.generate` for the options."""
        from stackwise.inference.generate import generate

        return generate(self, input_ids, **options)

    def denoise(self, input_ids: Tensor, *, mask_id: int, **options: Any) -> Denoised:
        """Fill the mask tokens of ids [B, T]; see `stackwise.inference.denoise.denoise_rack` for the options."""
        from stackwise.inference.denoise import denoise_rack

        return denoise_rack(self, input_ids, mask_id=mask_id, **options)
