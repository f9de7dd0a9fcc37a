"""`stackwise eval RUN --tasks ...`: zero-shot and few-shot scores."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackwise.cli.errors import UsageError
from stackwise.cli.output import note, print_json, print_table, progress_bar
from stackwise.config.document import parse
from stackwise.config.errors import ConfigError, did_you_mean
from stackwise.data.files import file_sha256
from stackwise.evaluation.likelihood import scorer_of
from stackwise.evaluation.record import finite, keep, make_ready, record_of
from stackwise.evaluation.tasks import limited, names_of, read_task, with_shots
from stackwise.evaluation.zero_shot import Metric, TaskResult, Write, run_task
from stackwise.inference.masked_text import infill
from stackwise.inference.settings import GenerationSettings
from stackwise.inference.text import complete
from stackwise.model.modes import eval_mode
from stackwise.objectives.denoiser import denoiser_of
from stackwise.training.device import pick_device
from stackwise.training.stored import OpenRun

MC_SAMPLES = 16


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
    """Score a run on tasks, print the figures, and with `out` keep them in a file there, task by task.

    All tasks are read before one is scored. Ctrl-C prints those that are finished, and is raised again.
    """
    files, described, names = _sorted(listed)
    rack = opened.rack.to(pick_device("auto"))
    samples = mc_samples or MC_SAMPLES
    scorer = scorer_of(rack, opened.config, opened.tokenizer, batch_size=batch_size, mc_samples=samples)
    if mc_samples is not None and scorer.label != "bound":
        raise UsageError(
            f"--mc-samples is for runs whose loss is a bound, and that of this run is {scorer.label}"
        )
    tasks = [limited(with_shots(read_task(file), shots or 0), limit) for file in files]
    names_of(tasks)
    asked: list[str | dict[str, Any]] = [*names, *(_description(file) for file in described)]
    if asked:
        from stackwise.evaluation.harness import VERSION, NativeModel, known_tasks, run_named

        manager = known_tasks(asked)
    if out is not None:
        make_ready(out)
    write = writer_of(opened)
    protocol = {
        "kind": "tasks",
        "likelihood": scorer.label,
        "start_token": scorer.start,
        "mc_samples": samples if scorer.label == "bound" else None,
        "limit": limit,
        "dtype": "float32",
        "generation": "greedy" if rack.is_causal else {"greedy": True, **_sampler(opened.config.generation)},
    }
    found = record_of(path, opened, protocol)
    found["tasks"] = {}
    hashes = {file: file_sha256(Path(file)) for file in described}
    question = [
        sorted((task.name, task.hash) for task in tasks),
        [*names, *hashes.values(), shots] if asked else [],
    ]
    results: list[TaskResult] = []
    kept: Path | None = None
    stopped = False
    with progress_bar() as bar:
        try:
            for task in tasks:
                result = run_task(task, scorer, opened.tokenizer, write, progress=bar(task.name))
                results.append(result)
                found["tasks"][task.name] = result.to_dict()
                kept = out and keep(out, found, question)
            if asked:
                model = NativeModel(
                    scorer, opened.tokenizer, write, rack.spec.max_seq_len, progress=bar("lm-eval")
                )
                found["lm_eval"] = run_named(model, asked, manager, shots=shots, limit=limit)
                found["lm_eval_files"] = hashes
                found["versions"]["lm_eval"] = VERSION
                kept = out and keep(out, found, question)
        except KeyboardInterrupt:
            stopped = True
    if stopped:
        note(f"stopped; {len(results)} of {len(tasks) + len(asked)} tasks are finished")
    if kept:
        note(f"the figures are in {kept}")
    if as_json:
        print_json(finite(found))
    elif results or "lm_eval" in found:
        _print(path, opened, scorer.label, results, found.get("lm_eval", {}))
    if stopped:
        raise KeyboardInterrupt


def _sorted(listed: str) -> tuple[list[str], list[str], list[str]]:
    """The words of --tasks: files of rows, descriptions in lm-eval's YAML, and names of its tasks."""
    words = [word.strip() for word in listed.split(",") if word.strip()]
    if not words:
        raise UsageError(
            "--tasks names no task; give it files, or names of lm-eval's tasks, with commas between"
        )
    for word, count in Counter(words).items():
        if count > 1:
            raise UsageError(f"--tasks names {word} twice")
    described = [word for word in words if word.endswith((".yaml", ".yml"))]
    files = [word for word in words if Path(word).is_file() and word not in described]
    names = [word for word in words if word not in (*files, *described)]
    for name in (*described, *names):
        path = Path(name)
        of_file = name in described or "/" in name or name.endswith((".jsonl", ".json"))
        if of_file and path.is_dir():
            raise UsageError(f"{name} is a folder; name the files in it ({_task_files(path)})")
        if of_file and not path.is_file():
            raise UsageError(f"there is no task file {name}; {_task_files(path.parent, path.name)}")
    if (names or described) and importlib.util.find_spec("lm_eval") is None:
        first = [*names, *described][0]
        here = "" if described else f"; {_task_files(Path(), first)}"
        raise UsageError(
            f"{', '.join([*names, *described])}: not a file of task rows, and tasks by name or by YAML are those of "
            f"lm-eval, which is not installed: pip install 'stackwise[eval]', or name a local task file{here}"
        )
    return files, described, names


def _task_files(folder: Path, name: str = "") -> str:
    """The task files of a folder, or the one whose name is nearest."""
    known = sorted(path.name for path in folder.glob("*.jsonl")) if folder.is_dir() else []
    shown = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
    return did_you_mean(name, known) or (f"task files there: {shown}" if known else "no *.jsonl is there")


def _description(file: str) -> dict[str, Any]:
    """A task in lm-eval's YAML. Read as data alone: a tag that would run code is refused."""
    document = parse(Path(file).read_text("utf-8"), file)
    if document.problems:
        raise ConfigError(document.problems)
    if not isinstance(document.data.get("task"), str):
        raise UsageError(f"{file} describes no task of lm-eval: the key task, its name, is missing")
    return document.data


def _sampler(settings: GenerationSettings) -> dict[str, Any]:
    """What decides how masked positions are filled."""
    names = ("sampler", "steps", "grid", "block_length", "threshold", "seed")
    return {name: getattr(settings, name) for name in names}


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
