"""`stackwise plan`: devices, budgets, comparison, shapes, and what it refuses."""

from __future__ import annotations

import json

ONE = ("training.progressive.enabled=false", "model.architecture.n_stacks=1", "model.vocab_size=40")


def test_memory_is_shown_by_item_on_a_named_device(cli, folder):
    result = cli("plan", "tiny.yaml", *ONE, "--device", "h200", "--rate", "100")
    assert result.code == 0
    assert "in float32 at 100 TFLOP/s (given)" in " ".join(result.out.split())
    for piece in ("Memory by item", "weights fp32", "activations", "embedding, head", "of h200: yes"):
        assert piece in " ".join(result.out.split()), piece


def test_a_run_that_does_not_fit_gets_advice_that_does(cli, folder):
    told = json.loads(cli("plan", "tiny.yaml", *ONE, "--json").out)
    budget = 0.8 * told["peak_bytes"] / 2**30
    result = cli("plan", "tiny.yaml", *ONE, "--budget-gib", str(budget))
    assert result.code == 0
    assert "Does not fit" in result.out
    line = next(line for line in result.out.splitlines() if line.startswith("  training.") and "B, " in line)
    keys = [piece for piece in line.split() if "=" in piece]
    again = json.loads(cli("plan", "tiny.yaml", *ONE, *keys, "--budget-gib", str(budget), "--json").out)
    assert again["fits"] != "no"
    assert "advice" not in again


def test_a_mixture_of_experts_says_what_a_token_meets(cli, folder):
    moe = (
        "model.d_model=16",
        "model.moe.n_experts=4",
        "model.moe.top_k=1",
        "model.moe.d_ff=24",
        "model.ffn_type=swiglu",
    )
    stage = json.loads(cli("plan", "tiny.yaml", *ONE, *moe, "--json").out)["stages"][-1]
    idle = 3 * (3 * 16 * 24)  # three of four experts, each of three matrices
    assert stage["parameters"] - stage["active_parameters"] == stage["total_blocks"] * idle
    assert "Experts: a token meets" in cli("plan", "tiny.yaml", *ONE, *moe).out
    assert "Experts:" not in cli("plan", "tiny.yaml", *ONE).out


def test_curricula_are_compared(cli, folder):
    changes = ("model.vocab_size=40", "training.progressive.joint_tuning=false", "--compare")
    result = cli("plan", "tiny.yaml", *changes)
    assert result.code == 0
    for name in ("end to end", "append, trunk streamed", "prepend", "grow", "cyclic", "independent"):
        assert name in result.out
    assert "The cheapest that fits cpu: " in result.out
    rows = json.loads(cli("plan", "tiny.yaml", *changes, "--json").out)["comparison"]["rows"]
    shares = {row["name"]: row["trained_share"] for row in rows}
    assert shares["end to end"] == 1
    assert shares["append"] == shares["independent"] == 0.5


def test_a_shape_is_laid_out_without_a_config(cli, folder):
    result = cli("plan", "--shape", "70b", "--device", "h200")
    assert result.code == 0
    lines = {
        line.split(" at ")[0].strip(): line.split() for line in result.out.splitlines() if " at " in line
    }
    assert lines["append, nf4 trunk 76, 4 layers"][-7:] == ["33.5", "54.8", "4.7", "6.1", "-", "106", "yes"]
    assert "84 M tokens a day" in result.out
    assert json.loads(cli("plan", "--shape", "70b", "--json").out)["rate"] == 400e12


def test_wrong_names_and_numbers_are_refused(cli, folder):
    wrong = {
        ("tiny.yaml", "--device", "rtx490"): "did you mean 'rtx4090'?",
        ("tiny.yaml", "--budget-gib", "0"): "above 0",
        ("tiny.yaml", "--rate", "-1"): "above 0",
        ("--shape", "71b"): "did you mean '70b'?",
        ("tiny.yaml", "--shape", "70b"): "takes no CONFIG",
        (): "CONFIG is missing",
    }
    for arguments, message in wrong.items():
        result = cli("plan", *arguments)
        assert result.code == 2, arguments
        assert message in result.err, arguments
