"""Decoding one token per row with as few operations as it takes, prepared once per generation.

A token's pass through a small model is a few microseconds of arithmetic between many small operations. The plan reads
the rack's own modules and weights once and lays them out for that pass: q, k, v in one matrix, gate and up in one,
norm weights and constant factors folded into the matrices that follow, rotation factors looked up ahead, keys and
values without gaps. It equals `Rack.forward` up to rounding; what it does not cover (`uncovered` says what) runs
through the rack's modules.

Shape letters: B batch, S held tokens, D model width, N heads, K key-value heads, H head width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.kernels.linear_cross_entropy import capped
from stackwise.kernels.packed_linear import packed_linear
from stackwise.model.attention.mha import Attention
from stackwise.model.attention.rotary import Rotary
from stackwise.model.block import Block, Stack
from stackwise.model.block_spec import BlockSpec
from stackwise.model.cache import KeyValueCache, RackCache
from stackwise.model.embedding import Embedding, WidthMLP
from stackwise.model.feed_forward import FeedForward, GatedFeedForward
from stackwise.model.linear import Linear
from stackwise.model.norms import LayerNorm, OffsetRMSNorm, RMSNorm
from stackwise.model.own_io import Head
from stackwise.model.positions import LearnedPositions, SinusoidalPositions
from stackwise.model.rack import Rack, Stacks, recompute_block, run_block
from stackwise.model.short_conv import ShortConv

COPY_LIMIT = 2 * 2**30
"""The plan copies the weights; models above this many bytes run through their modules."""

_COVERED: tuple[type[nn.Module], ...] = (
    Rack,
    Stacks,
    Stack,
    Block,
    Attention,
    GatedFeedForward,
    FeedForward,
    RMSNorm,
    OffsetRMSNorm,
    LayerNorm,
    ShortConv,
    LearnedPositions,
    SinusoidalPositions,
    Head,
    Linear,
    Embedding,
    WidthMLP,
    nn.ModuleList,
    nn.Dropout,
)

Normalise = Callable[[Tensor], Tensor]
Layer = tuple[Tensor, Tensor | None, float]
"""Weight, bias and a factor on both."""


def uncovered(rack: Rack) -> str | None:
    """Why a rack must be decoded through its modules; null when a plan computes the same."""
    for name, module in rack.named_modules():
        if type(module) not in _COVERED:  # a subclass may compute something else
            return f"{name} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the rack'} has a forward hook"
        if getattr(module, "rounding", None) is not None:
            return f"{name} rounds its matrix"
    for block in rack.blocks():
        if why := _uncovered_block(block.spec):
            return why
    if rack.embedding.types is not None or rack.embedding.norm is not None:
        return "token types or a norm come behind the embedding"
    if not rack.head.is_plain:
        return "the head transforms what it reads"
    if rack.span != (0, None):
        return "only some of its blocks run"
    if rack.runner not in (run_block, recompute_block):
        return "its blocks are not simply called"
    if any(stack.compute_dtype not in (None, "float32") for stack in rack.stacks):
        return "a stack computes in a dtype of its own"
    kinds = {(tensor.device.type, tensor.dtype) for tensor in rack.parameters()}
    if kinds not in ({("cpu", torch.float32)}, {("cpu", torch.float64)}):
        return "weights are not all float32 on the CPU"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if sum(tensor.nbytes for tensor in rack.parameters()) > COPY_LIMIT:
        return f"the weights have more than {COPY_LIMIT:,} bytes"
    return None


def _uncovered_block(block: BlockSpec) -> str | None:
    """Why a plan cannot run a block; null when it can."""
    if block.norm_placement != "pre":
        return "a block normalises after its sub-layers"
    if block.parallel or not block.attn_input_norm:
        return "a block has one norm or none in front of its sub-layers"
    if block.window is not None:
        return "a block sees a window"
    if block.alibi or block.softcap is not None:
        return "scores are changed before the softmax"
    if block.rope_scaling is not None and block.rope_scaling.depends_on_length:
        return f"its positions are scaled by length ({block.rope_scaling.type})"
    return None


class DecodePlan:
    """The forward pass of one token per row of a covered rack.

    `start` fixes where the prompts end; then each `step` takes the next ids [B] and gives logits [B, V]. Run it
    without gradients.
    """

    def __init__(self, rack: Rack, rows: int) -> None:
        """Copies the weights of `rack` for batches of `rows`."""
        self.rack, self.rows = rack, rows
        self.blocks = [_BlockPlan(block, rows) for block in rack.blocks()]
        self.normalise = _normaliser(rack.norm)
        self.head = packed_linear(*_joined([(rack.head.matrix, rack.head.bias, 1.0)], rack.norm), rows)

    def start(self, cache: RackCache, position_ids: Tensor, padding: Tensor | None) -> None:
        """Continue after the prompts that `cache` holds; it is read now and not needed any more.

        position_ids [B or 1, n]: positions of the tokens to come. padding bool [B, T]: False where the prompts are
        padded, null where they are not.
        """
        rack = self.rack
        self.first = self.length = cache.length
        self.padding = padding
        self.added = None if rack.positions is None else rack.positions(position_ids).unbind(1)
        by_kind = {block.rotation: block.rotary for block in self.blocks}
        self.turns = {kind: self._turns(rotary, position_ids) for kind, rotary in by_kind.items()}
        self.limit = self.length + position_ids.shape[1]
        self.held = [_Held(held, self.limit) for held in cache.blocks if isinstance(held, KeyValueCache)]
        self.capacity = self.length
        self._grow()

    def _turns(self, rotary: Rotary | None, position_ids: Tensor) -> Sequence[Tensor | None]:
        """Rotation factors of each step to come, [B or 1, 1, H/2]; null without rotation."""
        if rotary is None:
            return [None] * position_ids.shape[1]
        weight = self.rack.embedding.weight
        wide = weight.dtype == torch.float64
        table = rotary.table(self.rack.spec.max_seq_len, weight.device, wide)
        return table[position_ids].unsqueeze(2).unbind(1)

    def _grow(self) -> None:
        """Make room for an eighth more tokens, at least 32.

        Keys and values are kept without gaps between heads and read to the end, where `bias` hides the places that
        are still empty: a few wasted products, but memory read in one stream, which is about twice as fast as
        skipping over a reserve behind every head.
        """
        self.capacity = min(self.limit, self.capacity + max(32, self.capacity // 8))
        for held in self.held:
            held.grow(self.length, self.capacity)
        rows = 1 if self.padding is None else self.rows
        bias = self.rack.embedding.weight.new_zeros(rows, 1, self.capacity)
        bias[:, :, self.length :] = -math.inf
        if self.padding is not None:
            bias[:, 0, : self.padding.shape[1]].masked_fill_(~self.padding, -math.inf)
        kv_heads = {block.heads[1] for block in self.blocks}
        self.bias = {k: bias if rows == 1 else bias.repeat_interleave(k, dim=0) for k in kv_heads}

    def step(self, ids_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token per row."""
        if self.length == self.capacity:
            self._grow()
        at, step = self.length, self.length - self.first
        for bias in self.bias.values():
            bias[:, :, at] = 0.0
        x_BD = self.rack.look_up(ids_B)
        if self.added is not None:
            x_BD += self.added[step]
        for block, held in zip(self.blocks, self.held, strict=True):
            turn = self.turns[block.rotation][step]
            block(x_BD, held, at, turn, self.bias[block.heads[1]])
        self.length = at + 1
        return capped(self.head(self.normalise(x_BD)), self.rack.head.softcap)


