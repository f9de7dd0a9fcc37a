"""`stackwise eval RUN --tasks ...`: zero-shot and few-shot scores."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackwise.cli.errors import UsageError
from stackwise.cli.output import note, print_json, print_table
from stackwise.config.document import parse
from stackwise.config.errors import ConfigError
from stackwise.evaluation.likelihood import scorer_of
from stackwise.evaluation.record import keep, record_of
from stackwise.evaluation.tasks import limited, names_of, read_task, with_shots
from stackwise.evaluation.zero_shot import Metric, TaskResult, Write, run_task
from stackwise.inference.masked_text import infill
from stackwise.inference.settings import GenerationSettings
from stackwise.inference.text import complete
from stackwise.model.modes import eval_mode
from stackwise.objectives.denoiser import denoiser_of
from stackwise.training.device import pick_device
from stackwise.training.stored import OpenRun


def evaluate_tasks(
    path: Path,
    opened: OpenRun,
    listed: str,
    *,
    limit: int | None,
    shots: int | None,
    mc_samples: int | None,
    batch_size: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Score a run on tasks, print the figures, and with `out` keep them in a file there."""
    words = [word.strip() for word in listed.split(",") if word.strip()]
    if not words:
        raise UsageError(
            "--tasks names no task; give it files, or names of lm-eval's tasks, with commas between"
        )
    described = [word for word in words if word.endswith((".yaml", ".yml"))]
    files = [word for word in words if Path(word).is_file() and word not in described]
    names = [word for word in words if word not in files]
    for name in names:
        if (name in described or "/" in name or name.endswith((".jsonl", ".json"))) and not Path(
            name
        ).is_file():
            raise UsageError(f"there is no task file {name}; check the spelling")
    if names and importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            f"{', '.join(names)}: not a file of task rows, and tasks by name or by YAML are those of lm-eval, which is "
            "not installed: pip install 'stackwise[eval]', or name a local task file"
        )
    rack = opened.rack.to(pick_device("auto"))
    scorer = scorer_of(
        rack, opened.config, opened.tokenizer, batch_size=batch_size, mc_samples=mc_samples or 16
    )
    if mc_samples is not None and scorer.label != "bound":
        raise UsageError(
            f"--mc-samples is for runs whose loss is a bound, and that of this run is {scorer.label}"
        )
    tasks = [limited(with_shots(read_task(file), shots or 0), limit) for file in files]
    names_of(tasks)
    write = writer_of(opened)
    results = [run_task(task, scorer, opened.tokenizer, write) for task in tasks]
    protocol = {
        "kind": "tasks",
        "likelihood": scorer.label,
        "start_token": scorer.start,
        "mc_samples": (mc_samples or 16) if scorer.label == "bound" else None,
        "limit": limit,
        "dtype": "float32",
        "generation": "greedy",
    }
    found = record_of(path, opened, protocol)
    found["tasks"] = {result.task: result.to_dict() for result in results}
    if names:
        from stackwise.evaluation.harness import VERSION, NativeModel, run_named

        model = NativeModel(scorer, opened.tokenizer, write, rack.spec.max_seq_len)
        asked = [_description(name) if name in described else name for name in names]
        found["lm_eval"] = run_named(model, asked, shots=shots, limit=limit)
        found["versions"]["lm_eval"] = VERSION
    if out is not None:
        question = [
            sorted((name, task["task_hash"]) for name, task in found["tasks"].items()),
            sorted((name, task["shots"]) for name, task in found.get("lm_eval", {}).items()),
        ]
        note(f"the figures are in {keep(out, found, question)}")
    if as_json:
        print_json(found)
        return
    _print(path, opened, scorer.label, results, found.get("lm_eval", {}))


def _description(file: str) -> dict[str, Any]:
    """A task in lm-eval's YAML. Read as data alone: a tag that would run code is refused."""
    document = parse(Path(file).read_text("utf-8"), file)
    if document.problems:
        raise ConfigError(document.problems)
    if not isinstance(document.data.get("task"), str):
        raise UsageError(f"{file} describes no task of lm-eval: the key task, its name, is missing")
    return document.data


def writer_of(opened: OpenRun) -> Write:
    """Greedy continuation by the model of a run, token by token or by filling masked positions."""
    rack, tokenizer = opened.rack, opened.tokenizer

    def write(prompt: str, until: Sequence[str], max_new_tokens: int) -> str:
        settings = opened.config.generation.model_copy(deep=True)
        settings.max_new_tokens, settings.stop = max_new_tokens, list(until)
        if rack.is_causal:
            greedy = GenerationSettings(temperature=0.0, max_new_tokens=max_new_tokens, stop=list(until))
            return complete(rack, tokenizer, prompt, greedy).text
        settings.temperature, settings.top_k, settings.top_p = 0.0, 0, 1.0
        denoiser = denoiser_of(rack, opened.config, tokenizer.special_ids)
        with eval_mode(rack):
            done = infill(
                denoiser, tokenizer, prompt, settings, max_length=rack.spec.max_seq_len, device=rack.device
            )
        return "".join(piece.text for piece in done.pieces if piece.kind == "filled")

    return write


def _print(path: Path, opened: OpenRun, label: str, results: list[TaskResult], named: dict[str, Any]) -> None:
    def shown(metric: Metric) -> str:
        error = "" if metric.standard_error is None else f" ± {metric.standard_error:.4f}"
        return f"{metric.value:.4f}{error}"

    rows = [
        (
            result.task,
            f"{result.n:,}",
            f"{result.shots}",
            name,
            shown(metric),
            "–" if result.chance is None or name not in ("acc", "acc_norm") else f"{result.chance:.4f}",
        )
        for result in results
        for name, metric in result.metrics.items()
    ]
    rows += [
        (
            task,
            f"{facts['n'] or '–'}",
            f"{facts['shots'] or 0}",
            name,
            shown(Metric(value, facts["standard_errors"].get(name))),
            "–",
        )
        for task, facts in named.items()
        for name, value in facts["metrics"].items()
    ]
    print_table(
        f"{path}, step {opened.commit.step:,}",
        ["task", "rows", "shots", "text:metric", "value", "chance"],
        rows,
        caption=f"likelihoods: {label}",
    )
    for result in results:
        if result.cut:
            note(
                f"{result.task}: {result.cut} of {result.n} prompts lost their beginning, to fit into max_seq_len"
            )
