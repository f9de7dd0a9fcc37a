"""``report.html``: one page about one run, from its folder alone.

The page needs nothing besides itself: no network, no script. The same folder gives the same bytes.
"""

from __future__ import annotations

import json
import warnings
from datetime import UTC, datetime
from html import escape
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stackwise.config.document import dump, parse
from stackwise.config.errors import ConfigError, masked
from stackwise.storage import ops
from stackwise.tracking import units
from stackwise.tracking.folder import RunFolder
from stackwise.tracking.history import RunHistory, StageHistory
from stackwise.tracking.metrics import MetricsLog, read_metrics

__all__ = ["build_report"]

_STATUS = {
    "done": "done",
    "stopped": "stopped before the end",
    "failed": "failed",
    "unfinished": "not finished",
}
_NO_MATPLOTLIB = 'The plots need matplotlib: pip install "stackwise[train]", then build the report again.'
_MOST_BLOCKS = 24  # deeper racks are drawn to scale, in all rows alike
_RACK_WIDTH = 130  # pixels of the deepest rack drawn to scale


def build_report(run_dir: str | Path) -> Path:
    """Write ``plots/*.png`` and ``report.html`` in a run folder from what the folder holds; return the page's path.

    Works on a finished, stopped or still running run. Lines of ``metrics.jsonl`` that cannot be read are named on the
    page. Without matplotlib the page is written without plots, says how to install it, and a warning is issued.
    Raises ``RunFolderError`` when the folder holds no run and ``FileNotFoundError`` when it has no ``metrics.jsonl``.
    """
    folder = RunFolder.open(run_dir)
    log = read_metrics(folder.metrics, strict=False)
    run = RunHistory.from_events(log.events)
    body = "\n".join(
        part
        for part in (
            _header(run, folder),
            _notices(run, log),
            _key_figures(run),
            _stages(run),
            _growths(run),
            _plots(run, folder),
            _samples(run),
            _folded(run, folder),
            "<footer>Written by StackWise from this run's folder. Losses are in nats per token; 1 MB is 10<sup>6</sup> "
            "bytes, 1 k is 1000.</footer>",
        )
        if part
    )
    style = resources.files("stackwise.tracking").joinpath("report.css").read_text("utf-8")
    title = _text(run.run_id or folder.path.name)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title} · StackWise</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    ops.replace_text(folder.report, page)
    return folder.report


def _header(run: RunHistory, folder: RunFolder) -> str:
    facts = []
    if run.start:
        start = run.start
        facts = [
            f"{len(start['stages'])} stages",
            f"{start['device']} {start['dtype']}",
            f"vocabulary {start['vocab_size']:,}",
            f"context {start['seq_len']:,}",
            f"{start['batch_tokens']:,} tokens a step",
        ]
    if run.first_time is not None:
        began = datetime.fromtimestamp(run.first_time, UTC)
        facts.append(f"started {began:%Y-%m-%d %H:%M} UTC")
    if run.starts > 1:
        facts.append("resumed once" if run.starts == 2 else f"resumed {run.starts - 1} times")
    name = _text(run.run_id or folder.path.name)
    return (
        '<header>\n<div class="product">StackWise</div>\n'
        f'<h1>{name} <span class="pill {run.status}">{_STATUS[run.status]}</span></h1>\n'
        f'<div class="lead">{_text(" · ".join(facts))}</div>\n</header>'
    )


def _notices(run: RunHistory, log: MetricsLog) -> str:
    notices = [f"Left out, because it cannot be read: {problem}" for problem in log.problems]
    if log.torn:
        notices.append("The last line of metrics.jsonl was cut off while it was written and is left out.")
    if run.status == "failed":
        notices += [event["message"] for event in run.last_words]
    if not run.steps:
        notices.append("No training step has been logged yet.")
    return "\n".join(f'<p class="notice">{_text(notice)}</p>' for notice in notices)


