"""What must hold between keys, and which keys have no effect beside others.

A rule is a small function of the whole configuration that returns what is wrong, or None. It names
the keys it reads, so that it can be left out where one of them has the wrong shape already.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from stackwise.config.errors import Problem
from stackwise.config.shape import Path, Sources, source_of

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


Check = Callable[["StackWiseConfig"], Problem | list[Problem] | None]


class Rule(NamedTuple):
    """A check and the keys it reads; the first key that somebody wrote gives the place of the problem."""

    keys: tuple[Path, ...]
    check: Check


RULES: list[Rule] = []


def rule(*keys: str) -> Callable[[Check], Check]:
    """Add the function to RULES."""

    def add(check: Check) -> Check:
        RULES.append(Rule(tuple(tuple(key.split(".")) for key in keys), check))
        return check

    return add


def broken_rules(config: StackWiseConfig, sources: Sources, wrong: Collection[Path] = ()) -> list[Problem]:
    """What every rule finds, leaving out the rules that read a key in `wrong`."""
    problems = []
    for keys, check in RULES:
        if any(key[: len(path)] == path for path in wrong for key in keys):
            continue
        if found := check(config):
            written = [key for key in keys if key in sources]
            file, line = source_of(written[0], sources) if written else ("", None)
            listed = [found] if isinstance(found, Problem) else found
            problems += [replace(problem, file=file, line=line) for problem in listed]
    return problems


def stacks_at_the_end(config: StackWiseConfig) -> int:
    """Stacks the run ends with."""
    progressive = config.training.progressive
    if progressive.enabled and progressive.target_stacks is not None:
        return progressive.target_stacks
    return config.model.architecture.n_stacks


def program_of(config: StackWiseConfig) -> str:
    """Where the stages come from: a building mode, end_to_end, as_one (everything in one stage) or by_hand."""
    training = config.training
    if training.stages is not None:
        return "by_hand"
    if not training.progressive.enabled:
        return "end_to_end"
    return "as_one" if training.unit == "rack" else training.progressive.building_mode


def appends(config: StackWiseConfig) -> bool:
    """Whether the rack is that of an append run, with global head blocks and a head of its own."""
    progressive = config.training.progressive
    return progressive.enabled and progressive.building_mode == "append"


def copies_stacks(config: StackWiseConfig) -> bool:
    """Whether new stacks start from trained ones."""
    return program_of(config) in ("append", "prepend", "grow") and stacks_at_the_end(config) > 1


def growth_factor(config: StackWiseConfig) -> int | None:
    """How many times more stacks the rack of grow has at its end; null where no factor divides them."""
    progressive, stacks = config.training.progressive, stacks_at_the_end(config)
    if progressive.growth_factor is not None:
        return progressive.growth_factor
    wanted = 4 if stacks * config.model.architecture.blocks_per_stack >= 8 else 2
    return next((g for g in (wanted, 2, 3, 4) if stacks % g == 0), None)


def uses_rope(config: StackWiseConfig) -> bool:
    return config.model.positions == "rope"


@rule("model.n_heads", "model.d_model", "model.head_dim")
def heads_divide_the_width(config: StackWiseConfig) -> Problem | None:
    model = config.model
    if model.head_dim is not None or model.d_model % model.n_heads == 0:
        return None
    return Problem(
        "model.n_heads",
        f"must divide model.d_model {model.d_model}",
        model.n_heads,
        divisors(model.d_model),
        "or set model.head_dim",
    )


@rule("model.d_model", "model.n_heads", "model.head_dim", "model.pos_encoding", "model.use_rope")
def head_width_is_even_under_rope(config: StackWiseConfig) -> Problem | None:
    model = config.model
    if model.attention["attention_type"] == "mla":
        return None  # which rotates numbers of their own
    if model.head_dim is not None:
        if not uses_rope(config) or model.head_dim % 2 == 0:
            return None
        message = "is odd, and rope rotates pairs"
        return Problem("model.head_dim", message, model.head_dim, hint="or choose another model.pos_encoding")
    width, rest = divmod(model.d_model, model.n_heads)
    if not uses_rope(config) or rest or width % 2 == 0:
        return None
    return Problem(
        "model.d_model",
        f"rope rotates pairs and needs an even head width, not d_model / n_heads = {width}",
        model.d_model,
        hint="change d_model or n_heads, or set model.pos_encoding to learned, sinusoidal, alibi or none",
    )


@rule("model.n_kv_heads", "model.n_heads")
def kv_heads_divide_the_heads(config: StackWiseConfig) -> Problem | None:
    model = config.model
    if model.n_kv_heads is None or model.n_heads % model.n_kv_heads == 0:
        return None
    return Problem(
        "model.n_kv_heads",
        f"must divide model.n_heads {model.n_heads}",
        model.n_kv_heads,
        divisors(model.n_heads),
    )


@rule("model.freeze_up_proj", "model.ffn_type")
def frozen_up_projection_has_a_gate(config: StackWiseConfig) -> Problem | None:
    model = config.model
    if not model.freeze_up_proj or model.ffn_is_gated:
        return None
    return Problem(
        "model.freeze_up_proj",
        f"needs a feed-forward whose gate goes on learning, not {model.ffn_type}",
        model.freeze_up_proj,
        hint="set model.ffn_type to swiglu or geglu",
    )


@rule("model.attention_custom", "model.attention_preset")
def custom_attention_has_fields(config: StackWiseConfig) -> Problem | None:
    if not _custom_without_fields(config):
        return None
    return Problem(
        "model.attention_custom",
        "the preset custom takes the attention's fields from here",
        None if config.model.attention_custom is None else {},
        "map of attention_type, attention_mode, kernel_type, ...",
        "or choose another model.attention_preset",
    )


@rule("model.pos_encoding", "model.use_rope")
def positions_agree(config: StackWiseConfig) -> Problem | None:
    model = config.model
    if model.pos_encoding is None or (model.pos_encoding == "rope") == model.use_rope:
        return None
    meant = "false" if model.use_rope else "true"
    return Problem(
        "model.pos_encoding",
        f"disagrees with model.use_rope {str(model.use_rope).lower()}",
        model.pos_encoding,
        hint=f"remove model.use_rope or set it to {meant}",
    )


@rule("training.seq_len", "model.max_seq_len")
def rows_fit_the_positions(config: StackWiseConfig) -> Problem | None:
    longest = config.model.max_seq_len
    if config.training.seq_len <= longest:
        return None
    return Problem(
        "training.seq_len",
        f"exceeds model.max_seq_len {longest}",
        config.training.seq_len,
        f"whole number from 1 to {longest}",
        "or raise model.max_seq_len",
    )


@rule(
    "model.attention_preset",
    "model.attention_overrides.attention_mode",
    "model.attention_custom.attention_mode",
    "training.progressive.training_objective",
)
def clm_needs_causal_attention(config: StackWiseConfig) -> Problem | None:
    objective = config.training.progressive.training_objective
    causal = config.model.attention["attention_mode"] == "causal"
    if objective != "clm" or causal or _custom_without_fields(config):
        return None
    return Problem(
        "model.attention_preset",
        "the objective clm needs causal attention, or every position would see its own target",
        config.model.attention_preset,
        hint="choose gpt_style, or set model.attention_overrides.attention_mode to causal",
    )


@rule("model.short_conv", "model.attention_preset", "model.attention_overrides.attention_mode")
def short_conv_has_a_width(config: StackWiseConfig) -> Problem | None:
    width = config.model.short_conv
    if width == 1:
        return Problem("model.short_conv", "covers no earlier token", width, "0, or 2 and more")
    if width % 2 == 0 and width and config.model.attention["attention_mode"] != "causal":
        message = "is even, so a bidirectional model, which looks both ways, has no middle for it"
        return Problem("model.short_conv", message, width, f"0, or odd, such as {width + 1}")
    return None


@rule("data.path", "data.source")
def source_and_path_fit(config: StackWiseConfig) -> Problem | None:
    data = config.data
    if data.source == "stdlib":
        if data.path is None:
            return None
        hint = "set data.source to text, jsonl, parquet or hf, or remove the path"
        return Problem("data.path", "the source stdlib reads no path", data.path, hint=hint)
    if data.path is None:
        what = "the name of a data set" if data.source == "hf" else "files or globs"
        return Problem("data.path", f"the source {data.source} needs a path", None, what, "set data.path=...")
    return None


@rule(
    "model.spectral_norm",
    "model.zero_init_outputs",
    "training.progressive.new_stack_init",
    "training.progressive.qlora_enabled",
)
def spectral_norm_needs_matrices_of_its_own(config: StackWiseConfig) -> list[Problem]:
    """A matrix of zeros has no direction to keep at norm 1, and adapters change a matrix behind its norm."""
    if not config.model.spectral_norm:
        return []
    progressive, records = config.training.progressive, config.training.stages or ()
    starts = [
        ("model.zero_init_outputs", config.model.zero_init_outputs),
        (
            "training.progressive.new_stack_init",
            copies_stacks(config) and progressive.new_stack_init == "zero",
        ),
        *(
            (f"training.stages.{i}.grow.init", record.grow is not None and record.grow.init == "zero")
            for i, record in enumerate(records)
        ),
    ]
    message = "starts matrices at zero, which model.spectral_norm cannot bring to norm 1"
    hint = "model.residual_gain near 0 keeps new blocks near the identity"
    found = [Problem(key, message, hint=hint) for key, wrong in starts if wrong]
    if progressive.qlora_enabled:
        message = "would let adapters change matrices behind model.spectral_norm"
        found.append(Problem("training.progressive.qlora_enabled", message, True, "false"))
    return found


def _custom_without_fields(config: StackWiseConfig) -> bool:
    custom = config.model.attention_custom
    return config.model.attention_preset == "custom" and not (custom and custom.model_dump(exclude_none=True))


def divisors(number: int) -> str:
    """The divisors up to 256; more parts than that are nobody's wish."""
    found = [d for d in range(1, min(number, 256) + 1) if number % d == 0]
    return ", ".join(map(str, found))
