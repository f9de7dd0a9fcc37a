"""What the attention of a block multiplies: its matrices, and its products over the tokens that it sees.

With scores, N heads cost 4 N W FLOP per token and visible token. W is the wider of a query and a value, for the other
is filled up with zeros: the head width, under mla nope + rope, of kernels the number of random features. Positive features in place of scores cost the same per
token at any length: 4 D V per head where all is seen at once, and for causal attention in chunks of C also half of C
visible tokens. Random features themselves cost 2 D W for each head of queries and keys, W wide, and as much backward.
"""

from __future__ import annotations

from stackwise.model.block_spec import BlockSpec

CHUNK = 128
"""Tokens that causal attention with positive features takes at a time."""

INTO_ATTENTION = {"attn.q_up": "attn.q_down", "attn.kv_up": "attn.kv_down"}
"""Matrices of attention that do not read the block's input, and whose output they read."""


def attention_matrices(spec: BlockSpec) -> dict[str, tuple[int, int]]:
    """Name -> (outputs, inputs), in the order in which they are used."""
    width, latent = spec.d_model, spec.latent
    if latent is None:
        kv_width = spec.n_kv_heads * spec.head_dim
        query = spec.n_heads * spec.head_dim
        return {
            "attn.q": (query, width),
            "attn.k": (kv_width, width),
            "attn.v": (kv_width, width),
            "attn.o": (width, query),
        }
    query_width, value = spec.query_key_width, spec.value_width
    nope = query_width - latent.rope_dim
    query = spec.n_heads * query_width
    queries = {"attn.q": (query, width)}
    if latent.q_rank:
        queries = {"attn.q_down": (latent.q_rank, width), "attn.q_up": (query, latent.q_rank)}
    return {
        **queries,
        "attn.kv_down": (latent.cached, width),
        "attn.kv_up": (spec.n_kv_heads * (nope + value), latent.kv_rank),
        "attn.o": (width, spec.n_heads * value),
    }


def attention_flops(spec: BlockSpec, seq_len: int) -> float:
    """FLOP per token of the products of attention, forward, over rows of `seq_len` tokens."""
    seen = tokens_seen(spec, seq_len)
    width, value, kernel = spec.query_key_width, spec.value_width, spec.kernel
    if kernel is not None and kernel.mode != "exact":
        width = kernel.features
    if kernel is None or kernel.mode != "linear":
        return 4.0 * seen * spec.n_heads * max(width, value)
    state = 2.0 * width * (value + 1)  # the sum of weights goes along as one more value
    chunk = 0.0
    if spec.causal:
        chunk = spec.n_heads * (width + value + 1) * (min(CHUNK, seq_len) + 1)
    return state * (spec.n_kv_heads + spec.n_heads) + chunk


def tokens_seen(spec: BlockSpec, seq_len: int) -> float:
    """Tokens visible to one of `seq_len`, on average."""
    if spec.window is None or spec.window >= seq_len:
        return (seq_len + 1) / 2 if spec.causal else float(seq_len)
    window, sinks = spec.window, min(spec.sinks, seq_len)
    if spec.causal:
        most = min(window + sinks, seq_len)  # in sight once the row is that long
        return (most * (most + 1) / 2 + (seq_len - most) * most) / seq_len
    near = seq_len + sum(2 * (seq_len - apart) for apart in range(1, window))
    far = sum(max(0, seq_len - j - window) + max(0, j - window + 1) for j in range(sinks))
    return (near + far) / seq_len


def feature_flops(spec: BlockSpec) -> float:
    """FLOP per token of the random features of queries and keys, forward."""
    kernel = spec.kernel
    if kernel is None or kernel.mode == "exact":
        return 0.0
    return 2.0 * kernel.features * spec.query_key_width * (spec.n_heads + spec.n_kv_heads)
