"""Description of one transformer layer: plain, immutable data without torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from stackwise.model.alibi import slopes
from stackwise.model.expert_spec import ExpertSpec
from stackwise.model.parts import KernelSpec, LatentSpec
from stackwise.model.registry import ATTENTIONS, FEED_FORWARDS, NORM_LAYERS
from stackwise.model.rope_scaling import RopeScaling
from stackwise.model.settings import FFN_TYPES, default_d_ff

NORM_PLACEMENTS = ("pre", "post", "both")
NESTED: dict[str, Any] = {
    "rope_scaling": RopeScaling,
    "experts": ExpertSpec,
    "latent": LatentSpec,
    "kernel": KernelSpec,
}
"""Fields of a block's description that are descriptions of their own."""


@dataclass(frozen=True)
class BlockSpec:
    """One transformer layer. `rope_theta` null = no rotation; `n_kv_heads` 0 and `d_ff` 0 take the defaults.

    `head_width` 0: `d_model` / `n_heads`. `attention_bias` (none, qkv, all): which linears of attention have a bias;
    empty: all or none, as `bias` says. With a `window` W a token sees those less than W away, and the first `sinks`.
    `softcap` c bends scores to c tanh(score / c); they are q k / sqrt(`score_width`), null: the head's width. `parallel`: attention and feed-forward read the same norm.
    `attn_input_norm` false: attention reads the residual stream as it is.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int = 0
    d_ff: int = 0
    attention_type: str = "mha"
    causal: bool = False
    qk_norm: bool = False
    rope_theta: float | None = 10_000.0
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_placement: str = "pre"
    ffn_type: str = "swiglu"
    freeze_up_proj: bool = False
    bias: bool = False
    dropout: float = 0.0
    residual_gain: float = 1.0
    zero_init_outputs: bool = False
    short_conv: int = 0
    head_width: int = 0
    attention_bias: str = ""
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    sinks: int = 0
    alibi: bool = False
    softcap: float | None = None
    parallel: bool = False
    attn_input_norm: bool = True
    experts: ExpertSpec | None = None
    latent: LatentSpec | None = None
    kernel: KernelSpec | None = None
    score_width: float | None = None

    def __post_init__(self) -> None:
        if self.n_kv_heads == 0:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        for registry, name in (
            (ATTENTIONS, self.attention_type),
            (FEED_FORWARDS, self.ffn_type),
            (NORM_LAYERS, self.norm),
        ):
            if name not in registry.names():
                registry.get(name)  # raises with the list and the nearest spelling
        if self.d_ff == 0:
            object.__setattr__(self, "d_ff", default_d_ff(self.d_model, self.ffn_type))
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> list[str]:
        found = []
        for name in ("d_model", "n_heads", "n_kv_heads", "d_ff"):
            if getattr(self, name) < 1:
                found.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if found:
            return found
        if self.head_width < 0:
            found.append(f"head_width must not be negative, got {self.head_width}")
        elif not self.head_width and self.d_model % self.n_heads:
            found.append(
                f"n_heads must divide d_model: {self.d_model} is no multiple of {self.n_heads}; or give head_width"
            )
        elif self.rope_theta is not None and self.rope_width % 2:
            found.append(f"rotary positions need an even head width, got {self.rope_width}")
        if self.n_kv_heads > self.n_heads or self.n_heads % self.n_kv_heads:
            found.append(f"n_kv_heads must divide n_heads: {self.n_kv_heads} does not divide {self.n_heads}")
        if self.short_conv < 0 or self.short_conv == 1:
            found.append(f"short_conv must be 0 (off) or at least 2, got {self.short_conv}")
        if self.short_conv and not self.causal and self.short_conv % 2 == 0:
            found.append(f"short_conv {self.short_conv} of a bidirectional block is even: it has no middle")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 <= self.residual_gain <= 1:
            found.append(f"residual_gain must be in [0, 1], got {self.residual_gain}")
        if self.norm_placement not in NORM_PLACEMENTS:
            known = ", ".join(NORM_PLACEMENTS)
            found.append(f"norm_placement must be one of {known}, got {self.norm_placement!r}")
        if self.attention_bias not in ("", "none", "qkv", "all"):
            found.append(f"attention_bias must be none, qkv or all, got {self.attention_bias!r}")
        found += self._sight_problems()
        if self.parallel and (self.norm_placement != "pre" or not self.attn_input_norm):
            found.append(
                "parallel needs norm_placement pre and attn_input_norm: its one norm feeds both sub-layers"
            )
        if not self.attn_input_norm and self.norm_placement == "post":
            found.append(
                "attn_input_norm false needs norm_placement pre or both: after a post-norm nothing is left out"
            )
        if self.rope_scaling is not None:
            if self.rope_theta is None:
                found.append("rope_scaling without rope_theta: there is no rotation to scale")
            else:
                found += self.rope_scaling.problems_of(self.rope_width)
        if self.freeze_up_proj and not FFN_TYPES.get(self.ffn_type, True):
            found.append(f"freeze_up_proj needs a gated feed-forward (such as swiglu), got {self.ffn_type}")
        return found + self._attention_problems()

    def _attention_problems(self) -> list[str]:
        found = []
        if (self.attention_type == "mla") != (self.latent is not None):
            found.append(
                "attention_type mla needs latent, a LatentSpec, which belongs to no other type; got "
                f"{self.attention_type!r} and {self.latent}"
            )
        if self.kernel is not None and self.kernel.mode == "linear":
            given = {"window": self.window, "alibi": self.alibi, "softcap": self.softcap}
            found += [
                f"{name} changes single scores, which kernel_mode linear never has; take score"
                for name, value in given.items()
                if value
            ]
        if self.score_width is not None:
            if not self.score_width > 0:
                found.append(f"score_width must be above 0, got {self.score_width}")
            if self.latent is not None or self.kernel is not None:
                found.append(
                    "score_width scales plain scores; latent attention and kernels scale theirs themselves"
                )
        if self.latent is not None:
            if self.qk_norm:
                found.append(
                    "qk_norm: mla normalises its latents, not its heads, so that decoding can absorb them"
                )
            if (self.rope_theta is None) != (self.latent.rope_dim == 0):
                found.append(
                    "mla rotates the rope_dim numbers of its latent: above 0 with rotary positions, else 0; got "
                    f"{self.latent.rope_dim} and rope_theta {self.rope_theta}"
                )
        return found

    def _sight_problems(self) -> list[str]:
        found = []
        if self.window is not None and self.window < 1:
            found.append(f"window must be at least 1, got {self.window}")
        if self.sinks < 0:
            found.append(f"sinks must not be negative, got {self.sinks}")
        if self.sinks and self.window is None:
            found.append(f"sinks {self.sinks} without a window: every token is visible already")
        if self.softcap is not None and not self.softcap > 0:
            found.append(f"softcap must be above 0, got {self.softcap}")
        if self.alibi and self.rope_theta is not None:
            found.append(
                "alibi with rope_theta gives positions twice; set rope_theta to null (use_rope false)"
            )
        return found

    @property
    def sight(self) -> tuple[bool, int | None, int, tuple[float, ...]]:
        """What `Visibility.mask` asks for: causal, window, sinks, slopes of ALiBi."""
        return self.causal, self.window, self.sinks, slopes(self.n_heads) if self.alibi else ()

    @property
    def head_dim(self) -> int:
        return self.head_width or self.d_model // self.n_heads

    @property
    def score_scale(self) -> float:
        """Factor on the products of queries and keys in plain attention."""
        return float((self.score_width or self.head_dim) ** -0.5)

    @property
    def query_width(self) -> int:
        """Numbers of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def rope_width(self) -> int:
        """Rotated numbers of a head."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have a bias."""
        return self.attention_bias in ("qkv", "all") if self.attention_bias else self.bias

    @property
    def out_bias(self) -> bool:
        """Whether the projection out of attention has a bias."""
        return self.attention_bias == "all" if self.attention_bias else self.bias

    @property
    def query_key_width(self) -> int:
        """Numbers of a head's query and key."""
        if self.latent is None:
            return self.head_dim
        return (self.latent.nope_dim or self.head_dim) + self.latent.rope_dim

    @property
    def value_width(self) -> int:
        """Numbers of a head's value."""
        return (self.latent.value_dim if self.latent is not None else 0) or self.head_dim

    def attention_info(self) -> dict[str, Any]:
        """What the attention is, in words and numbers: family, heads, kernel and ranks."""
        latent, kernel = self.latent, self.kernel
        info: dict[str, Any] = {
            "family": self.attention_type,
            "causal": self.causal,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "kernel": "linear" if kernel is None else kernel.kind,
        }
        if kernel is not None:
            info |= {"kernel_mode": kernel.mode, "features": kernel.features, "bandwidth": kernel.bandwidth}
        if latent is not None:
            info |= {"query_rank": latent.q_rank, "kv_rank": latent.kv_rank, "rope_dim": latent.rope_dim}
        return info

    @classmethod
    def create(cls, options: Mapping[str, Any]) -> BlockSpec:
        """From keyword arguments, nested parts as themselves or as maps; an unknown one is a TypeError with the nearest
        spelling."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
                raise TypeError(f"unknown block option {name!r}{hint}")
        parts = {
            name: kind(**options[name])
            for name, kind in NESTED.items()
            if isinstance(options.get(name), Mapping)
        }
        return cls(**{**options, **parts})
