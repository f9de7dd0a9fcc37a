"""Tables and drawing of docs/depth-diagnostics.md from the records of `depth_diagnostics.py`."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stackwise.storage import ops

BEGIN, END = "<!-- generated: depth-diagnostics -->", "<!-- end of depth-diagnostics -->"
COLOURS = ("#24292f", "#2f6fde", "#0d9488", "#cf4577", "#c2820f", "#7c5cd6", "#4f962c", "#66707b", "#a0522d")
ENOUGH = 0.01
"""An early exit suffices whose loss is this share above the whole's at most."""
LITTLE = 0.02
"""Nats: a stack whose removal costs less is missed little."""

Record = dict[str, Any]
View = dict[str, Any]


def write_report(
    folder: Path, records: Sequence[Record], original: Callable[[Record], float | None]
) -> list[str]:
    """Write page and drawing; the lines say what was written. `original`: the loss of a run when it was first made."""
    ops.make_dir(folder)
    lines = [text for part in (_frontier(records, original), _time(records, original)) for text in part]
    page = folder / "depth-diagnostics.md"
    old = page.read_text() if page.exists() else f"# Depth diagnostics\n\n{BEGIN}\n{END}\n"
    before, _, rest = old.partition(BEGIN)
    after = rest.partition(END)[2]
    body = "\n".join(lines)
    picture = folder / "depth-diagnostics.png"
    draw(picture, records)
    ops.replace_text(page, f"{before}{BEGIN}\n\n{body}\n{END}{after}")
    return [f"wrote {page}", f"wrote {picture}"]


def of(records: Sequence[Record], benchmark: str) -> list[Record]:
    """The records of one of the two benchmarks."""
    return [record for record in records if record["benchmark"] == benchmark]


def whole(record: Record) -> View:
    """The only view of a run whose stacks run for all rows."""
    (view,) = record["depth"]["views"]
    found: View = view
    return found


# --- the frontier --------------------------------------------------------------------------------------------------


def _frontier(records: Sequence[Record], original: Callable[[Record], float | None]) -> list[str]:
    runs = of(records, "frontier")
    if not runs:
        return []
    depth = max(len(whole(run)["stacks"]) for run in runs)
    protocol = runs[0]["depth"]["protocol"]
    numbers = [str(i) for i in range(1, depth + 1)]
    return [
        "### The frontier's language",
        "",
        f"One seed, equal FLOPs, {protocol['windows']:,} held-out windows of {protocol['seq_len']} tokens; nats per token, of which "
        f"{runs[0]['floor']:.4f} are the language's entropy. Stacks are counted from the embedding. First time: the loss of the "
        "same run in the records of [the frontier](frontier.md).",
        "",
        *_table(
            [
                "",
                "loss",
                "first time",
                "exits within 1 % after",
                f"stacks missed by less than {LITTLE}",
                "CKA of the last two",
            ],
            [_summary(run, original(run)) for run in runs],
        ),
        "",
        "Change of the loss **without** each stack:",
        "",
        *_table(["", *numbers], [_row(run, depth, "removed", "+.3f") for run in runs]),
        "",
        "Loss when the head reads **after** each stack (0: from the embedding):",
        "",
        *_table(
            ["", "0", *numbers],
            [
                [_name(run), f"{whole(run)['entry']:.3f}", *_row(run, depth, "exit", ".3f")[1:]]
                for run in runs
            ],
        ),
        "",
        "Size of the **update** of each stack, as a share of the state before it:",
        "",
        *_table(["", *numbers], [_row(run, depth, "update", ".2f") for run in runs]),
        "",
        "**Gradient** norm of each stack, thousandths of a nat per unit of a weight:",
        "",
        *_table(["", *numbers], [_row(run, depth, "gradient", ".1f", 1000) for run in runs]),
        "",
        "![Exit losses and losses without a stack, by curriculum](depth-diagnostics.png)",
        "",
    ]


def _summary(run: Record, before: float | None) -> list[str]:
    view = whole(run)
    stacks, loss = view["stacks"], view["loss"]
    exits = [view["entry"], *(stack["exit"] for stack in stacks)]
    enough = next(i for i, value in enumerate(exits) if value <= loss * (1 + ENOUGH))
    little = sum(stack["removed"] < LITTLE for stack in stacks)
    alike = view["cka"][-1][-2]
    return [
        _name(run),
        f"{run['loss']:.4f}",
        "–" if before is None else f"{before:.4f}",
        f"{enough} of {len(stacks)}",
        f"{little} of {len(stacks)}",
        "–" if len(stacks) < 2 or alike is None else f"{alike:.2f}",
    ]


