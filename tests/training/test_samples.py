"""The texts that runs write while they train: by the settings of `generation`, as `stackwise generate` writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.config.objective_rules import writes_samples
from stackwise.config.resolve import resolve
from stackwise.data.tokenizers import CharTokenizer
from stackwise.inference.masked_text import infill
from stackwise.model.describe import rack_spec
from stackwise.model.modes import eval_mode
from stackwise.model.rack import Rack
from stackwise.objectives.denoiser import denoiser_of
from stackwise.training.run import train
from stackwise.training.samples import sample_text

TOKENIZER = CharTokenizer("abcdefgh \n", separated=True)
MASKED = {
    "model__attention_preset": "bert_style",
    "training__progressive__training_objective": "diffusion",
    "evaluation__passes": 1,
}
Make = Callable[..., Any]


def built(make: Make, **changes: Any) -> tuple[Rack, Any]:
    config, _ = resolve(make(**changes), vocab_size=TOKENIZER.vocab_size)
    rack = Rack(rack_spec(config), seed=torch.seed() % 2**31)
    with torch.no_grad():
        rack.head.matrix.normal_()  # as initialised, all tokens are nearly equally likely
    return rack, config


@pytest.mark.parametrize(
    "changes",
    [
        {"generation__max_new_tokens": 20, "training__progressive__enabled": False},
        # Longer than the context, which slides.
        {"generation__max_new_tokens": 150, "generation__steps": 8, "training__progressive__enabled": False},
        {
            "generation__max_new_tokens": 40,
            "generation__sampler": "threshold",
            "generation__threshold": 0.3,
            "generation__block_length": 7,
            "generation__temperature": 0.7,
            "generation__top_k": 5,
            "training__progressive__enabled": False,
        },
        {
            "generation__max_new_tokens": 30,
            "generation__sampler": "unroll",
            "training__progressive__building_mode": "independent",
        },
        {
            "generation__max_new_tokens": 30,
            "objective__target_shift": True,
            "training__progressive__enabled": False,
        },
    ],
)
@pytest.mark.parametrize("prompt", ["", "abba ", "a" * 70])
def test_masked_text_is_what_generate_writes(tiny: Make, changes: dict[str, Any], prompt: str) -> None:
    rack, config = built(tiny, **MASKED, **changes, tracking__sample_prompt=prompt, generation__seed=11)
    given, text = sample_text(rack, TOKENIZER, config)
    with eval_mode(rack):
        expected = infill(
            denoiser_of(rack, config, TOKENIZER.special_ids),
            TOKENIZER,
            prompt,
            config.generation,
            max_length=rack.spec.max_seq_len,
        )
    assert given == prompt
    assert prompt + text == expected.text
    assert len(text) == config.generation.max_new_tokens  # special tokens are banned


def test_masked_text_ends_before_a_stop_text(tiny: Make) -> None:
    rack, config = built(tiny, **MASKED, training__progressive__enabled=False, generation__max_new_tokens=60)
    _, whole = sample_text(rack, TOKENIZER, config)
    stop = whole[20:22]
    config.generation.stop = [stop]
    assert sample_text(rack, TOKENIZER, config)[1] == whole[: whole.index(stop)]


def samples_of(config: Any) -> list[tuple[int, int, str]]:
    events: list[dict[str, Any]] = []

    class Sink:
        def emit(self, event: dict[str, Any]) -> None:
            events.append(event)

        def close(self) -> None:
            pass

    train(config, sinks=[Sink()])
    return [(e["stage"], e["step"], e["text"]) for e in events if e["event"] == "sample"]


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, [0, 1, 2]),  # the whole rack at every share of noise, from its first stack on
        ({"building_mode": "independent"}, [2]),
        ({"building_mode": "prepend"}, [2]),
        ({"building_mode": "append", "time_interpretation": "depth"}, [2]),
        ({"building_mode": "prepend", "time_interpretation": "none"}, [0, 1, 2]),
        ({"training_objective": "mlm", "enabled": False}, []),
        ({"building_mode": "independent", "train_stacks": [2, 1]}, []),
    ],
)
def test_samples_come_with_the_stages_that_can_write(
    tiny: Make, tmp_path: Path, changes: dict[str, Any], stages: list[int]
) -> None:
    keys = {f"training__progressive__{key}": value for key, value in changes.items()}
    config = tiny(
        **{**MASKED, "training__progressive__joint_tuning": False, "training__max_steps": 2, **keys},
        tracking__sample_prompt="To be",
        generation__max_new_tokens=9,
    )
    found = samples_of(config)
    assert [stage for stage, _, _ in found] == stages
    assert writes_samples(config) == bool(stages)
    assert all(len(text) == 9 for _, _, text in found)
    written = tmp_path / "runs" / "tiny" / "sample.txt"
    assert written.exists() == bool(stages)
    if stages:
        assert written.read_text().startswith("To be" + found[-1][2])


def test_noise_on_embeddings_is_no_mask_to_fill(tiny: Make) -> None:
    config = tiny(**MASKED, training__progressive__enabled=False, objective__corruption="gaussian")
    assert not writes_samples(config)
    assert writes_samples(tiny())
