"""How much the frontier trains: base configs, seeds and budgets of the full and the quick form."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from frontier_budget import Keys
from frontier_run import Corpus

TRIALS = (0.5, 1.0, 2.0)
"""Every variant had these trials, as factors on both learning rates of the base, on a seed of their own (`--tune`)."""

RATES: dict[str, dict[str, float]] = {"depth": {}, "text": {}}
"""The factor that served a variant best in its trials, where that is not 1."""


@dataclass(frozen=True)
class Setting:
    """A corpus, the model trained on it, and end to end's budget in optimizer steps."""

    corpus: Corpus
    base: Keys
    steps: int
    equal_tokens: bool = True

    @property
    def stacks(self) -> int:
        return int(self.base["model.architecture.n_stacks"])


@dataclass(frozen=True)
class Scale:
    """`depths`, `sweep_width`: the rows of the depth sweep. `cache_stacks`, `cache_steps`: the cascade's measurement."""

    name: str
    seeds: tuple[int, ...]
    depth: Setting
    text_steps: int
    depths: tuple[int, ...]
    cache_stacks: int
    cache_steps: int
    cache_rows: int


MODEL: Keys = {
    "model.d_model": 64,
    "model.n_heads": 2,
    "model.d_ff": 128,
    "model.max_seq_len": 64,
    "model.architecture.n_stacks": 8,
    "model.architecture.blocks_per_stack": 1,
    "model.qk_norm": True,
    "model.embedding_norm": True,
    "model.norm_eps": 1e-6,
    "model.rope_theta": 200.0,
    "model.zero_init_outputs": True,
    "model.tie_embeddings": False,
    "training.seq_len": 64,
    "training.batch_size": 16,
    "training.warmup_steps": 50,
    "training.lr_schedule": "linear",
    "training.min_lr_ratio": 0.0,
    "training.max_grad_norm": 0.0,
    "training.device": "cpu",
    "training.optimizer.optimizer_type": "Muon",
    "training.optimizer.lr": 0.02,
    "training.optimizer.adam_lr": 0.01,
    "training.optimizer.momentum": 0.95,
    "training.optimizer.weight_decay": 0.03,
    "tracking.log_interval": 50,
}
"""The recipe of the preset shakespeare-char, narrower and deeper. No short convolutions: they are a depth of their own."""

DEPTH: Keys = {**MODEL, "model.vocab_size": 16}
TEXT: Keys = {**MODEL, "model.vocab_size": 65, "model.d_ff": 176, "model.short_conv": 3}

FULL = Scale(
    name="full",
    seeds=(1, 2, 3),
    depth=Setting(Corpus("depth", rows=10240, held_out=512), DEPTH, steps=1000),
    text_steps=400,
    depths=(4, 8, 16, 32),
    cache_stacks=16,
    cache_steps=96,
    cache_rows=512,
)
QUICK = Scale(
    name="quick",
    seeds=(1,),
    depth=Setting(Corpus("depth", rows=4096, held_out=256), DEPTH, steps=250, equal_tokens=False),
    text_steps=120,
    depths=(4, 8, 16, 32),
    cache_stacks=16,
    cache_steps=16,
    cache_rows=128,
)


def settings_of(scale: Scale, text: Path | None) -> list[Setting]:
    """The corpora of a run: the language always, the text where there is one."""
    listed = [scale.depth]
    if text is not None:
        corpus = Corpus("text", path=str(text), sha256=hashlib.sha256(text.read_bytes()).hexdigest())
        listed.append(Setting(corpus, TEXT, scale.text_steps, scale.depth.equal_tokens))
    return listed
