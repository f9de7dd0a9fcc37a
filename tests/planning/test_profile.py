"""A profile is what a run does: its bytes are those planned, its parts add up, and it leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import random
import tempfile

import pytest
import torch

from stackwise import ConfigError, StackWiseConfig
from stackwise.planning import profile as profiling
from stackwise.planning.plan import plan
from stackwise.planning.profile import PARTS, _Profiled, profile
from stackwise.planning.profile_page import write_profile
from stackwise.training.errors import OutOfMemory


def config(folder, **changes) -> StackWiseConfig:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 60)
    found = StackWiseConfig.from_dict(
        {
            "model": {
                "d_model": 32,
                "n_heads": 2,
                "max_seq_len": 32,
                "architecture": {"n_stacks": 3, "blocks_per_stack": 2},
            },
            "training": {
                "run_id": "tiny",
                "device": "cpu",
                "batch_size": 4,
                "seq_len": 32,
                "max_steps": 3,
                "dtype": "float32",
            },
            "data": {"source": "text", "path": str(folder / "text.txt"), "tokenizer": "char"},
            "checkpoint": {"dir": str(folder / "runs")},
        }
    )
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        at = found
        for part in section.split("__"):
            at = getattr(at, part)
        setattr(at, name, value)
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The temporary files of its own, because other processes may be at a profile too."""
    folder, temporary = tmp_path_factory.mktemp("profile"), tmp_path_factory.mktemp("temporary")
    chosen = config(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        found = profile(chosen, 1, steps=2)
    return chosen, folder, temporary, found


def test_bytes_are_those_that_were_planned(measured):
    chosen, _, _, found = measured
    planned = plan(chosen).stages[1]
    assert (found.name, found.stage, found.stages) == (planned.name, 1, 4)
    for item in ("parameters", "gradients", "moments", "buffers"):
        assert found.measured[item] == found.planned[item] == planned.bytes[item]
    assert found.measured["activations"] == pytest.approx(planned.bytes["activations"], rel=0.05)
    assert found.planned["alive"] == planned.peak_bytes
    assert found.measured["alive"] == pytest.approx(planned.peak_bytes, rel=0.05)


def test_the_line_of_bytes_agrees_with_what_the_run_counts(measured):
    _, _, _, found = measured
    assert found.line is not None
    most = found.line.most
    assert most["weights"] == found.measured["parameters"]
    assert most["moments"] == found.measured["moments"]
    assert most["gradients"] == found.measured["gradients"]
    assert most["activations"] == pytest.approx(found.measured["activations"], rel=0.05)
    assert [name for _, name in found.line.parts][:5] == ["start", "data", "forward", "backward", "optimizer"]


def test_parts_and_rates_add_up(measured):
    chosen, _, _, found = measured
    assert set(found.parts) == set(PARTS)
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert min(found.parts[name] for name in ("data", "forward", "backward", "optimizer")) > 0
    planned = plan(chosen).stages[1]
    assert found.tokens == 4 * 32
    assert found.flops == pytest.approx(planned.flops / planned.steps)
    assert found.tokens_per_s * found.seconds == pytest.approx(128)
    shares = [row.share for row in found.operators]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1.0)
    assert "aten::mm" in {row.name for row in found.operators[:12]}
    assert not [row.name for row in found.operators if row.name.startswith("part: ")]


def test_time_belongs_to_the_part_in_which_it_passed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now[0])

    class Steps:
        device, listener = torch.device("cpu"), None

        def step(self, stage):
            passes = [("forward", 2.0), ("backward", 3.0)] * 2
            for part, seconds in (("data", 1.0), *passes, ("optimizer", 4.0)):
                self.listener(part)
                now[0] += seconds

    seconds, parts, allocated = profiling._timed(Steps(), None, 3)
    assert (seconds, allocated) == (15.0, None)
    assert parts == {"data": 1.0, "forward": 4.0, "backward": 6.0, "optimizer": 4.0, "other": 0.0}


def test_the_trace_holds_the_parts_of_the_step(measured):
    _, _, _, found = measured
    events = json.loads(gzip.decompress(found.trace))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"part: forward", "part: backward", "part: optimizer", "aten::mm"} <= names


def test_nothing_of_the_run_is_left_behind(measured):
    _, folder, temporary, _ = measured
    assert sorted(path.name for path in folder.iterdir()) == ["runs", "text.txt"]
    assert [path.name for path in (folder / "runs").iterdir()] == [".data"]
    assert list(temporary.iterdir()) == []


def test_the_files_say_what_was_found(measured, tmp_path):
    _, _, _, found = measured
    for _ in range(2):  # a second time they are replaced
        page = write_profile(found, tmp_path / "out")
    names = {path.name for path in page.parent.iterdir()}
    assert names == {"profile.html", "bytes.png", "profile.json", "trace.json.gz"}
    told = json.loads((page.parent / "profile.json").read_text())
    assert told["measured"] == found.measured
    assert told["at_peak"] == found.line.peak[1]
    text = page.read_text()
    assert "<svg" in text
    assert "aten::mm" in text
    assert "http" not in text.replace("http://www.w3.org", "")


def test_the_largest_stage_is_taken_where_none_is_named(tmp_path):
    said: list[str] = []
    chosen = config(tmp_path)
    found = profile(chosen, steps=1, say=said.append)
    laid_out = plan(chosen)
    assert found.name == laid_out.largest.name == "joint"
    assert [line for line in said if line.startswith("one step of stage")] == [
        f"one step of stage {n}, stack {n}, so that the rack grows" for n in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"training__gradient_checkpointing": True, "training__gradient_accumulation_steps": 2},
        {"training__progressive__trunk_residency": "streamed", "training__optimizer__state_device": "host"},
        {"training__residency": "streamed", "training__optimizer__optimizer_type": "Muon"},
        {
            "training__progressive__training_objective": "mlm",
            "training__progressive__cache_activations": True,
        },
    ],
    ids=str,
)
def test_any_kind_of_run_can_be_profiled(tmp_path, changes):
    found = profile(config(tmp_path, **changes), random.choice([1, 2]), steps=1)
    for item in ("parameters", "gradients", "moments", "host"):
        assert found.measured[item] == found.planned[item], item
    assert found.measured["alive"] == pytest.approx(found.planned["alive"], rel=0.07)
    assert found.line.most["weights"] == found.measured["parameters"]


@pytest.mark.parametrize("memory", ["int8", "int8_nomaster", "fused"])
@pytest.mark.parametrize("kind", ["AdamW", "Muon"])
def test_what_an_update_takes_was_planned(tmp_path, kind, memory):
    changes = {"training__optimizer__optimizer_type": kind, "training__optimizer__memory": memory}
    found = profile(config(tmp_path, model__d_model=128, training__max_grad_norm=0, **changes), 1, steps=1)
    assert found.measured["alive"] == pytest.approx(found.planned["alive"], rel=0.03)


@pytest.mark.parametrize("stage", [-1, 4, 99])
def test_a_stage_that_is_not_there_is_refused_with_those_that_are(tmp_path, stage):
    with pytest.raises(
        ConfigError, match=r"--stage.*no such stage.*1 stack 1, 2 stack 2, 3 stack 3, 4 joint"
    ):
        profile(config(tmp_path), stage)


def test_memory_that_runs_out_is_explained_as_in_a_run(tmp_path, monkeypatch):
    def full(self, stage):
        self.doing = "the forward pass"
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(_Profiled, "step", full)
    with pytest.raises(OutOfMemory, match=r"out of memory in the forward pass .* Set training.batch_size=2"):
        profile(config(tmp_path), 0)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".data"]
