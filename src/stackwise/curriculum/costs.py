"""What stages cost, on descriptions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stackwise.config.objective_rules import scored_share
from stackwise.curriculum.specs import first_spec, stage_specs
from stackwise.curriculum.split import trained_units
from stackwise.curriculum.stage import Stage
from stackwise.model.flops import step_flops
from stackwise.model.spec import RackSpec

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


def with_vocabulary(config: StackWiseConfig) -> StackWiseConfig:
    """The config with a vocabulary: where that is not known yet, of 2 tokens."""
    if config.model.vocab_size is not None:
        return config
    fresh = config.model.tokenizer_embedding.model_copy(update={"family": None})
    model = config.model.model_copy(update={"vocab_size": 2, "tokenizer_embedding": fresh})
    return config.model_copy(update={"model": model})


def stage_tokens(config: StackWiseConfig, stage: Stage) -> int:
    """Tokens of one optimizer step."""
    training = config.training
    rows = (stage.batch_size or training.batch_size) * training.gradient_accumulation_steps
    return rows * (stage.seq_len or training.seq_len)


def flops_per_token(config: StackWiseConfig, stage: Stage, spec: RackSpec) -> float:
    """FLOP of one training step per token, every frozen block computed. `spec`: the rack that the stage trains."""
    return step_flops(
        spec,
        trained_units(spec, stage),
        stage.seq_len or config.training.seq_len,
        recompute=config.training.gradient_checkpointing,
        alone=stage.alone,
        scored=scored_share(config, stage.noise),
    )


def stage_flops(config: StackWiseConfig, stages: list[Stage], start: RackSpec | None = None) -> list[float]:
    """FLOP of every stage. `start`: the rack that the first one finds; null: the config's."""
    config = with_vocabulary(config)
    specs = stage_specs(config, stages, start or first_spec(config, stages), "fp32")
    return [
        stage.steps * stage_tokens(config, stage) * flops_per_token(config, stage, spec)
        for stage, spec in zip(stages, specs, strict=True)
    ]
