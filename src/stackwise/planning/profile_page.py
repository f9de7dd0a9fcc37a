"""A profile as files: one page, its picture, the figures and the trace."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stackwise.planning.profile import Profile
from stackwise.planning.step_bytes import CATEGORIES, ByteLine
from stackwise.storage import ops
from stackwise.tracking import units
from stackwise.tracking.drawing import COLOURS, Plot, legend, write_png
from stackwise.tracking.gallery import can_draw, gallery
from stackwise.tracking.page import html_page, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ITEMS", "TRACE", "part_rows", "planned_rows", "write_profile"]

TRACE = "trace.json.gz"
ITEMS = {
    "parameters": "weights",
    "gradients": "gradients",
    "moments": "moments",
    "activations": "activations",
    "buffers": "buffers",
    "host": "in host memory",
    "alive": "most alive at once",
}
"""Item -> its name for a person."""
_POINTS = 600  # of the picture
_TOP = 20  # operators on the page


def planned_rows(profile: Profile) -> list[list[str]]:
    """Item, planned, measured, and the second over the first; items that are nowhere are left out."""
    rows = []
    for item, name in ITEMS.items():
        planned, measured = profile.planned[item], profile.measured[item]
        if not planned and not measured:
            continue
        ratio = "–" if measured is None or not planned else f"{measured / planned:.3f}"
        rows.append([name, units.size(planned), units.size(measured), ratio])
    return rows


def part_rows(profile: Profile) -> list[list[str]]:
    """Part of a step, milliseconds, share."""
    return [
        [name, f"{1000 * seconds:.1f}", f"{seconds / profile.seconds:.0%}"]
        for name, seconds in profile.parts.items()
        if name != "other" or seconds / profile.seconds > 0.005
    ]


def write_profile(profile: Profile, folder: Path) -> Path:
    """Write profile.html, bytes.png, profile.json and trace.json.gz, in place of what has these names; returns the page.

    Without matplotlib there is no picture, the page says so, and a warning is issued.
    """
    ops.make_dir(folder)
    plots = [] if profile.line is None else [_plot(profile.line)]
    if can_draw():
        for plot in plots:
            write_png(plot, folder)
    ops.write_atomic(folder / TRACE, [profile.trace], kind="text")
    ops.replace_text(folder / "profile.json", json.dumps(profile.to_dict(), indent=2) + "\n")
    page = folder / "profile.html"
    ops.replace_text(page, html_page(f"{profile.run_id}, {profile.name}", _body(profile, plots)))
    return page


def _body(profile: Profile, plots: list[Plot]) -> str:
    operators = [
        [row.name, f"{row.calls:,.0f}", f"{1000 * row.seconds:.2f}", f"{row.share:.1%}"]
        for row in profile.operators[:_TOP]
    ]
    left_out = len(profile.operators) - len(operators)
    more = f" {left_out} more are in profile.json." if left_out > 0 else ""
    return "\n".join(
        (
            _header(profile),
            _tiles(profile),
            _table(
                "Memory: planned and measured",
                "Each item at its most, as a run counts it. Most alive at once: every tensor, with what passes on top of "
                "the items; measured operation by operation in a real step.",
                ["Item", "Planned", "Measured", "Measured / planned"],
                planned_rows(profile),
            ),
            gallery("Bytes over one step", plots),
            _table(
                "Time by part of a step",
                f"Mean of {profile.steps} steps that nothing else watched.",
                ["Part", "ms", "Share"],
                part_rows(profile),
            ),
            _table(
                "Operators by time of their own",
                f"Per step, without the operators they call. {TRACE} opens in ui.perfetto.dev or chrome://tracing.{more}",
                ["Operator", "Calls", "ms", "Share"],
                operators,
            ),
            "<footer>Written by stackwise profile. 1 MB is 10<sup>6</sup> bytes.</footer>",
        )
    )


def _header(profile: Profile) -> str:
    lead = f"{profile.device} {profile.dtype} · {profile.tokens:,} tokens a step"
    return (
        '<header>\n<div class="product">StackWise · profile</div>\n'
        f"<h1>{text(profile.run_id)}</h1>\n"
        f'<div class="lead">stage {profile.stage + 1} of {profile.stages}, {text(profile.name)} · {text(lead)}</div>\n'
        "</header>"
    )


def _tiles(profile: Profile) -> str:
    alive = profile.measured["alive"]
    figures = [
        ("Throughput", units.rate(profile.tokens_per_s), f"{1000 * profile.seconds:.1f} ms a step"),
        (
            "Compute",
            units.flops(profile.flops_per_s) + "/s",
            f"{profile.flops_per_s / profile.peak_rate:.0%} of the peak of the device",
        ),
        ("Most alive", units.size(alive), "tensors, at once"),
        ("Planned", units.size(profile.planned["alive"]), "the most alive at once"),
        (
            ("Allocator", units.size(profile.allocated), "peak of CUDA's allocator")
            if profile.allocated is not None
            else ("Process", units.size(profile.rss_bytes), "resident at most, with Python and PyTorch")
        ),
    ]
    tiles = "\n".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in figures
    )
    return f'<dl class="figures">\n{tiles}\n</dl>'


def _table(title: str, caption: str, heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "\n".join(
        f"<tr><th>{text(row[0])}</th>"
        + "".join(
            f'<td data-label="{name}">{value}</td>' for name, value in zip(heads[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<h2>{title}</h2>\n<p class="caption">{caption}</p>\n'
        f'<div class="card scroll"><table class="cards">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def _plot(line: ByteLine) -> Plot:
    at, peak = line.peak
    parts = ", ".join(f"{units.size(size)} {name}" for name, size in peak.items() if size)
    return Plot(
        "bytes",
        "Bytes alive by what they are for",
        f"After every operation of one step, in their order. The most, {units.size(sum(peak.values()))}, at operation "
        f"{at:,}: {parts}.",
        partial(_draw, line=line),
        wide=True,
    )


def _draw(axes: Axes, line: ByteLine) -> None:
    points = line.thinned(_POINTS)
    xs = [x for x, _ in points] + [line.operations]
    rows = [row for _, row in points] + [points[-1][1]]
    below = [0.0] * len(xs)
    for i, name in enumerate(CATEGORIES):
        above = [low + row[i] for low, row in zip(below, rows, strict=True)]
        if above != below:
            axes.fill_between(
                xs, below, above, step="post", color=COLOURS[f"c{i}"], alpha=0.75, linewidth=0, label=name
            )
        below = above
    at, peak = line.peak
    axes.plot([at], [sum(peak.values())], "o", color=COLOURS["fg"], markersize=4)
    axes.set_xlim(0, max(1, line.operations))
    axes.set_ylim(0, 1.16 * max(below))
    ends = [start for start, _ in line.parts[1:]] + [line.operations]
    for (start, name), end in zip(line.parts, ends, strict=True):
        if end - start > 0.04 * line.operations:
            axes.axvline(start, color=COLOURS["muted"], linewidth=0.6, dashes=(2, 2))
            axes.text(
                (start + end) / 2,
                1.13 * max(below),
                name,
                ha="center",
                va="top",
                fontsize=8,
                color=COLOURS["muted"],
            )
    axes.set_xlabel("operation")
    axes.xaxis.set_major_formatter(lambda value, _: units.tick(value))
    axes.yaxis.set_major_formatter(lambda value, _: units.tick(value, "B"))
    legend(axes)