def _key_figures(run: RunHistory) -> str:
    last_eval = run.evals[-1] if run.evals else None
    stage = run.stage
    seconds, tokens = run.latest("seconds"), run.latest("tokens")
    n_stacks = stage.get("n_stacks") if stage else None
    total = run.total_steps
    figures = [
        (
            "Validation loss",
            units.loss(run.eval_loss),
            f"perplexity {last_eval['perplexity']:.2f}" if last_eval else "not evaluated",
        ),
        (
            "Bits per byte",
            f"{last_eval['bits_per_byte']:.3f}"
            if last_eval and last_eval["bits_per_byte"] is not None
            else "–",
            "on the held-out split",
        ),
        (
            "Training loss",
            units.loss(run.loss),
            f"at step {run.step:,}" + (f" of {total:,}" if total else ""),
        ),
        (
            "Stacks",
            "–" if n_stacks is None else str(n_stacks),
            f"{units.count(stage.get('params') if stage else None)} parameters",
        ),
        ("Tokens", units.count(tokens), "seen in training"),
        ("Compute", units.flops(run.latest("flops")), "spent in training"),
        ("Time", units.duration(seconds), "of training"),
        ("Throughput", units.rate(tokens / seconds) if tokens and seconds else "–", "mean of the run"),
        ("Peak memory", units.size(run.peak_rss_bytes), "resident, whole process"),
        (
            "Checkpoints",
            str(len(run.checkpoints)),
            f"{units.size(sum(event['bytes_written'] for event in run.checkpoints))} written",
        ),
    ]
    tiles = "\n".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in figures
    )
    return f'<dl class="figures">\n{tiles}\n</dl>'


def _stages(run: RunHistory) -> str:
    if not run.stages:
        return ""
    deepest = max((stage.start["total_blocks"] for stage in run.stages if stage.start), default=0)
    rows = "\n".join(_stage_row(stage, deepest) for stage in run.stages)
    heads = ("Rack", "Stacks", "Trained", "Steps", "Loss", "Validation", "Time", "Counted memory")
    cells = "".join(f"<th{' class=left' if head == 'Rack' else ''}>{head}</th>" for head in heads)
    return (
        "<h2>Stages</h2>\n"
        '<p class="caption key">One mark per block, input side on the left: '
        '<span><i class="frozen"></i>frozen trunk, runs without gradient</span> <span><i></i>gradient flows</span></p>\n'
        f'<div class="card scroll"><table class="cards">\n<thead><tr><th>Stage</th>{cells}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>{_stored(run)}"
    )


def _stored(run: RunHistory) -> str:
    found = [
        f"{stage.index + 1} {stage.name}: {', '.join(units.stored(stage.end['stored']))}"
        for stage in run.stages
        if stage.end and stage.end["stored"] is not None
    ]
    if not found:
        return ""
    return f'\n<p class="caption">Stored outputs of the frozen trunk. {_text("; ".join(found))}.</p>'


def _stage_row(stage: StageHistory, deepest: int) -> str:
    end = stage.end
    params, trained = stage.get("params"), stage.get("trainable_params")
    loss, validation, seconds, memory = "–", None, None, None
    if end:
        loss = f"{units.loss(end['loss_first'])} → {units.loss(end['loss_last'])}"
        validation, seconds, memory = end["eval_loss"], end["seconds"], end["bytes"]["peak"]
    elif stage.steps:
        loss = f"{units.loss(stage.steps[0]['loss'])} → {units.loss(stage.steps[-1]['loss'])}"
    trains = ", ".join((stage.plan or {}).get("trains", []))
    cells = [
        ("Rack", _rack(stage, deepest), "left full"),
        ("Stacks", str(stage.get("n_stacks")), ""),
        ("Trained", f"{units.count(trained)} <small>of {units.count(params)}</small>", ""),
        ("Steps", units.steps(stage.get("steps") or 0), ""),
        ("Loss", loss, ""),
        ("Validation", units.loss(validation), ""),
        ("Time", units.duration(seconds), ""),
        ("Counted memory", units.size(memory), ""),
    ]
    columns = "".join(
        f'<td data-label="{label}"' + (f' class="{kind}"' if kind else "") + f">{value}</td>"
        for label, value, kind in cells
    )
    row = "" if stage.reached else ' class="future"'
    return f'<tr{row}><th title="trains {_text(trains)}">{stage.index + 1} {_text(stage.name)}</th>{columns}</tr>'


def _rack(stage: StageHistory, deepest: int) -> str:
    if stage.start is None:
        return "not started"
    frozen, total = stage.start["prefix_blocks"], stage.start["total_blocks"]
    label = f'role="img" aria-label="{frozen} of {total} blocks frozen"'
    if deepest <= _MOST_BLOCKS:
        marks = '<i class="frozen"></i>' * frozen + "<i></i>" * (total - frozen)
        return f'<span class="rack" {label}>{marks}</span>'
    parts = [(' class="frozen"', frozen), ("", total - frozen)]
    marks = "".join(f'<i{kind} style="flex-grow:{blocks}"></i>' for kind, blocks in parts if blocks)
    width = max(6, round(_RACK_WIDTH * total / deepest))
    return f'<span class="rack scaled" style="width:{width}px" {label}>{marks}</span> <small>{frozen} + {total - frozen}</small>'


