"""The live display: a panel with the growing rack, progress of stage and run, and the figures of the last step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.text import Text

from stackwise.tracking import units
from stackwise.tracking.progress import Progress

__all__ = ["Display", "sparkline"]

_LABEL = 7  # columns of the row names


class Display:
    """Renders a ``Progress`` afresh at each refresh, in five rows that fit any width from 40 columns."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        progress, ascii_only = self.progress, options.ascii_only
        inner = options.max_width - 4
        rows = [
            self._rack(inner, ascii_only),
            self._bar("stage", inner, ascii_only),
            self._bar("run", inner, ascii_only),
            self._figures(inner, ascii_only),
        ]
        stage = progress.stage_event
        name = units.encodable(units.printable(stage["name"]), options.encoding) if stage else ""
        title = Text.assemble(
            (f"stage {progress.stage + 1}/{max(1, len(progress.stages))} ", "bold default"),
            (name, "bold cyan"),
        )
        title.truncate(max(8, inner - 4), overflow="ellipsis")
        saved = (
            f"saved at step {units.steps(progress.saved_step)}" if progress.saved_step is not None else None
        )
        yield ""
        yield Panel(
            Text("\n").join(rows),
            title=title,
            title_align="left",
            subtitle=Text(saved) if saved else None,
            subtitle_align="right",
            box=box.ASCII if ascii_only else box.ROUNDED,
            border_style="bright_black",
            padding=(0, 1),
            width=options.max_width,
        )

    def _rack(self, width: int, ascii_only: bool) -> Text:
        """One mark per block, in forward order: those before the first trained one run without gradient."""
        row = _label("rack")
        stage = self.progress.stage_event
        if stage is None:
            return row
        frozen, total = stage["prefix_blocks"], stage["total_blocks"]
        dim, full = (".", "#") if ascii_only else ("░", "█")
        share = f"{units.count(stage['trainable_params'])} of {units.count(stage['params'])} train"
        words = f"  {frozen} of {total} blocks frozen, {share}" if frozen else f"  {total} blocks, {share}"
        for text in (words, f"  {share}", ""):
            room = width - _LABEL - len(text)
            if room >= min(total, 8):
                break
        scale = min(1.0, room / max(1, total))  # a rack wider than the terminal is drawn to scale
        marks_frozen, marks = math.ceil(frozen * scale), max(1, int(total * scale))
        gap = 1 if marks * 2 <= room else 0  # separate marks where there is room for them
        row.append("".join(dim + " " * gap for _ in range(marks_frozen)), "blue")
        row.append("".join(full + " " * gap for _ in range(marks - marks_frozen)), "bold cyan")
        row.append(text, "dim")
        return row

    def _bar(self, which: str, width: int, ascii_only: bool) -> Text:
        progress = self.progress
        if which == "stage":
            done, lengths, left = progress.stage_step, [progress.stage_steps], progress.stage_seconds_left
        else:
            lengths = [stage["steps"] for stage in progress.stages] or [progress.total_steps]
            done, left = progress.step, progress.seconds_left
        total = sum(lengths)
        share = min(1.0, done / total) if total else 0.0
        digits = len(units.steps(progress.total_steps))
        tail = f" {share:>4.0%}"
        if width >= 60:
            tail += f"  {units.steps(done):>{digits}}/{units.steps(total):<{digits}}"
        # as wide in both rows, and while it shrinks, so that the bars stand still
        room = max(
            14, *(len(_time_left(each)) for each in (progress.stage_seconds_left, progress.seconds_left))
        )
        tail += _time_left(left).ljust(room)
        row = _label(which)
        row.append_text(_segments(lengths, done, max(6, width - _LABEL - len(tail)), ascii_only))
        row.append(tail)
        return row

    def _figures(self, width: int, ascii_only: bool) -> Text:
        progress, row = self.progress, _label("loss")
        if progress.loss is None:
            return row.append("waiting for the first step", "dim")
        row.append(units.loss(progress.loss), "bold")
        # Most important first: what does not fit is left out from the end.
        figures = [
            (units.rate(progress.tokens_per_s).removesuffix(" tok/s"), "tok/s"),
            (units.size(progress.rss_bytes) if progress.rss_bytes is not None else "", "memory"),
            (units.loss(progress.eval_loss) if progress.eval_loss is not None else "", "validation"),
            (units.duration(progress.elapsed), "elapsed"),
            (f"{progress.lr:.1e}" if progress.lr is not None else "", "lr"),
        ]
        chunks = [Text.assemble((value, "bold"), (f" {name}", "dim")) for value, name in figures if value]
        curve = 0 if ascii_only or width < 60 else min(24, width - _LABEL - 55)
        room = width - row.cell_len - (curve + 2 if curve >= 8 else 0)
        if curve >= 8:
            row.append("  ").append(sparkline(progress.losses, curve), "cyan")
        for chunk in chunks:
            if chunk.cell_len + 3 > room:
                break
            row.append("   ").append_text(chunk)
            room -= chunk.cell_len + 3
        return row


def _time_left(seconds: float | None) -> str:
    return "  timing" if seconds is None else f"  {units.remaining(seconds)} left"


def _label(name: str) -> Text:
    return Text(no_wrap=True).append(f"{name:<{_LABEL}}", "dim")


def _segments(lengths: Sequence[int], done: int, width: int, ascii_only: bool) -> Text:
    """A bar of ``width`` columns in one segment per entry of ``lengths``, filled up to ``done``."""
    full, empty = ("=", "-") if ascii_only else ("━", "─")
    bar = Text()
    gaps = len(lengths) - 1
    if gaps * 3 > width:  # too many stages to tell apart
        lengths, gaps = [sum(lengths)], 0
    total = max(1, sum(lengths))
    cells, begin = width - gaps, 0
    for i, length in enumerate(lengths):
        first, last = round(begin / total * cells), round((begin + length) / total * cells)
        inside = min(max(done - begin, 0), length)
        filled = int(inside / length * (last - first)) if length else 0
        complete = length > 0 and inside == length
        bar.append(full * filled, "green" if complete else "bold cyan")
        bar.append(empty * (last - first - filled), "dim")
        bar.append(" " if i < gaps else "")
        begin += length
    return bar


def sparkline(values: Sequence[float], width: int) -> str:
    """``values`` as a curve of ``width`` characters, low to high; each character is the mean of its share."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    width = min(width, len(finite))
    edges = [round(i * len(finite) / width) for i in range(width + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    marks = "▁▂▃▄▅▆▇█"
    span = (high - low) or 1.0
    return "".join(marks[min(7, int((mean - low) / span * 8))] for mean in means)
