"""Stages by hand with a precision and a choice about stored outputs of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from stackwise.checkpoint.store import Store
from stackwise.config.errors import ConfigError
from stackwise.curriculum.curricula import stages
from stackwise.training.loop import Engine
from stackwise.training.run import train

FIRST = {"train": ["all"], "max_steps": 2}
SECOND = {"train": ["new", "tail", "norm", "head"], "grow": {"op": "append"}, "max_steps": 4}
THIRD = {**SECOND, "max_steps": 2}


def run(tiny, *records, **changes) -> tuple[list[dict], list[bool]]:
    """The stacks as the last commit describes them, and for each stage whether it read stored outputs."""
    used: list[bool] = []
    finish = Engine._finish

    def watched(self: Engine, stage) -> None:
        assert self.setup is not None
        used.append(self.setup.prefix is not None)
        finish(self, stage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_finish", watched)
        result = train(tiny(training__stages=list(records), **changes), sinks=[])
    store = Store(Path(result["run_dir"]) / "store")
    return store.meta(store.commits()[-1])["rack"]["stacks"], used


def test_stacks_compute_and_freeze_in_the_precision_of_the_stage_in_which_they_join(tiny):
    listed = [{**FIRST, "precision": "nf4"}, {**SECOND, "precision": "bfloat16"}, THIRD]
    stacks, _ = run(tiny, *listed, training__progressive__new_stack_precision="full")
    assert [stack["compute_dtype"] for stack in stacks] == ["bfloat16", "bfloat16", "float32"]
    assert [stack["frozen_format"] for stack in stacks] == ["nf4", "bf16", "fp32"]
    assert [stack["weight_format"] for stack in stacks] == ["nf4", "bf16", "fp32"]


def test_trunk_precision_stores_them_all(tiny):
    listed = [{**FIRST, "precision": "full"}, {**SECOND, "precision": "bfloat16"}, THIRD]
    stacks, _ = run(tiny, *listed, training__progressive__trunk_precision="fp8")
    assert [stack["weight_format"] for stack in stacks] == ["fp8", "fp8", "fp32"]


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_a_stage_decides_about_its_own_store(tiny, tmp_path, everywhere, own):
    progressive = {"cache_activations": everywhere, "cache_dir": str(tmp_path / "cache")}
    keys = {f"training__progressive__{key}": value for key, value in progressive.items()}
    _, used = run(tiny, FIRST, {**SECOND, "cache": own}, THIRD, **keys)
    assert used == [False, own, everywhere]


def test_auto_is_the_reckoning_whatever_the_run_says(tiny, tmp_path):
    keys = {
        "training__progressive__cache_activations": False,
        "training__progressive__cache_dir": str(tmp_path / "cache"),
    }
    many = {**SECOND, "cache": "auto", "max_steps": 60, "seq_len": 64}  # 180 visits of about 50 samples
    once = {**SECOND, "cache": "auto", "max_steps": 2}
    assert run(tiny, FIRST, many, once, **keys)[1] == [False, True, False]


JOINED = {"train": ["stack:0", "stack:1"], "max_steps": 2}
FROZEN = {"train": ["stack:1", "norm", "head"], "max_steps": 2, "cache": True}


@pytest.mark.parametrize(
    ("records", "key", "message", "more"),
    [
        ([{**FIRST, "precision": "int3"}], "0.precision", "wrong value, got 'int3'", {}),
        ([{**FIRST, "precision": "fp4"}], "0.precision", "the 4-bit formats are nvfp4 and nf4", {}),
        ([{**FIRST, "cache": "always"}], "0.cache", "wrong value, got 'always'; allowed: auto, true, false, null", {}),
        ([FIRST, {"train": ["new"], "max_steps": 2, "precision": "nf4"}], "1.precision",
         "for stacks that join, and none does in this stage, got 'nf4'; remove it", {}),
        ([{**FIRST, "precision": "qlora"}], "0.precision", "training.progressive.qlora_enabled is false", {}),
        ([{**FIRST, "cache": True}], "0.cache", "the embedding trains, so there is no frozen prefix", {}),
        ([{**JOINED, "n_stacks": 2, "cache": True}], "0.cache", "stack:s0 trains, which is next to the embedding", {}),
        ([FIRST, {**SECOND, "train": ["all"], "cache": True}], "1.cache",
         "the embedding trains, to which the head is tied", {"model__tie_embeddings": True}),
        ([FIRST, {**SECOND, "train": ["new", "lora:stack"], "cache": True}], "1.cache",
         "adapters train in stack:s0", {"training__progressive__qlora_enabled": True}),
        ([{**FIRST, "n_stacks": 2}, {"train": ["stack:0"], "alone": 0, "max_steps": 1, "cache": True}], "1.cache",
         "stack:s0 trains, which is next to", {}),
    ],
)  # fmt: skip
def test_what_a_stage_cannot_have_is_refused_with_the_reason(tiny, records, key, message, more):
    with pytest.raises(ConfigError) as caught:
        tiny(model__vocab_size=31, training__stages=records, **more)
    assert [problem.key for problem in caught.value.problems] == [f"training.stages.{key}"]
    assert message in str(caught.value)


def test_what_it_may_have_is_not(tiny):
    listed = stages(tiny(model__vocab_size=31, training__stages=[FIRST, SECOND, {**FROZEN, "cache": "auto"}]))
    assert listed[2].cache == "auto"
    assert stages(tiny(model__vocab_size=31, training__stages=[FIRST, SECOND, FROZEN]))[2].cache is True


def test_a_precision_that_the_cpu_lacks_is_refused_before_anything_runs(tiny):
    from stackwise import plan

    config = tiny(training__stages=[FIRST, {**SECOND, "precision": "half"}])
    for work in (train, plan):
        with pytest.raises(ConfigError, match=r"training.stages.1.precision: cannot be used on a CPU"):
            work(config)