class _Held:
    """What one block keeps of the tokens it has seen: keys and values, and the last inputs of its convolutions.

    keys [B K, capacity, H] and values [B K, H, capacity], each in the order in which its product reads fastest.
    """

    def __init__(self, prompts: KeyValueCache, limit: int) -> None:
        """`limit` is the largest capacity that will be asked for."""
        length, (rows, heads, _, width) = prompts.length, prompts.keys.shape
        self.shape = (rows, heads, width)
        self.keys = prompts.keys[:, :, :length].flatten(0, 1)
        self.values = prompts.values[:, :, :length].flatten(0, 1).transpose(1, 2)
        self.buffer = self.keys.new_empty(2, rows * heads * limit * width)
        self.attn_inputs, self.ffn_inputs = _newest_first(prompts, "attn"), _newest_first(prompts, "ffn")

    def grow(self, length: int, capacity: int) -> None:
        """Lay out the `length` tokens held for `capacity`, in the same memory."""
        rows, heads, width = self.shape
        size = rows * heads * capacity * width
        held = self.keys[:, :length].clone()
        self.keys = self.buffer[0, :size].view(-1, capacity, width)
        self.keys[:, :length] = held
        held = self.values[:, :, :length].clone()
        self.values = self.buffer[1, :size].view(-1, width, capacity)
        self.values[:, :, :length] = held
        # the bias hides these, but a weight of 0 times what is not a number would not be 0
        self.keys[:, length:] = 0.0
        self.values[:, :, length:] = 0.0
        self.keys_t = self.keys.transpose(1, 2)
        # where the key and the value of a token are written: [capacity, B, K, H]
        self.key_places = self.keys.view(rows, heads, capacity, width).permute(2, 0, 1, 3)
        self.value_places = self.values.view(rows, heads, width, capacity).permute(3, 0, 1, 2)