def _row(run: Record, depth: int, key: str, form: str, factor: float = 1.0) -> list[str]:
    cells = [
        "–" if stack[key] is None else format(stack[key] * factor, form) for stack in whole(run)["stacks"]
    ]
    return [_name(run), *cells, *[""] * (depth - len(cells))]


def _name(run: Record) -> str:
    control = run["row"].startswith(("control", "1 block", "2 blocks", "random trunk"))
    return f"*{run['row']}*" if control else str(run["row"])


# --- depth as time ---------------------------------------------------------------------------------------------------


def _time(records: Sequence[Record], original: Callable[[Record], float | None]) -> list[str]:
    runs = of(records, "depth-as-time")
    lines: list[str] = []
    if not runs:
        return lines
    protocol = runs[0]["depth"]["protocol"]
    lines += [
        "### Depth as time",
        "",
        f"Characters of a text, one seed, {protocol['windows']:,} held-out windows of {protocol['seq_len']} characters in "
        f"{protocol['passes']} passes. Budget: the FLOPs of so many steps of the one-stack control. First time: the NELBO of the same "
        "run in the records of [depth as time](depth-as-time.md), where its budget is the same.",
        "",
        *_table(
            ["", "budget", "NELBO", "first time"],
            [[_name(run), f"{run['steps']:,}", f"{run['loss']:.4f}", _known(original(run))] for run in runs],
        ),
        "",
    ]
    for run in runs:
        views = run["depth"]["views"]
        if views[0]["alone"]:
            lines += [*_exchange(views), ""]
            continue
        stacks = views[0]["stacks"]
        lines += [
            f"{run['row'][0].upper()}{run['row'][1:]}: whole {views[0]['loss']:.4f}, from the embedding {views[0]['entry']:.3f}.",
            "",
            *_table(
                ["", *(f"stack {i}" for i in range(1, len(stacks) + 1))],
                [
                    ["change without it", *(f"{stack['removed']:+.3f}" for stack in stacks)],
                    ["loss after it", *(f"{stack['exit']:.3f}" for stack in stacks)],
                    ["update", *(f"{stack['update']:.2f}" for stack in stacks)],
                    ["gradient", *(f"{stack['gradient']:.3f}" for stack in stacks)],
                ],
            ),
            "",
        ]
    return lines


def _exchange(views: Sequence[View]) -> list[str]:
    names = {stack["position"]: i for i, stack in enumerate(views[0]["stacks"], start=1)}
    rows = []
    for view in views:
        cells = []
        for stack in view["stacks"]:
            value = f"{stack['exit'] - view['loss']:+.4f}"
            cells.append(f"**{view['loss']:.3f}**" if stack["position"] == view["owner"] else value)
        alike = view["cka"]
        others = [alike[i][j] for i in range(len(alike)) for j in range(i)]
        rows.append([view["name"], *cells, f"{min(others):.2f} to {max(others):.2f}"])
    return [
        "Independent: loss of the owner of each interval (bold), and how much more it is when **another stack answers** in its "
        "place; stack 1 learned the heaviest noise.",
        "",
        *_table(["", *(f"stack {i}" for i in names.values()), "CKA between the stacks"], rows),
    ]


def _known(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


# --- the drawing -----------------------------------------------------------------------------------------------------


def draw(path: Path, records: Sequence[Record]) -> None:
    """Exit losses and losses without a stack of the frontier's runs, by place. Needs matplotlib."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        after, without = figure.subplots(1, 2)
        runs = of(records, "frontier")
        for run, colour in zip(runs, COLOURS, strict=False):
            view = whole(run)
            stacks = view["stacks"]
            places = range(1, len(stacks) + 1)
            style = "--" if _name(run).startswith("*") else "-"
            marks = {"color": colour, "linestyle": style, "marker": "o", "markersize": 3.5}
            after.plot([0, *places], [view["entry"], *(s["exit"] for s in stacks)], label=run["row"], **marks)
            without.plot(places, [max(s["removed"], 1e-4) for s in stacks], **marks)
        if runs:
            after.axhline(runs[0]["floor"], color="#66707b", linewidth=0.8, linestyle=":")
            after.annotate(
                "entropy", (0.0, runs[0]["floor"]), xycoords=("axes fraction", "data"), va="bottom"
            )
        after.set_title("Loss read after each stack")
        after.set_ylabel("nats per token")
        without.set_title("Change of the loss without each stack")
        without.set_yscale("log")
        without.set_ylabel("nats per token, 0.0001 and less at the bottom")
        for axes in (after, without):
            axes.set_xlabel("stack, from the embedding")
            axes.grid(axis="y", color="#dfe3e8", linewidth=0.6)
            axes.set_axisbelow(True)
        if runs:
            figure.legend(loc="outside lower center", ncols=5, frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
    ops.write_atomic(path, [picture.getbuffer()], kind="text")
