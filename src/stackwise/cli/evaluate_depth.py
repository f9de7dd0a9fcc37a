"""`stackwise eval RUN --depth`: what each stack is good for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stackwise.cli.evaluate_text import own_corpus, set_windows
from stackwise.cli.output import note, print_json, print_table, progress_bar
from stackwise.evaluation.depth_file import BATCHES, depth_record, write_depth
from stackwise.training.device import pick_device
from stackwise.training.stored import OpenRun

LEGEND = {
    "without it": "change of the loss when the state goes past the stack; below 0 it is better without",
    "exit after it": "loss that final norm and head read from the state after the stack",
    "in the owner's place": "loss when this stack answers for the rows instead of the one that owns them",
    "gradient": "norm of the gradient of the loss by the stack's weights, nats per unit of a weight",
    "signal": "norm of the gradient at the state after the stack, nats per token and unit of the state",
    "stream": "root mean square of the state after the stack",
    "update": "norm of what the stack adds to the state, as a share of the state's norm before it",
}
"""What the columns are, in a line each."""


def evaluate_depth(
    path: Path,
    opened: OpenRun,
    *,
    batches: int | None,
    batch_size: int | None,
    as_json: bool,
) -> None:
    """Measure the stacks of a run, keep the figures in its folder, and print them."""
    set_windows(opened, None, None, batch_size)
    corpus = own_corpus(opened)
    opened.rack.to(pick_device("auto"))
    with progress_bar() as bar:
        record = depth_record(
            opened,
            corpus.validation,
            data=corpus.hash,
            batches=batches or BATCHES,
            batch_size=batch_size,
            progress=bar("depth"),
        )
    write_depth(opened, record)
    note(f"the figures are in {opened.folder.depth}; `stackwise report {path}` draws them")
    if as_json:
        print_json(record)
        return
    protocol = record["protocol"]
    print(
        f"{path}, step {record['step']:,}: {protocol['windows']:,} windows of {protocol['seq_len']:,} tokens"
    )
    for view in record["views"]:
        _print_view(view, protocol["unit"], protocol["label"])
    shown = {"exit after it": not all(v["alone"] for v in record["views"])}
    shown["in the owner's place"] = any(v["alone"] for v in record["views"])
    for name, meaning in LEGEND.items():
        if shown.get(name, True):
            print(f"  {name:<21}{meaning}")


def _print_view(view: dict[str, Any], unit: str, label: str) -> None:
    answers = f", answered by {_owner(view)} alone" if view["alone"] else ""
    title = f"{view['name']}{answers}: loss {_figure(view['loss'])} {unit} ({label})"
    first = ("embedding", "", _figure(view["entry"]), "", "", _figure(view["entry_stream"], 3), "")
    rows = [
        (
            f"{stack['uid']} ({stack['format']})" if stack["format"] != "fp32" else stack["uid"],
            _signed(stack["removed"]),
            _figure(stack["exit"]),
            _figure(stack["gradient"]),
            _figure(stack["signal"]),
            _figure(stack["stream"], 3),
            _figure(stack["update"], 3),
        )
        for stack in view["stacks"]
    ]
    read = "in the owner's place" if view["alone"] else "exit after it"
    columns = ["stack", "without it", read, "gradient", "signal", "stream", "update"]
    print(f"\n{title}")
    print_table("", columns, [first, *rows])
    similar = [
        (name, *(_figure(value, 2) for value in row))
        for name, row in zip(view["points"], view["cka"], strict=True)
    ]
    print("Similarity of the outputs (linear CKA)")
    print_table("", ["", *view["points"]], similar)


def _owner(view: dict[str, Any]) -> str:
    return next(str(s["uid"]) for s in view["stacks"] if s["position"] == view["owner"])


def _figure(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}"