class _Reader:
    """Norm, short convolution where there is one, and the linear layers that read them."""

    def __init__(self, norm: nn.Module, conv: ShortConv | None, layers: Sequence[Layer], rows: int) -> None:
        self.normalise = _normaliser(norm)
        self.gain: Tensor | None = None
        self.shift: Tensor | None = None
        self.taps: Sequence[Tensor] = ()
        if conv is not None:
            self.gain, self.shift = _affine(norm)
            self.taps = conv.weight.unbind(0)
        self.linear = packed_linear(*_joined(layers, norm if conv is None else None), rows)

    def __call__(self, x_BD: Tensor, inputs: list[Tensor]) -> Tensor:
        """`inputs`: what the convolution read at the tokens before, newest first."""
        y_BD = self.normalise(x_BD)
        if self.gain is not None:
            y_BD.mul_(self.gain)
            if self.shift is not None:
                y_BD.add_(self.shift)
            inputs.insert(0, y_BD)
            y_BD = y_BD * self.taps[0]
            for seen_BD, tap in zip(inputs[1:], self.taps[1:], strict=False):
                y_BD.addcmul_(seen_BD, tap)
            del inputs[len(self.taps) - 1 :]
        return self.linear(y_BD)


class _BlockPlan:
    """One pre-norm block for one token per row; it adds to `x_BD` in place."""

    def __init__(self, block: Block, rows: int) -> None:
        spec, attn, ffn = block.spec, block.attn, block.ffn
        self.rows, self.head_dim, self.rotary = rows, spec.head_dim, attn.rotary
        self.rotation = (spec.rope_theta, spec.head_dim, spec.rope_scaling)
        self.heads = (spec.n_heads, spec.n_kv_heads)
        self.kv_rows, self.group = rows * spec.n_kv_heads, spec.n_heads // spec.n_kv_heads
        scale = spec.score_scale  # of the scores, folded into the queries
        self.qk_norm: Normalise | None = None
        if attn.q_norm is not None and attn.k_norm is not None:
            gains = [attn.q_norm.gain * scale] * spec.n_heads + [attn.k_norm.gain] * spec.n_kv_heads
            self.qk_gain = torch.stack(gains) * math.sqrt(spec.head_dim)
            self.qk_norm, scale = _normaliser(attn.q_norm), 1.0
        qkv = [_layer(attn.q, scale), _layer(attn.k), _layer(attn.v)]
        self.qkv = _Reader(block.attn_norm, block.attn_conv, qkv, rows)
        self.out = packed_linear(*_joined([_layer(attn.o, block.gain)]), rows)
        self.gated, self.activation = isinstance(ffn, GatedFeedForward), ffn.activation
        inner = [_layer(ffn.gate), _layer(ffn.up)] if self.gated else [_layer(ffn.up)]
        assert block.ffn_norm is not None, "parallel blocks are not covered"
        self.inner = _Reader(block.ffn_norm, block.ffn_conv, inner, rows)
        self.down = packed_linear(*_joined([_layer(ffn.down, block.gain)]), rows)

    def __call__(self, x_BD: Tensor, held: _Held, at: int, turn: Tensor | None, bias: Tensor) -> None:
        """turn [B or 1, 1, H/2] rotates queries and keys; bias [B K or 1, 1, S] is -inf where nothing is to be seen."""
        qkv = self.qkv(x_BD, held.attn_inputs).view(self.rows, -1, self.head_dim)
        n, k_heads = self.heads
        if self.qk_norm is not None:
            qk, v = qkv[:, : n + k_heads], qkv[:, n + k_heads :]
            qkv = torch.cat((self.qk_norm(qk).mul_(self.qk_gain), v), dim=1)
        if turn is not None:
            pairs = torch.view_as_complex(qkv.view(self.rows, -1, self.head_dim // 2, 2))
            pairs.narrow(1, 0, n + k_heads).mul_(turn)
        held.key_places[at].copy_(qkv.narrow(1, n, k_heads))
        held.value_places[at].copy_(qkv.narrow(1, n + k_heads, k_heads))
        q = qkv.narrow(1, 0, n).reshape(self.kv_rows, self.group, self.head_dim)
        seen = torch.softmax(torch.baddbmm(bias, q, held.keys_t), -1)
        mixed = torch.bmm(held.values, seen.transpose(1, 2))  # [B K, H, N / K]
        x_BD += self.out(mixed.transpose(1, 2).reshape(self.rows, -1))
        inner = self.inner(x_BD, held.ffn_inputs)
        if self.gated:
            gate, up = inner.chunk(2, -1)
            inner = self.activation(gate).mul_(up)
        else:
            inner = self.activation(inner)
        x_BD += self.down(inner)


def _normaliser(norm: nn.Module) -> Normalise:
    """The norm without its parameters; for a root-mean-square norm also without the factor sqrt(width)."""
    if isinstance(norm, LayerNorm):
        shape, eps = norm.weight.shape, norm.eps
        return lambda x: F.layer_norm(x, shape, None, None, eps)
    assert isinstance(norm, RMSNorm)
    # x / sqrt(|x|^2 + width eps), and the root is the hypotenuse of |x| and sqrt(width eps)
    side = torch.sqrt(norm.weight.new_tensor(norm.weight.numel() * norm.eps))
    return lambda x: torch.div(x, torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), side))


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """What `_normaliser` leaves out: the factor and the shift of each column."""
    assert isinstance(norm, RMSNorm | LayerNorm)
    if isinstance(norm, LayerNorm):
        return norm.weight, norm.bias
    return norm.gain * math.sqrt(norm.weight.numel()), None


