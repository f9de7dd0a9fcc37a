"""Keys of stored trunk outputs that do nothing are pointed out, and those that do something are not."""

from __future__ import annotations

import pytest

from stackwise import StackWiseConfig

KEYS = {"cache_dir": "there", "cache_max_bytes": 10, "cache_ram_bytes": 10, "cache_dtype": "fp8"}


def remarks(unit="stack", **progressive) -> set[str]:
    config = StackWiseConfig.from_dict(
        {"model": {"attention_preset": "gpt_style"}, "training": {"unit": unit, "progressive": {**KEYS, **progressive}}}
    )  # fmt: skip
    return {
        note.split(": ", 1)[0].removeprefix("training.progressive.")
        for note in config.notes()
        if "cache_" in note
    }


@pytest.mark.parametrize(
    "progressive",
    [{}, {"cache_activations": True}, {"trunk_strategy": "frozen"}, {"building_mode": "cyclic"}],
)
def test_keys_that_act_are_not_mentioned(progressive):
    assert remarks(**progressive) == set()


def test_without_stores_the_folder_is_only_for_mapped_weights():
    rest = {f"{key} has no effect" for key in KEYS if key != "cache_dir"}
    assert remarks(cache_activations=False) == {*rest, "cache_dir has no effect"}
    assert remarks(cache_activations=False, trunk_residency="mapped") == rest


@pytest.mark.parametrize(
    "progressive",
    [{"enabled": False}, {"building_mode": "prepend"}, {"target_stacks": 1}, {"trunk_strategy": "trainable"}],
)
def test_without_a_frozen_prefix_none_acts(progressive):
    found = remarks(cache_activations=True, **progressive)
    assert found == {f"{key} has no effect" for key in ("cache_activations", *KEYS)}
