"""Rules, notes and advice about latent and kernel attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stackwise.config.errors import Problem
from stackwise.config.rules import rule, uses_rope

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig

OVERRIDES, CUSTOM = "model.attention_overrides", "model.attention_custom"
WRITTEN = ("model.attention_preset", OVERRIDES, CUSTOM, "model.pos_encoding", "model.use_rope")


def _fields(config: StackWiseConfig) -> dict[str, Any]:
    return config.model.attention


def _problem(config: StackWiseConfig, name: str, message: str, allowed: str = "", hint: str = "") -> Problem:
    """About the field `name` of the attention, at the key that gave it."""
    model = config.model
    if getattr(model.attention_overrides, name) is not None:
        key = f"{OVERRIDES}.{name}"
    elif model.attention_preset == "custom" and getattr(model.attention_custom, name, None) is not None:
        key = f"{CUSTOM}.{name}"
    elif name == "qk_norm":
        key = "model.qk_norm"
    else:
        return Problem("model.attention_preset", message, model.attention_preset, allowed, hint)
    return Problem(key, message, _fields(config)[name], allowed, hint)


@rule(*WRITTEN)
def rotary_part_of_a_latent_fits_the_positions(config: StackWiseConfig) -> Problem | None:
    fields = _fields(config)
    width = fields["mla_rope_dim"]
    if fields["attention_type"] != "mla":
        return None
    if width % 2:
        return _problem(config, "mla_rope_dim", "rope rotates pairs", f"an even number such as {width + 1}")
    if uses_rope(config) and not width:
        message = "leaves rope nothing to rotate, so the model would see no positions"
        return _problem(config, "mla_rope_dim", message, "an even number > 0", "or set model.pos_encoding")
    if width and not uses_rope(config):
        message = f"is for rotary positions, not for {config.model.positions}"
        return _problem(config, "mla_rope_dim", message, "0, null")
    return None


@rule(*WRITTEN, "model.qk_norm")
def latents_are_normalised_in_place_of_heads(config: StackWiseConfig) -> Problem | None:
    fields = _fields(config)
    if fields["attention_type"] != "mla" or not fields["qk_norm"]:
        return None
    message = (
        "mla normalises its latents; a norm of each head would forbid decoding from the latent without keys"
    )
    return _problem(config, "qk_norm", message, "false")


@rule(*WRITTEN)
def linear_mode_has_positive_features(config: StackWiseConfig) -> Problem | None:
    fields = _fields(config)
    if fields["kernel_mode"] != "linear" or fields["kernel_type"] not in ("laplacian", "uniform"):
        return None
    message = (
        f"the {fields['kernel_type']} kernel has no positive random features, so weights in linear mode could be "
        "negative and their sum zero"
    )
    return _problem(
        config, "kernel_mode", message, "score, exact", "or take kernel_type gaussian or linear (softmax)"
    )


@rule(
    *WRITTEN,
    "model.sliding_window",
    "model.attention_softcap",
)
def linear_mode_has_no_single_scores(config: StackWiseConfig) -> Problem | None:
    model = config.model
    given = {
        "model.sliding_window": model.sliding_window is not None,
        "model.attention_softcap": model.attention_softcap is not None,
        "model.pos_encoding alibi": model.positions == "alibi",
    }
    names = ", ".join(name for name, there in given.items() if there)
    if _fields(config)["kernel_mode"] != "linear" or not names:
        return None
    message = f"never builds the single scores that {names} would change"
    return _problem(config, "kernel_mode", message, "score, exact", f"or leave out {names}")


@rule(*WRITTEN, "model.score_width")
def score_width_is_of_plain_scores(config: StackWiseConfig) -> Problem | None:
    width = config.model.score_width
    if width is None or not (has_kernel(config) or has_latent(config)):
        return None
    what = "latent attention scales its scores" if has_latent(config) else "a kernel scales what it compares"
    return Problem("model.score_width", f"has no place: {what} by itself", width, "null")


def has_kernel(config: StackWiseConfig) -> bool:
    """Whether the attention is not that of plain products in a softmax."""
    fields = _fields(config)
    return bool(fields["kernel_type"] != "linear" or fields["kernel_mode"] == "linear")


def has_latent(config: StackWiseConfig) -> bool:
    return bool(_fields(config)["attention_type"] == "mla")


Applies = Callable[["StackWiseConfig"], bool]


def _both(name: str, applies: Applies, reason: str) -> list[tuple[str, Applies, str]]:
    """A note for the field in the overrides and in a custom attention, each where it is read."""

    def read(config: StackWiseConfig) -> bool:
        return config.model.attention_preset == "custom" and applies(config)

    return [(f"{OVERRIDES}.{name}", applies, reason), (f"{CUSTOM}.{name}", read, reason)]


INERT: list[tuple[str, Applies, str]] = [
    row
    for name, applies, reason in (
        *(
            (name, lambda c: not has_latent(c), "the attention is not mla")
            for name in ("mla_rq", "mla_rkv", "mla_rope_dim")
        ),
        ("kernel_dim", lambda c: not has_kernel(c), "the attention has no kernel"),
        (
            "kernel_bandwidth",
            lambda c: _fields(c)["kernel_type"] == "linear",
            "the linear kernel has no bandwidth",
        ),
        ("kernel_norm", lambda c: _fields(c)["kernel_type"] != "laplacian", "the kernel is not laplacian"),
    )
    for row in _both(name, applies, reason)
]


def _latent_is_wide(config: StackWiseConfig) -> bool:
    model, fields = config.model, _fields(config)
    keys_and_values = 2 * fields["n_kv_heads"] * (model.head_dim or model.d_model // model.n_heads)
    return has_latent(config) and fields["mla_rkv"] >= keys_and_values


ADVICE: list[tuple[Applies, str]] = [
    (
        _latent_is_wide,
        "mla_rkv is not below the width of the keys and values that it stands for: the cache grows instead of "
        "shrinking",
    ),
    (
        lambda c: _fields(c)["kernel_type"] == "uniform" and uses_rope(c),
        "the uniform kernel under rotary positions: it is not rotation invariant, so scores depend on places and not "
        "only on distances, and it takes negative values",
    ),
    (
        lambda c: (
            _fields(c)["kernel_type"] == "laplacian" and _fields(c)["kernel_norm"] == "l1" and uses_rope(c)
        ),
        "the laplacian kernel of the l1 norm under rotary positions: it is not rotation invariant, so scores depend "
        "on places and not only on distances",
    ),
    (
        lambda c: has_kernel(c) and _fields(c)["kernel_mode"] == "exact",
        "kernel_mode exact holds the kernel of all pairs of tokens at once; it is there to compare with",
    ),
]