def _layer(linear: nn.Linear, factor: float = 1.0) -> Layer:
    return linear.weight, linear.bias, factor


def _joined(layers: Sequence[Layer], norm: nn.Module | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layers side by side, each times its factor.

    With a norm they read its parameter-free form and give what they gave after the norm itself.
    """
    gain, shift = (None, None) if norm is None else _affine(norm)
    biases = []
    for weight, bias, factor in layers:
        moved = bias
        if shift is not None:
            moved = weight @ shift if bias is None else bias + weight @ shift
        if moved is not None:
            biases.append(moved * factor)
    bias = torch.cat(biases) if biases else None
    if gain is None and len(layers) == 1 and layers[0][2] == 1.0:
        return layers[0][0], bias
    first = layers[0][0]
    joined = first.new_empty(sum(weight.shape[0] for weight, _, _ in layers), first.shape[1])
    rows = joined.split([weight.shape[0] for weight, _, _ in layers])
    for place, (weight, _, factor) in zip(rows, layers, strict=True):
        torch.mul(weight, factor if gain is None else gain * factor, out=place)
    return joined, bias


def _newest_first(prompts: KeyValueCache, name: str) -> list[Tensor]:
    kept = prompts.kept(name)
    return [] if kept is None else list(kept.flip(1).unbind(1))
