"""Rules of embedding and head: which of their keys go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stackwise.config.errors import Problem
from stackwise.config.rules import appends, rule

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


def ties(config: StackWiseConfig) -> bool:
    """`tie_embeddings`; null: untied when stacks are appended, so that the head can train at every stage."""
    tied = config.model.tie_embeddings
    return not appends(config) if tied is None else tied


@rule("model.head_rank", "model.tie_embeddings")
def a_tied_head_has_no_rank_of_its_own(config: StackWiseConfig) -> Problem | None:
    if config.model.head_rank is None or not ties(config):
        return None
    message = "is the rank of a head of its own, and this one is tied to the embedding"
    hint = "set model.tie_embeddings=false, or model.embedding_width instead"
    return Problem("model.head_rank", message, config.model.head_rank, "null", hint)


def _no_tied_adapter(config: StackWiseConfig) -> bool:
    model = config.model
    of_its_own = model.embedding_width in (None, model.d_model) and _fresh(config)
    return not ties(config) or (of_its_own and model.tokenizer_embedding.adapter_hidden_dim is None)


@rule("model.tie_adapter", "model.tokenizer_embedding.adapter_hidden_dim", "model.tie_embeddings")
def an_mlp_has_no_transpose(config: StackWiseConfig) -> Problem | None:
    model = config.model
    hidden = model.tokenizer_embedding.adapter_hidden_dim
    if model.tie_adapter != "transpose" or hidden is None or not ties(config):
        return None
    message = "cannot be the transpose of an MLP"
    hint = "set model.tokenizer_embedding.adapter_hidden_dim=null"
    return Problem("model.tie_adapter", message, "transpose", "linear", hint)


def _fresh(config: StackWiseConfig) -> bool:
    return config.model.tokenizer_embedding.family is None


INERT: list[tuple[str, Callable[[StackWiseConfig], bool], str]] = [
    (
        "model.tie_adapter",
        _no_tied_adapter,
        "the head is not tied to a table of another width",
    ),
    *(
        (f"model.tokenizer_embedding.{name}", _fresh, "the embedding's table is a fresh one")
        for name in ("embedding_option", "freeze_embeddings")
    ),
]
