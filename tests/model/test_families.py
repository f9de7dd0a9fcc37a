"""The named sizes and families have the published numbers of parameters."""

from __future__ import annotations

import pytest
import torch

from stackwise.config.presets import preset_names
from stackwise.config.resolve import resolve
from stackwise.config.root import StackWiseConfig
from stackwise.model.describe import rack_spec
from stackwise.model.rack import Rack

# Of families: what Transformers' own classes of the same shapes count (each tensor once). Of sizes: with bytes as tokens.
PARAMETERS = {
    "nano": 755_840,
    "micro": 6_035_712,
    "small": 23_081_472,
    "medium": 75_916_032,
    "large": 266_397_696,
    "xl": 1_054_986_240,
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "nanogpt": 124_373_760,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "gemma3-1b": 999_885_952,
    "llada-8b": 8_015_581_184,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_404_352,  # and 14,848 offsets of the routers, which no gradient reaches
    "tiny-bert": 4_416_698,
    "bert-base": 109_514_298,
    "bert-large": 335_174_458,
    "modernbert-base": 149_655_232,
}
OTHERS = {"append-small", "demo", "diffusion-char", "shakespeare-char", "tiny-llama"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_family_has_the_published_number_of_parameters(name):
    config, _ = resolve(StackWiseConfig.from_yaml(name), vocab_size=259)
    with torch.device("meta"):
        rack = Rack(rack_spec(config))
    assert rack.get_parameter_count() == PARAMETERS[name]


def test_every_preset_is_a_family_or_a_run():
    assert set(preset_names()) == PARAMETERS.keys() | OTHERS
