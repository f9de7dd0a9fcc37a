"""Tables of several runs, as `runs compare` and `compare` print them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stackwise.cli.output import print_table

if TYPE_CHECKING:
    from stackwise.tracking.groups import Difference, RunGroup


def print_groups(title: str, groups: Sequence[RunGroup], *, caption: str = "") -> None:
    """A row per group: means over its runs, the validation loss with its range."""
    from stackwise.tracking import units

    def cell(group: RunGroup, name: str, show: Callable[[float], str], *, spread: bool = False) -> str:
        found = group.figures[name]
        if found is None:
            return "–"
        return found.text(show) if spread else show(found.mean)

    rows = [
        [
            group.label,
            str(len(group.runs)) if group.status == "done" else group.status,
            cell(group, "params", units.count),
            cell(group, "steps", lambda value: units.steps(round(value))),
            cell(group, "tokens", units.count),
            cell(group, "flops", units.flops),
            units.labelled(cell(group, "loss", units.loss, spread=True), group.label_of_loss),
            cell(group, "bits_per_byte", lambda value: f"{value:.3f}"),
            cell(group, "seconds", units.duration),
            cell(group, "peak_bytes", units.size),
        ]
        for group in groups
    ]
    heads = [
        "run",
        "text:runs",
        "weights",
        "steps",
        "tokens",
        "compute",
        "validation",
        "bits/byte",
        "time",
        "memory",
    ]
    text = "Validation losses in nats per token, on the held-out text: mean, and range over several runs. Memory: counted "
    print_table(title, heads, rows, caption=caption or text + "bytes of the stage that takes the most.")


def print_differences(groups: Sequence[RunGroup], rows: Sequence[Difference]) -> None:
    """A row per key of the settings in which the groups differ."""
    from stackwise.config.errors import show

    if not rows:
        print("The settings of these runs are the same.")
        return
    print_table(
        "Settings that differ",
        ["key", *(f"text:{group.label}" for group in groups)],
        [[row.key, *(show(value) for value in row.values)] for row in rows],
    )
