"""Block: one transformer layer. Stack: Blocks under one identity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stackwise.model.block_spec import BlockSpec
from stackwise.model.cache import BlockCache
from stackwise.model.experts import Experts
from stackwise.model.names import PlainNames
from stackwise.model.own_io import InOut
from stackwise.model.registry import ATTENTIONS, FEED_FORWARDS, NORM_LAYERS
from stackwise.model.router import Routing
from stackwise.model.short_conv import ShortConv
from stackwise.model.spec import AdapterSpec, StackSpec
from stackwise.model.spectral import add_spectral_norm
from stackwise.model.time import Condition
from stackwise.model.visibility import Visibility


class Context(NamedTuple):
    """What every block of a forward pass shares."""

    visibility: Visibility
    position_ids: Tensor | None
    max_seq_len: int
    time: Condition | None = None
    token_types: Tensor | None = None
    """int64 [B, T]: kind of sentence of every token."""
    routing: Routing | None = None
    """What routers of experts tell a training loop; null: nobody asks."""


class Block(PlainNames):
    """Attention and feed-forward around a residual stream.

    With `short_conv`, a short convolution runs over the input of both.

    pre:  x + g Attn(N x), then x + g FFN(N x).   post: N(x + g Attn x), then N(x + g FFN x).   g = residual_gain.
    both: x + g N'(Attn(N x)), then x + g N'(FFN(N x)), with four norms.
    parallel: x + g Attn(N x) + g FFN(N x), with one norm (Wang and Komatsuzaki 2021, GPT-J).

    Where the rack is told the time that way, a scale and a shift follow each N (see `model.time`).
    Built from the keyword arguments of `BlockSpec`, or from a `spec`. Bad values are ValueErrors, unknown
    arguments TypeErrors with the nearest spelling.
    """

    parked: object | None = None
    """How its tensors are kept off the compute device (`trunk.parking`); null: they are on it."""

    def __init__(self, spec: BlockSpec | None = None, **options: Any) -> None:
        super().__init__()
        if spec is not None and options:
            raise TypeError("give either a BlockSpec or keyword arguments, not both")
        spec = spec or BlockSpec.create(options)
        make_norm = NORM_LAYERS.get(spec.norm)
        self.spec = spec
        plain = spec.attn_input_norm
        self.attn_norm = make_norm(spec.d_model, spec.norm_eps, spec.bias) if plain else nn.Identity()
        self.attn = ATTENTIONS.get(spec.attention_type)(spec)
        self.ffn_norm = None if spec.parallel else make_norm(spec.d_model, spec.norm_eps, spec.bias)
        make_ffn = Experts if spec.experts is not None else FEED_FORWARDS.get(spec.ffn_type)
        self.ffn: Any = make_ffn(spec)
        self.attn_conv = (
            ShortConv(spec.d_model, spec.short_conv, "attn", not spec.causal) if spec.short_conv else None
        )
        self.ffn_conv = (
            ShortConv(spec.d_model, spec.short_conv, "ffn", not spec.causal) if spec.short_conv else None
        )
        both = spec.norm_placement == "both"
        self.attn_out_norm = make_norm(spec.d_model, spec.norm_eps, spec.bias) if both else None
        self.ffn_out_norm = make_norm(spec.d_model, spec.norm_eps, spec.bias) if both else None
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else None
        self.gain, self.post = spec.residual_gain, spec.norm_placement == "post"
        self.requires_grad_(True)

    def forward(self, x_BTD: Tensor, context: Context, cache: BlockCache | None = None) -> Tensor:
        attn_norm, ffn_norm = self._norms(context.time)
        if self.post:
            x_BTD = attn_norm(self._add(x_BTD, self._attend(x_BTD, context, cache)))
            return ffn_norm(self._add(x_BTD, self._feed(x_BTD, context, cache)))
        if self.ffn_norm is None:
            attn_BTD = self._attend(attn_norm(x_BTD), context, cache)
            return self._add(self._add(x_BTD, attn_BTD), self._feed(ffn_norm(x_BTD), context, cache))
        x_BTD = self._add(x_BTD, self._attend(attn_norm(x_BTD), context, cache), self.attn_out_norm)
        return self._add(x_BTD, self._feed(ffn_norm(x_BTD), context, cache), self.ffn_out_norm)

    def _norms(self, time: Condition | None) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The norms of both sub-layers, with the scale and shift of the time behind them where it is told so."""
        first, second = self.attn_norm, self.attn_norm if self.ffn_norm is None else self.ffn_norm
        if time is None or time.norms is None:
            return first, second
        scale, shift, ffn_scale, ffn_shift = time.norms
        return (
            lambda x_BTD: first(x_BTD) * (1 + scale) + shift,
            lambda x_BTD: second(x_BTD) * (1 + ffn_scale) + ffn_shift,
        )

    def _attend(self, x_BTD: Tensor, context: Context, cache: BlockCache | None) -> Tensor:
        if self.attn_conv is not None:
            x_BTD = self.attn_conv(x_BTD, context.visibility, cache)
        return self.attn(x_BTD, context, cache)

    def _feed(self, x_BTD: Tensor, context: Context, cache: BlockCache | None) -> Tensor:
        if self.ffn_conv is not None:
            x_BTD = self.ffn_conv(x_BTD, context.visibility, cache)
        return self.ffn(x_BTD, context) if self.spec.experts is not None else self.ffn(x_BTD)

    def _add(self, x_BTD: Tensor, branch_BTD: Tensor, norm: nn.Module | None = None) -> Tensor:
        if norm is not None:
            branch_BTD = norm(branch_BTD)
        if self.dropout is not None:
            branch_BTD = self.dropout(branch_BTD)
        return x_BTD + (branch_BTD if self.gain == 1.0 else self.gain * branch_BTD)

    def make_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> BlockCache:
        """An empty cache for `batch` rows of up to `capacity` tokens."""
        cache: BlockCache = self.attn.make_cache(batch, capacity, dtype, device)
        return cache

    def output_projections(self) -> list[nn.Module]:
        """The layers that write into the residual stream; zeroed, the block is the identity (pre-norm)."""
        return [self.attn.o, *(ffn.down for ffn in self.feed_forwards())]

    def feed_forwards(self) -> list[Any]:
        """The feed-forward, or all experts, shared ones last."""
        if not isinstance(self.ffn, Experts):
            return [self.ffn]
        return [*self.ffn.experts, *([] if self.ffn.shared is None else [self.ffn.shared])]

    def requires_grad_(self, requires_grad: bool = True) -> Block:
        """Thaw or freeze; a frozen up projection stays frozen."""
        super().requires_grad_(requires_grad)
        if self.spec.freeze_up_proj:
            for ffn in self.feed_forwards():
                ffn.up.requires_grad_(False)
        return self


