"""What a run reads, by its configuration: the training stream, the held-out pass, and what names them."""

from __future__ import annotations

import math

import torch

from stackwise.config.objective_rules import masks
from stackwise.config.root import StackWiseConfig
from stackwise.data.corpus import Corpus
from stackwise.data.loader import EvalLoader, TokenLoader
from stackwise.objectives.base import Objective


def identity_of(
    config: StackWiseConfig, objective: Objective, corpus: Corpus, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """What the stored outputs of a trunk depend on besides the trunk; see `trunk.keys`."""
    data = config.data
    return {
        "tokenizer": corpus.tokenizer.hash,
        "data": corpus.hash,
        "rows": f"packing {data.packing}, documents apart {data.doc_mask}",
        "corruption": repr(objective) if masks(config) else objective.name,
        "compute": f"{dtype} on {device.type}".removeprefix("torch."),
    }


def make_loader(config: StackWiseConfig, corpus: Corpus) -> TokenLoader:
    """The training stream of a config."""
    training, data = config.training, config.data
    return TokenLoader(
        corpus.train,
        seq_len=training.seq_len,
        batch_size=training.batch_size,
        seed=training.seed,
        shuffle=data.shuffle,
        num_workers=data.num_workers,
        packing=data.packing,
        doc_mask=data.doc_mask,
        pad_id=corpus.tokenizer.pad_id,
        bucketing=data.bucketing,
    )


def make_eval_loader(config: StackWiseConfig, corpus: Corpus, batches: int | None = None) -> EvalLoader:
    """One pass over the held-out split (or `batches` batches spread over it)."""
    return EvalLoader(
        corpus.validation,
        seq_len=config.training.seq_len,
        batch_size=config.evaluation.batch_size or config.training.batch_size,
        packing=config.data.packing,
        doc_mask=config.data.doc_mask,
        pad_id=corpus.tokenizer.pad_id,
        batches=batches,
    )


def loader_steps(config: StackWiseConfig, loader: TokenLoader) -> int:
    """Optimizer steps of one pass over the data."""
    return math.ceil(loader.steps_per_epoch / config.training.gradient_accumulation_steps)