def _growths(run: RunHistory) -> str:
    rows = []
    for growth in run.growths:
        stage = next(stage for stage in run.stages if stage.index == growth.stage)
        before, after = growth.before, growth.after["loss"]
        end = stage.end["eval_loss"] if stage.end else None
        jump = "–" if before is None else _change(after - before["loss"])
        gain = "–" if before is None or end is None else _change(end - before["loss"])
        name = f"{stage.index + 1} {_text(stage.name)}"
        cells = [
            ("At step", units.steps(growth.after["step"])),
            ("Before growth", units.loss(before["loss"] if before else None)),
            ("After growth", units.loss(after)),
            ("Change at growth", jump),
            ("End of the stage", units.loss(end)),
            ("Change over the stage", gain),
        ]
        rows.append(
            f"<tr><th>{name}</th>"
            + "".join(f'<td data-label="{label}">{value}</td>' for label, value in cells)
            + "</tr>"
        )
    if not rows:
        return ""
    heads = "".join(
        f"<th>{head}</th>"
        for head in ("Stage", "At step", "Before growth", "After growth", "Change at growth", "End of the stage",
                     "Change over the stage")
    )  # fmt: skip
    return (
        "<h2>Validation around each growth</h2>\n"
        '<p class="caption">Loss on the same held-out tokens just before new weights join, just after, and when their '
        "stage ends.</p>\n"
        f'<div class="card scroll"><table class="cards">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _change(difference: float) -> str:
    kind = "better" if difference < 0 else "worse" if difference > 0 else ""
    return f'<span class="{kind}">{units.signed(difference)}</span>'


def _plots(run: RunHistory, folder: RunFolder) -> str:
    from stackwise.tracking.plots import available_plots, to_svg, write_png

    plots = available_plots(run)
    if not plots:
        return ""
    if find_spec("matplotlib") is None:
        warnings.warn(_NO_MATPLOTLIB, stacklevel=3)
        return f'<h2>Curves</h2>\n<p class="notice">{_text(_NO_MATPLOTLIB)}</p>'
    figures = []
    for plot in plots:
        write_png(plot, run, folder.plots)
        drawing = f'<div class="narrow">{to_svg(plot, run)}</div>'
        if plot.wide:
            drawing += f'<div class="wide-drawing">{to_svg(plot, run, wide=True)}</div>'
        kind = "wide" if plot.wide else "single"
        figures.append(
            f'<figure class="card {kind}" id="{plot.name}"><h3>{plot.title}</h3>\n{drawing}\n'
            f"<figcaption>{plot.caption}</figcaption></figure>"
        )
    return '<h2>Curves</h2>\n<div class="plots">\n' + "\n".join(figures) + "\n</div>"


def _samples(run: RunHistory) -> str:
    parts = []
    for event in reversed(run.samples):
        state = " open" if event is run.samples[-1] else ""
        parts.append(
            f'<details class="card sample"{state}><summary>After step {event["step"]:,} '
            f"<small>stage {event['stage'] + 1}</small></summary>\n"
            f"<pre><b>{_text(event['prompt'])}</b>{_text(event['text'])}</pre></details>"
        )
    if not parts:
        return ""
    caption = '<p class="caption">The prompt is in colour; the model wrote the rest.</p>'
    return "<h2>Samples</h2>\n" + caption + "\n" + "\n".join(parts)


def _folded(run: RunHistory, folder: RunFolder) -> str:
    sections = [
        ("Configuration", folder.config.name, _config_text(folder.config)),
        ("Environment", folder.environment.name, _environment_text(folder.environment)),
    ]
    if run.notes:
        sections.append(("Notes", f"{len(run.notes)}", "\n".join(event["message"] for event in run.notes)))
    parts = [
        f'<details class="card"><summary>{title} <small>{_text(detail)}</small></summary>\n<pre>{_text(text)}</pre>'
        "</details>"
        for title, detail, text in sections
    ]
    return "<h2>How to repeat it</h2>\n" + "\n".join(parts)


def _environment_text(path: Path) -> str:
    text = _file_text(path)
    try:
        facts: Any = json.loads(text)
    except ValueError:
        return text
    return "\n".join(_flat_lines("", facts)) if isinstance(facts, dict) else text


def _flat_lines(prefix: str, facts: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += _flat_lines(f"{prefix}{name}.", value)
        else:
            lines.append(f"{prefix}{name}: {value if isinstance(value, str) else json.dumps(value)}")
    return lines


def _config_text(path: Path) -> str:
    """The configuration as it was written, but for secrets: a report is shown to others."""
    text = _file_text(path)
    try:
        data = parse(text, path.name).data
    except ConfigError:
        return text
    return text if masked(data) == data else dump(masked(data))


def _file_text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"


def _text(text: str) -> str:
    """User text for the page: control characters shown, HTML escaped."""
    return escape(units.printable(text))
