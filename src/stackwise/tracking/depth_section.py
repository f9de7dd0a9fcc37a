"""The section of a report on what each stack is good for, from ``depth.json`` (``stackwise eval RUN --depth``)."""

from __future__ import annotations

from typing import Any

from stackwise.storage.errors import DamagedFileError, UnsafeInputError
from stackwise.storage.regular import read_json
from stackwise.tracking import units
from stackwise.tracking.depth_drawings import bars, curve, heat_map
from stackwise.tracking.page import ReportedRun, text

__all__ = ["depth"]

_AGAIN = "stackwise eval RUN --depth measures again."


def depth(reported: ReportedRun) -> str:
    """Drawings and a table for each range of noise, or one of each; "" without ``depth.json``.

    Figures of another commit than the last one in the log are left out with a notice, and so is a broken file.
    """
    path = reported.folder.depth
    if not path.exists():
        return ""
    head = "<h2>What each stack is good for</h2>\n"
    try:
        record = read_json(path)
        last = next((event["commit"] for event in reversed(reported.history.checkpoints)), None)
        if last is not None and record["commit"] != last:
            return head + _notice(
                f"{path.name} is of step {int(record['step']):,}, and the run has gone on since. {_AGAIN}"
            )
        views = "\n".join(_view(view, record["protocol"]) for view in record["views"])
        protocol = record["protocol"]
        caption = (
            f"On {protocol['windows']:,} held-out windows of {protocol['seq_len']:,} tokens at step {record['step']:,}. "
            f"Losses are in {text(protocol['unit'])} ({text(protocol['label'])})."
        )
    except (
        DamagedFileError,
        UnsafeInputError,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        return head + _notice(f"{path.name} cannot be read ({type(error).__name__}: {error}). {_AGAIN}")
    return f'{head}<p class="caption">{caption}</p>\n{views}'


def _view(view: dict[str, Any], protocol: dict[str, Any]) -> str:
    stacks = view["stacks"]
    names = [str(stack["uid"]) for stack in stacks]
    owner = next((str(s["uid"]) for s in stacks if s["position"] == view["owner"]), None)
    title = "" if view["noise"] is None else f'<h3 class="part">{text(_heading(view, owner))}</h3>\n'
    unit = protocol["unit"]
    with_entry = ["in", *names]
    similar = ["in", *names] if len(view["points"]) > len(names) else names
    exits = [view["entry"], *(stack["exit"] for stack in stacks)]
    figures = []
    if owner is None:
        figures = [
            (
                "Loss after each stack",
                curve("Loss after each stack", with_entry, exits, view["loss"]),
                f"What the head reads from the state after each stack; in: from the embedding. The dashed line is the whole, "
                f"{units.loss(view['loss'])}.",
            ),
            (
                "Loss without each stack",
                bars("Loss without each stack", names, [stack["removed"] for stack in stacks]),
                f"Change of the loss when the state goes past one stack, {text(unit)}. Below zero the model is better "
                "without it.",
            ),
        ]
    else:
        instead = [stack["exit"] - view["loss"] for stack in stacks]
        label = "Loss with another stack in its place"
        figures = [
            (
                label,
                bars(label, names, instead),
                f"Change of the loss when another stack answers than the owner, {text(owner)}. Below zero the other is better.",
            )
        ]
    if owner is None:
        by_stack = (
            (
                "update",
                "Size of the update",
                "How much a stack changes the state of a token, as a share of its norm before.",
            ),
            (
                "gradient",
                "Gradient of each stack",
                "Norm of the gradient of the loss with respect to the weights; none where they are packed.",
            ),
            (
                "signal",
                "Gradient at each stack",
                "How much the loss still depends on the state after the stack: norm of the gradient there, per token.",
            ),
        )
        figures += [
            (title, bars(title, names, [stack[key] for stack in stacks]), caption)
            for key, title, caption in by_stack
        ]
    figures.append(
        (
            "Similarity of the outputs",
            heat_map("Similarity of the outputs", similar, view["cka"]),
            "Linear CKA between the states after the stacks: 1 says the same up to rotation and scale.",
        )
    )
    drawn = "\n".join(
        f'<figure class="card single"><h3>{name}</h3>\n{svg}\n<figcaption>{caption}</figcaption></figure>'
        for name, svg, caption in figures
    )
    return f'{title}<div class="plots">\n{drawn}\n</div>\n{_table(view, owner)}'


def _heading(view: dict[str, Any], owner: str | None) -> str:
    answers = "" if owner is None else f", answered by {owner} alone"
    return f"{view['name']}{answers}: loss {units.loss(view['loss'])}"


def _table(view: dict[str, Any], owner: str | None) -> str:
    read = "Loss after it" if owner is None else "In the owner's place"
    heads = ("Change without it", read, "Gradient", "Signal", "Stream", "Update")
    rows = []
    for stack in view["stacks"]:
        change = "–" if stack["removed"] is None else units.signed(stack["removed"])
        cells = [
            change,
            units.loss(stack["exit"]),
            *(_figure(stack[n]) for n in ("gradient", "signal", "stream", "update")),
        ]
        packed = "" if stack["format"] == "fp32" else f" <small>{text(stack['format'])}</small>"
        data = "".join(
            f'<td data-label="{text(label)}">{cell}</td>' for label, cell in zip(heads, cells, strict=True)
        )
        rows.append(f"<tr><th>{text(str(stack['uid']))}{packed}</th>{data}</tr>")
    columns = "".join(f"<th>{text(head)}</th>" for head in heads)
    return (
        '<details class="card"><summary>Figures <small>gradient, signal, stream and update by stack</small></summary>\n'
        f'<div class="scroll"><table class="cards">\n<thead><tr><th>Stack</th>{columns}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div></details>"
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _notice(message: str) -> str:
    return f'<p class="notice">{text(message)}</p>'
