"""Parameters and FLOPs from descriptions, without building anything.

Counting follows the matrices: a matrix of P numbers costs 2P FLOP per token forward, 2P for the gradient to its
input and 2P for the gradient to itself. Attention adds 4 T D per token forward over T visible positions (half of
that when causal), and twice as much backward. Norms, activations and rotations are left out (under 1 %).
"""

from __future__ import annotations

from stackwise.model.settings import FFN_TYPES
from stackwise.model.spec import BlockSpec, RackSpec


def block_matrix_parameters(spec: BlockSpec) -> int:
    """Numbers in the matrices of a block."""
    kv_width = spec.n_kv_heads * spec.head_dim
    attention = 2 * spec.d_model * spec.d_model + 2 * spec.d_model * kv_width
    matrices = 3 if FFN_TYPES.get(spec.ffn_type, False) else 2
    return attention + matrices * spec.d_model * spec.d_ff


def block_forward_flops(spec: BlockSpec, seq_len: int) -> float:
    """FLOP per token of one block's forward pass over rows of `seq_len` tokens."""
    seen = (seq_len + 1) / 2 if spec.causal else seq_len
    return 2.0 * block_matrix_parameters(spec) + 4.0 * seen * spec.d_model


def step_flops(spec: RackSpec, trained: set[str], seq_len: int) -> float:
    """FLOP per token of one training step that trains the named units.

    `trained` holds unit names as `Rack.units` gives them ("embedding", "stack:s0", "tail", "norm", "head"). Units
    before the first trained one cost 1 (forward), trained ones 3, frozen ones behind it 2 (no gradient to their own
    weights); looking up the embedding is free.
    """
    rows = [(f"stack:{stack.uid}", block) for stack in spec.stacks for block in stack.blocks]
    rows += [("tail", block) for block in spec.tail]
    total, gradient_flows = 0.0, "embedding" in trained
    for name, block in rows:
        forward = block_forward_flops(block, seq_len)
        if name in trained:
            # Attention has no weights of its own: its gradient costs the same whether or not the block trains.
            gradient_flows = True
            total += 3 * forward
        elif gradient_flows:
            total += 3 * forward - 2.0 * block_matrix_parameters(block)
        else:
            total += forward
    head = 2.0 * spec.vocab_size * spec.d_model
    gradient_flows = gradient_flows or "norm" in trained
    own = "embedding" if spec.tied else "head"
    return total + head * (1 + gradient_flows + (own in trained))
