"""Sections of a report on the stages of a run and on its growths."""

from __future__ import annotations

from stackwise.tracking import units
from stackwise.tracking.history import RunHistory, StageHistory
from stackwise.tracking.page import ReportedRun, text

__all__ = ["growths", "stages"]

_FEW_STORED = 3  # stages whose stores are told in one sentence
_MOST_BLOCKS = 24  # deeper racks are drawn to scale, in all rows alike
_RACK_WIDTH = 130  # pixels of the deepest rack drawn to scale


def stages(reported: ReportedRun) -> str:
    """The table of stages: what ran frozen, what was trained, what it reached and what it took."""
    run = reported.history
    if not run.stages:
        return ""
    deepest = max((stage.start["total_blocks"] for stage in run.stages if stage.start), default=0)
    rows = "\n".join(_stage_row(stage, deepest) for stage in run.stages)
    heads = ("Rack", "Stacks", "Trained", "Steps", "Training loss", "Validation", "Time", "Counted memory")
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
    if len(found) <= _FEW_STORED:
        return f'\n<p class="caption">Stored outputs of the frozen trunk. {text("; ".join(found))}.</p>'
    lines = "".join(f"<li>{text(line)}</li>" for line in found)
    return (
        f'\n<details class="card"><summary>Stored outputs of the frozen trunk <small>{len(found)} stages</small>'
        f'</summary>\n<ul class="lines">{lines}</ul></details>'
    )


def _stage_row(stage: StageHistory, deepest: int) -> str:
    end = stage.end
    params, trained = stage.get("params"), stage.get("trainable_params")
    first, last = stage.training_losses
    loss = "–" if first is None else f"{units.loss(first)} → {units.loss(last)}"
    validation, seconds, memory = None, None, None
    if end:
        validation, seconds, memory = end["eval_loss"], end["seconds"], end["bytes"]["peak"]
    trains = ", ".join((stage.plan or {}).get("trains", []))
    cells = [
        ("Rack", _rack(stage, deepest), "left full"),
        ("Stacks", str(stage.get("n_stacks")), ""),
        ("Trained", f"{units.count(trained)} <small>of {units.count(params)}</small>", ""),
        ("Steps", units.steps(stage.get("steps") or 0), ""),
        ("Training loss", loss, ""),
        ("Validation", units.loss(validation), ""),
        ("Time", units.duration(seconds), ""),
        ("Counted memory", units.size(memory), ""),
    ]
    columns = "".join(
        f'<td data-label="{label}"' + (f' class="{kind}"' if kind else "") + f">{value}</td>"
        for label, value, kind in cells
    )
    row = "" if stage.reached else ' class="future"'
    return (
        f'<tr{row}><th title="trains {text(trains)}">{stage.index + 1} {text(stage.name)}</th>{columns}</tr>'
    )


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


def growths(reported: ReportedRun) -> str:
    """Validation just before and just after each growth, and at the end of its stage."""
    run = reported.history
    rows = []
    for growth in run.growths:
        stage = next(stage for stage in run.stages if stage.index == growth.stage)
        before, after = growth.before, growth.after["loss"]
        end = stage.end["eval_loss"] if stage.end else None
        jump = "–" if before is None else _change(after - before["loss"])
        gain = "–" if before is None or end is None else _change(end - before["loss"])
        name = f"{stage.index + 1} {text(stage.name)}"
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
