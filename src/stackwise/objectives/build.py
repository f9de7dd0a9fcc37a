"""The objective that a configuration describes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stackwise.config.objective_rules import corruption_of, time_of
from stackwise.objectives.base import Objective
from stackwise.objectives.causal import CausalLM
from stackwise.objectives.custom import Custom, load_function
from stackwise.objectives.diffusion import Diffusion
from stackwise.objectives.masked import MaskedLM, Vocabulary
from stackwise.objectives.schedules import NoiseSchedule

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig


def objective_of(config: StackWiseConfig, special_ids: Sequence[int] = ()) -> Objective:
    """The objective of a resolved configuration. `special_ids`: those of the tokenizer."""
    keys, progressive = config.objective, config.training.progressive
    name = progressive.training_objective
    if name == "clm":
        return CausalLM(keys.z_loss)
    if name == "custom":
        function = None if keys.loss_fn is None else load_function(keys.loss_fn)
        return Custom(
            function, causal=config.model.attention["attention_mode"] == "causal", z_loss=keys.z_loss
        )
    assert config.model.vocab_size is not None
    assert keys.mask_token_id is not None, "resolve() fills it"
    schedule = NoiseSchedule(keys.noise_schedule, keys.noise_power, keys.noise_table)
    told = time_of(config) == "input"
    common: dict[str, Any] = {
        "vocabulary": Vocabulary(config.model.vocab_size, keys.mask_token_id, tuple(special_ids)),
        "seed": config.training.seed,
        "corruption": corruption_of(config),
        "predict": keys.predict,
        "bert": (keys.mask_prob, keys.random_prob, keys.keep_prob),
        "draws": keys.mask_draws,
        "nested": keys.nested_masks,
        "z_loss": keys.z_loss,
        "shifted": keys.target_shift,
        "schedule": schedule,
        "t_sampling": keys.t_sampling,
        "tells_time": told,
        "one_time": told and progressive.time_sampling == "batch",
        "length_fraction": keys.random_length_fraction,
    }
    if name == "mlm":
        return MaskedLM(**common, fraction=keys.mask_fraction)
    clip = (keys.clip[0], keys.clip[1])
    return Diffusion(**common, form=keys.form, weighting=keys.weight, clip=clip, t_eps=keys.t_eps)
