"""Fill in what a configuration leaves open, each value with the reason for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from stackwise.config.errors import ConfigError, Problem, show
from stackwise.config.notes import grows, has_own_io, trains_the_trunk, tunes_jointly
from stackwise.config.objective_rules import masks
from stackwise.config.rules import appends, growth_factor, program_of, stacks_at_the_end

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


@dataclass(frozen=True)
class Derived:
    """A value that nobody gave."""

    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.key} = {show(self.value)} ({self.reason})"


def resolve(
    config: StackWiseConfig, *, vocab_size: int | None = None, mask_id: int | None = None
) -> tuple[StackWiseConfig, list[Derived]]:
    """A copy in which null and auto give way to values, and the list of what was filled in.

    `vocab_size` and `mask_id` are the tokenizer's; without the first a null `model.vocab_size` stays null. What depends on
    the machine (`training.device`, `.dtype`, `.loss_chunk_tokens`) and budgets in epochs stay open too.
    Resolving twice changes nothing. Raises ConfigError where the vocabulary is too small for the tokenizer.
    """
    config = config.model_copy(deep=True)
    derived: list[Derived] = []

    def fill(key: str, value: Any, reason: str, when: bool = True) -> None:
        *sections, name = key.split(".")
        section: Any = config
        for part in sections:
            section = getattr(section, part)
        if when and getattr(section, name) in (None, "auto"):
            setattr(section, name, value)
            derived.append(Derived(key, value, reason))

    model, training = config.model, config.training
    progressive, optimizer = training.progressive, training.optimizer

    fill("model.n_kv_heads", model.attention["n_kv_heads"], f"the choice of {model.attention_preset}")
    rule = "8/3 of d_model, rounded to a multiple of 64" if model.ffn_is_gated else "4 times d_model"
    fill("model.d_ff", model.ffn_width, f"{rule}, for {model.ffn_type}")
    fill("model.pos_encoding", model.positions, f"use_rope is {show(model.use_rope)}")
    reason = "so that the head can train at every stage" if appends(config) else "both train at the same time"
    fill("model.tie_embeddings", not appends(config), reason)
    if vocab_size is not None:
        size = f"size of the tokenizer {config.data.tokenizer!r}"
        if masks(config):
            id_, reason = _mask_token(config, vocab_size, mask_id)
            fill("objective.mask_token_id", id_, reason)
            if id_ >= vocab_size:
                vocab_size, size = id_ + 1, f"{size} and the mask token"
        fill("model.vocab_size", vocab_size, size)
        if model.vocab_size is not None and model.vocab_size < vocab_size:
            message = f"smaller than the {vocab_size} tokens of the {size.removeprefix('size of the ')}"
            hint = "leave it null to take the tokenizer's"
            raise ConfigError(
                Problem("model.vocab_size", message, model.vocab_size, f">= {vocab_size}", hint)
            )

    on = progressive.enabled
    fill("training.progressive.target_stacks", stacks_at_the_end(config), "model.architecture.n_stacks", on)
    program = program_of(config)
    if program not in ("by_hand", "end_to_end", "as_one"):
        grown = grows(config) and appends(config)
        reason = (
            "stacks that grew one by one are trained together at the end" if grown else f"under {program}"
        )
        fill("training.progressive.joint_tuning", tunes_jointly(config), reason)
    trains = {  # head, embedding; under cyclic auto stays: in their visits
        "append": ("always", "first"),
        "prepend": ("first", "first"),
        "grow": ("always", "always"),
        "independent": ("first", "first"),
    }
    if program == "independent":
        own = has_own_io(config)
        reason = "each stack is asked by itself" if own else "all stacks run behind one embedding"
        fill("training.progressive.independent_io", "own" if own else "shared", reason)
    if program in trains:
        fill("training.progressive.train_head", trains[program][0], f"under {program}")
        fill("training.progressive.train_embedding", trains[program][1], f"under {program}")
    deep = "4 from 8 blocks up" if growth_factor(config) == 4 else "what divides the stacks"
    fill("training.progressive.growth_factor", growth_factor(config), deep, program == "grow")
    rate = f"training.optimizer.lr is {optimizer.lr}"
    fill("training.optimizer.adam_lr", optimizer.lr, rate, optimizer.optimizer_type == "Muon")
    fill("training.new_stack_lr", optimizer.lr, rate, grows(config))
    fill("training.trunk_lr", optimizer.lr, rate, trains_the_trunk(config))
    fill(
        "training.progressive.cache_activations",
        False,
        "rows of a batch are as wide as its longest, and stored outputs have one width",
        config.data.bucketing and not config.data.packing,
    )
    fill("evaluation.batch_size", training.batch_size, "training.batch_size")
    fill("data.cache_dir", str(PurePath(config.checkpoint.dir) / ".data"), "inside checkpoint.dir")
    return config, derived


def _mask_token(config: StackWiseConfig, vocab_size: int, mask_id: int | None) -> tuple[int, str]:
    """Id of the mask token, and why; ConfigError where there is none and none may be added."""
    keys = config.objective
    if keys.mask_token_id is not None:
        return keys.mask_token_id, ""
    if mask_id is not None:
        return mask_id, f"of the tokenizer {config.data.tokenizer!r}"
    if not keys.add_mask_token:
        message = f"is false, but the tokenizer {config.data.tokenizer!r} has no mask token"
        hint = "set it to true, or name a token by objective.mask_token_id"
        raise ConfigError(Problem("objective.add_mask_token", message, False, "true", hint))
    return vocab_size, "a new token, which the tokenizer lacks"