class Stack(PlainNames):
    """Blocks in forward order. `uid` and `build_index` never change; `stack_id` is the position in its rack.

    `weight_format` and `adapters` say what its layers are now, the other attributes are as in `StackSpec`.
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        stack_id: int = 0,
        freeze_blocks: bool = False,
        *,
        uid: str | None = None,
        build_index: int | None = None,
    ) -> None:
        super().__init__()
        self.weight_format = "fp32"
        self.adapters: tuple[AdapterSpec, ...] = ()
        self.compute_dtype: str | None = None
        self.frozen_format: str | None = None
        self.trained = self.adapters_only = self.spectral = False
        self.io: InOut | None = None
        """Embedding, norm and head of its own, between which it runs alone."""
        self.blocks = nn.ModuleList(blocks)
        if not len(self.blocks):
            raise ValueError("a stack needs at least one block")
        self.stack_id = stack_id
        self.build_index = stack_id if build_index is None else build_index
        self.uid = uid or f"s{self.build_index}"
        if freeze_blocks:
            self.freeze_all()

    @classmethod
    def from_spec(cls, spec: StackSpec, stack_id: int) -> Stack:
        """The fp32 modules of a description; `curriculum.assemble` adds its format and adapters."""
        blocks = [Block(block) for block in spec.blocks]
        stack = cls(blocks, stack_id, uid=spec.uid, build_index=spec.build_index)
        stack.take_notes(spec)
        if spec.spectral:
            add_spectral_norm(stack)
        return stack

    def take_notes(self, spec: StackSpec) -> None:
        """Take over what a description says about the stack and its modules do not show."""
        self.compute_dtype, self.frozen_format = spec.compute_dtype, spec.frozen_format
        self.trained, self.adapters_only = spec.trained, spec.adapters_only

    @property
    def spec(self) -> StackSpec:
        blocks: list[Block] = list(self.blocks)  # type: ignore[arg-type]
        return StackSpec(
            self.uid,
            tuple(block.spec for block in blocks),
            self.build_index,
            self.weight_format,
            self.compute_dtype,
            self.adapters,
            self.frozen_format,
            self.trained,
            self.adapters_only,
            self.spectral,
            self.io is not None,
        )

    @property
    def d_model(self) -> int:
        return self.spec.blocks[0].d_model

    def freeze_all(self) -> None:
        """No gradient, and eval mode: dropout is off."""
        self.requires_grad_(False)
        self.eval()

    def unfreeze_all(self) -> None:
        """Thaw everything but frozen up projections."""
        for part in (*self.blocks, *([self.io] if self.io is not None else [])):
            part.requires_grad_(True)
        self.train()

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        for block in self.blocks:
            x_BTD = block(x_BTD, context)
        return x_BTD
