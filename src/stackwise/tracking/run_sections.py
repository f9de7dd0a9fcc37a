"""Sections of a report on the run as a whole: header, figures, curves and samples."""

from __future__ import annotations

from datetime import UTC, datetime

from stackwise.tracking import units
from stackwise.tracking.gallery import gallery
from stackwise.tracking.page import ReportedRun, text

__all__ = ["curves", "header", "key_figures", "notices", "samples"]

_STATUS = {
    "done": "done",
    "stopped": "stopped before the end",
    "failed": "failed",
    "unfinished": "not finished",
}


def header(reported: ReportedRun) -> str:
    """Name, state and main facts of the run."""
    run = reported.history
    facts = []
    if run.start:
        start, count = run.start, len(run.start["stages"])
        facts = [
            f"{count} stage" + ("" if count == 1 else "s"),
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
    name = text(reported.name)
    return (
        '<header>\n<div class="product">StackWise</div>\n'
        f'<h1>{name} <span class="pill {run.status}">{_STATUS[run.status]}</span></h1>\n'
        f'<div class="lead">{text(" · ".join(facts))}</div>\n</header>'
    )


def notices(reported: ReportedRun) -> str:
    """What the reader must know first: why it failed, what could not be read."""
    run, log = reported.history, reported.log
    found = [f"Left out, because it cannot be read: {problem}" for problem in log.listed_problems]
    if log.torn:
        found.append("The last line of metrics.jsonl was cut off while it was written and is left out.")
    failures = [event["message"] for event in run.last_words] if run.status == "failed" else []
    if not run.steps:
        found.append("No training step has been logged yet.")
    parts = [("notice failed", message) for message in failures] + [("notice", message) for message in found]
    return "\n".join(f'<p class="{kind}">{text(message)}</p>' for kind, message in parts)


def key_figures(reported: ReportedRun) -> str:
    """The figures of the run as it stands."""
    run = reported.history
    last_eval = run.evals[-1] if run.evals else None
    bits = last_eval["bits_per_byte"] if last_eval else None
    stage = run.stage
    seconds, tokens = run.latest("seconds"), run.latest("tokens")
    n_stacks = stage.get("n_stacks") if stage else None
    total = run.total_steps
    figures = [
        (
            "Validation loss",
            units.loss(run.eval_loss),
            units.labelled(f"perplexity {last_eval['perplexity']:.2f}", run.eval_label)
            if last_eval
            else "not evaluated",
        ),
        (
            "Bits per byte",
            "–" if bits is None else f"{bits:.3f}",
            "on the held-out split" if bits is not None else "not known" if last_eval else "not evaluated",
        ),
        (
            "Training loss",
            units.loss(run.loss),
            f"at step {run.steps[-1]['step'] if run.steps else 0:,}" + (f" of {total:,}" if total else ""),
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


def curves(reported: ReportedRun) -> str:
    """The pictures of the run."""
    from stackwise.tracking.plots import available_plots

    return gallery("Curves", available_plots(reported.history))


def samples(reported: ReportedRun) -> str:
    """What the model wrote, the latest first."""
    run = reported.history
    parts = []
    for event in reversed(run.samples):
        state = " open" if event is run.samples[-1] else ""
        parts.append(
            f'<details class="card sample"{state}><summary>After step {event["step"]:,} '
            f"<small>stage {event['stage'] + 1}</small></summary>\n"
            f"<pre><b>{text(event['prompt'])}</b>{text(event['text'])}</pre></details>"
        )
    if not parts:
        return ""
    caption = '<p class="caption">The prompt is in colour; the model wrote the rest.</p>'
    return "<h2>Samples</h2>\n" + caption + "\n" + "\n".join(parts)
