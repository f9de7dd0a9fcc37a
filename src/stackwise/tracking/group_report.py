"""One page about several runs: figures, curves over what they cost, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stackwise.config.errors import show
from stackwise.storage import ops
from stackwise.tracking import units
from stackwise.tracking.gallery import gallery
from stackwise.tracking.group_plots import group_plots
from stackwise.tracking.groups import Difference, RunGroup, Spread, differences, warnings_about
from stackwise.tracking.page import html_page, text

__all__ = ["GroupPage", "build_group_report"]

Shown = Callable[[float], str]
_COLUMNS: dict[str, tuple[str, Shown]] = {
    "params": ("Weights", units.count),
    "steps": ("Steps", lambda value: units.steps(round(value))),
    "tokens": ("Tokens", units.count),
    "flops": ("Compute", units.flops),
    "seconds": ("Time", units.duration),
    "peak_bytes": ("Counted memory", units.size),
    "peak_rss_bytes": ("Process", units.size),
}
_FOOTER = (
    "<footer>Written by StackWise from the folders of these runs. Losses are in nats per token, over several runs the "
    "mean with the range; 1 MB is 10<sup>6</sup> bytes, 1 k is 1000. Counted memory: tensors of the stage that takes "
    "the most; process: resident at the most.</footer>"
)


@dataclass(frozen=True)
class GroupPage:
    """What a page says besides the runs. `sections` are HTML, put between the curves and the settings."""

    title: str
    lead: str = ""
    notices: Sequence[str] = ()
    sections: Sequence[str] = field(default=())


def build_group_report(groups: Sequence[RunGroup], path: Path, page: GroupPage) -> Path:
    """Write one self-contained HTML file about the runs to `path`, and return it."""
    notices = [*page.notices, *warnings_about(groups)]
    parts = [
        f'<header>\n<div class="product">StackWise</div>\n<h1>{text(page.title)}</h1>\n'
        f'<div class="lead">{text(page.lead)}</div>\n</header>',
        "\n".join(f'<p class="notice">{text(notice)}</p>' for notice in notices),
        _table(groups),
        gallery("Curves", group_plots(groups)),
        *page.sections,
        _settings(groups, differences(groups)),
        _FOOTER,
    ]
    ops.replace_text(path, html_page(page.title, "\n".join(part for part in parts if part)))
    return path


def _table(groups: Sequence[RunGroup]) -> str:
    first = groups[0].figures["loss"]
    heads = [
        "Validation loss",
        "Against the first",
        "Bits per byte",
        *(head for head, _ in _COLUMNS.values()),
    ]
    rows = []
    for group in groups:
        figures = group.figures
        cells = [
            ("Validation loss", _spread(figures["loss"], units.loss) + _kind(group)),
            ("Against the first", _against(first, figures["loss"]) if _comparable(group, groups[0]) else "–"),
            ("Bits per byte", _mean(figures["bits_per_byte"], lambda value: f"{value:.3f}")),
            *((head, _mean(figures[name], shown)) for name, (head, shown) in _COLUMNS.items()),
        ]
        runs = "" if len(group.runs) == 1 else f"<small>{len(group.counted)} runs</small>"
        rows.append(
            f"<tr><th>{text(group.label)}{runs}</th>"
            + "".join(f'<td data-label="{head}">{value}</td>' for head, value in cells)
            + "</tr>"
        )
    return (
        "<h2>Figures</h2>\n"
        '<div class="card scroll"><table class="cards runs">\n<thead><tr><th>Run</th>'
        + "".join(f"<th>{head}</th>" for head in heads)
        + "</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _spread(found: Spread | None, shown: Shown) -> str:
    if found is None:
        return "–"
    mean, low, high = (shown(value) for value in (found.mean, found.low, found.high))
    return mean if found.count == 1 else f"{mean}<small>{low} to {high}</small>"


def _kind(group: RunGroup) -> str:
    label = group.label_of_loss
    return "" if label in (None, "exact") else f"<small>{text(str(label))}</small>"


def _comparable(group: RunGroup, first: RunGroup) -> bool:
    """An exact loss and a bound are not subtracted from each other."""
    return group is not first and group.label_of_loss == first.label_of_loss


def _mean(found: Spread | None, shown: Shown) -> str:
    return "–" if found is None else shown(found.mean)


def _against(first: Spread | None, other: Spread | None) -> str:
    """The difference of means; without a colour where the ranges overlap, for it may be chance."""
    if first is None or other is None:
        return "–"
    difference = other.mean - first.mean
    apart = other.high < first.low or other.low > first.high
    kind = "" if not apart else "better" if difference < 0 else "worse"
    return f'<span class="{kind}">{units.signed(difference)}</span>'


def _settings(groups: Sequence[RunGroup], rows: Sequence[Difference]) -> str:
    if not rows:
        return '<h2>Settings</h2>\n<p class="caption">The settings of these runs are the same.</p>'
    heads = "".join(f"<th>{text(group.label)}</th>" for group in groups)
    body = "\n".join(
        f"<tr><th>{text(row.key)}</th>"
        + "".join(f"<td>{text(show(value))}</td>" for value in row.values)
        + "</tr>"
        for row in rows
    )
    return (
        "<h2>Settings that differ</h2>\n"
        f'<div class="card scroll"><table class="settings">\n<thead><tr><th>Key</th>{heads}</tr></thead>\n<tbody>\n{body}\n'
        "</tbody></table></div>"
    )
