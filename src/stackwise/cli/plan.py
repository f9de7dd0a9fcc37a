"""`stackwise plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import Json, Overrides, complete_config, load_config
from stackwise.cli.output import note, print_json, print_table

if TYPE_CHECKING:
    from stackwise.planning.advice import Advice
    from stackwise.planning.compare import Comparison
    from stackwise.planning.report import Plan, StagePlan
    from stackwise.planning.shape import ShapePlan

ITEMS = {
    "gradients": "gradients",
    "moments": "moments",
    "activations": "activations",
    "buffers": "streaming",
}
"""Items of a stage's memory, and the heads of their columns."""


def plan(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG]",
            help="A YAML file, or the name of a preset; not with --shape.",
            autocompletion=complete_config,
        ),
    ] = None,
    overrides: Overrides = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Plan for h200, h100-80, a100-80, a100-40, l40s, rtx4090, rtx3090 or t4, or for this machine's cpu, "
            "cuda or mps; by default for where the run would compute here.",
        ),
    ] = None,
    budget_gib: Annotated[
        float | None, typer.Option(metavar="X", help="Memory to fit into, in GiB, in place of the device's.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="TFLOPS", help="TFLOP/s that the run sustains; by default 40 % of the device's peak."
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Plan every curriculum for the same model, side by side.")
    ] = False,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Lay out a model shape (70b, 8b) by rules of thumb, without a config."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the stages of a run and what they cost, before anything runs.

    Per stage: what grows, what trains, steps, tokens, parameters, floating-point operations and the time they take at
    a stated rate; memory by item, counted on the real modules without allocating them; where the outputs of frozen
    blocks come from; host memory and disk. A run that does not fit gets advice that was planned as well.

    \b
    Examples:
      stackwise plan demo
      stackwise plan my.yaml training.progressive.target_stacks=6
      stackwise plan my.yaml --device rtx4090 --compare
      stackwise plan my.yaml --budget-gib 6 --json
      stackwise plan --shape 70b --device h200
    """
    if rate is not None and not rate > 0:
        raise UsageError(f"--rate must be above 0, got {rate}")
    speed = None if rate is None else rate * 1e12
    if shape is not None:
        if config is not None or compare or budget_gib is not None:
            raise UsageError(
                "--shape takes no CONFIG, --compare or --budget-gib; it needs --device and --rate only"
            )
        _shape(shape, device or "h200", speed, as_json)
        return
    if config is None:
        raise UsageError("CONFIG is missing: a YAML file, a preset such as demo, or --shape 70b")
    settings = load_config(config, overrides)
    from stackwise.planning.advice import advise
    from stackwise.planning.compare import compare as side_by_side
    from stackwise.planning.plan import plan as lay_out

    laid_out = lay_out(settings, device, rate=speed, budget_gib=budget_gib)
    comparison = side_by_side(settings, laid_out) if compare else None
    advice = advise(settings, laid_out) if laid_out.fits == "no" else None
    if as_json:
        told = laid_out.to_dict()
        if comparison is not None:
            told["comparison"] = comparison.to_dict()
        if advice is not None:
            told["advice"] = [each.to_dict() for each in advice]
        print_json(told)
        return
    _show(laid_out)
    if comparison is not None:
        _show_comparison(comparison, laid_out)
    if advice is not None:
        _show_advice(advice, laid_out)
    for text in laid_out.notes:
        note(text)


def _show(laid_out: Plan) -> None:
    from stackwise.tracking import units

    rows = [
        [
            f"{number} {stage.name}",
            stage.grows or "-",
            units.steps(stage.steps),
            units.count(stage.tokens),
            units.count(stage.parameters),
            units.count(stage.trainable_parameters),
            units.flops(stage.flops),
            str(stage.units),
            _time(stage.hours),
            units.size(stage.peak_bytes),
            stage.fits,
        ]
        for number, stage in enumerate(laid_out.stages, 1)
    ]
    columns = ["stage", "text:grows", "steps", "tokens", "weights", "trained", "compute", "units", "time"]
    rate = f"{laid_out.rate / 1e12:.3g} TFLOP/s"
    print_table(
        "",
        [*columns, "memory", "text:fits"],
        rows,
        caption=f"In all {units.count(laid_out.total_tokens)} tokens, {units.flops(laid_out.total_flops)} and "
        f"{_time(laid_out.hours)} in {laid_out.dtype} at {rate} ({laid_out.rate_source}). Units: forward passes of "
        f"one block per step. Fits into {units.size(laid_out.device.memory)} of {laid_out.device.name}: "
        f"{laid_out.fits}.",
    )
    last = laid_out.stages[-1]
    if last.active_parameters < last.parameters:
        print(
            f"Experts: a token meets {units.count(last.active_parameters)} of {units.count(last.parameters)} weights"
        )
    _show_memory(laid_out)
    print("\nTrained in each stage")
    for row, stage in zip(rows, laid_out.stages, strict=True):
        print(f"  {row[0]:<10} {', '.join(stage.trains)}")
    if any(stage.trunk != "none" for stage in laid_out.stages):
        print("\nFrozen blocks")
        for row, stage in zip(rows, laid_out.stages, strict=True):
            print(f"  {row[0]:<10} {stage.trunk}: {stage.trunk_reason}")
    print("\nDerived")
    for derived in laid_out.derived:
        print(f"  {derived}")


def _show_memory(laid_out: Plan) -> None:
    """Bytes by item, a row per stage."""
    from stackwise.tracking import units

    formats = sorted({name for stage in laid_out.stages for name in stage.memory.weights})
    shown = [item for item in ITEMS if any(stage.bytes[item] for stage in laid_out.stages)]

    def row(number: int, stage: StagePlan) -> list[str]:
        memory = stage.memory
        return [
            f"{number} {stage.name}",
            *(units.size(memory.weights.get(name, 0)) for name in formats),
            *(units.size(stage.bytes[item]) for item in shown),
            units.size(memory.working),
            units.size(memory.embedding_head),
            units.size(memory.boundaries),
            units.size(memory.logits),
            units.size(memory.host_total),
            units.size(stage.copied_bytes),
            units.size(sum(stage.disk.values())),
        ]

    edges = " Attention is reckoned with a mask: rows may hold document edges." if laid_out.edges else ""
    print_table(
        "Memory by item",
        [
            "stage",
            *(f"weights {name}" for name in formats),
            *(ITEMS[item] for item in shown),
            "working",
            "embedding, head",
            "boundaries",
            "logits",
            "host",
            "copy",
            "disk",
        ],
        [row(number, stage) for number, stage in enumerate(laid_out.stages, 1)],
        caption="Embedding and head (weights, gradients, moments) and boundaries are part of the items before "
        f"them, a chunk of logits of what works at a time. Copy: in main memory while a save is written "
        f"(checkpoint.asynchronous).{edges}",
    )


def _show_comparison(comparison: Comparison, laid_out: Plan) -> None:
    from stackwise.tracking import units

    rows = []
    for row in comparison.rows:
        if row.plan is None:
            rows.append([row.name, *"--------", row.problem])
            continue
        where = (units.size(row.plan.host_bytes), units.size(row.plan.disk_bytes))
        rows.append(
            [
                row.name,
                str(len(row.plan.stages)),
                units.size(row.plan.peak_bytes),
                *where,
                units.flops(row.flops),
                _time(row.hours),
                units.count(row.tokens),
                f"{row.trained_share:.0%}",
                row.plan.fits,
            ]
        )
    print_table(
        "Curricula for the same model",
        [
            "curriculum",
            "stages",
            "memory",
            "host",
            "disk",
            "compute",
            "time",
            "tokens",
            "trained",
            "text:fits",
        ],
        rows,
        caption=f"Compute and time for {units.count(comparison.tokens)} tokens; tokens for "
        f"{units.flops(comparison.flops)}; trained: the share of the tokens that a block trains on. Without blocks that only append has at the head.",
    )
    best = comparison.cheapest
    if best is None:
        print(f"\nNo curriculum fits {laid_out.device.name}.")
    else:
        print(
            f"\nThe cheapest that fits {laid_out.device.name}: {best.name}. What a curriculum costs in loss a plan "
            "cannot know: `stackwise compare` trains several for the same compute."
        )


def _show_advice(advice: list[Advice], laid_out: Plan) -> None:
    from stackwise.tracking import units

    print(f"\nDoes not fit {laid_out.device.name}: {laid_out.largest.name} takes the most memory.")
    if not advice:
        print("  Nothing that was tried makes it smaller; choose a smaller model or a larger device.")
    for each in advice:
        verdict = f"{units.size(each.plan.peak_bytes)}, {_time(each.plan.hours)}"
        if not each.fits:
            print(f"  Nothing that was tried fits. The smallest is {verdict}:")
        print(f"  {each.overrides():<70} {verdict if each.fits else ''}".rstrip())


def _shape(name: str, device: str, rate: float | None, as_json: bool) -> None:
    from stackwise.planning.devices import device_named
    from stackwise.planning.shape import plan_shape

    laid_out = plan_shape(name, device_named(device), rate)
    if as_json:
        print_json(laid_out.to_dict())
        return
    _show_shape(laid_out)


def _show_shape(laid_out: ShapePlan) -> None:
    def gb(size: float) -> str:
        return f"{size / 1e9:.1f}"

    print_table(
        f"{laid_out.name} on {laid_out.device}, GB",
        ["layout", "frozen", "trained", "embedding, head", "activations", "adapters", "in all", "text:fits"],
        [
            [
                row.layout.name + f" at {row.layout.bytes_each:.0f} B",
                gb(row.frozen),
                gb(row.trained),
                gb(row.embedding_head),
                gb(row.activations),
                gb(row.adapters) if row.adapters else "-",
                f"{row.total / 1e9:.0f}",
                row.fits,
            ]
            for row in laid_out.rows
        ],
        caption=f"{laid_out.block_parameters / 1e9:.4f} G parameters per layer, {laid_out.trunk_parameters / 1e9:.2f} G "
        "in all layers; 16,384 tokens at a time; in all with 0.5 GB of buffers and what the device reserves. "
        "Activations as for blocks that run again in the backward pass and a bf16 stream between them.",
    )
    print_table(
        f"Days per 10^9 tokens seen by every layer, at {laid_out.rate / 1e12:.0f} TFLOP/s",
        ["scheme", "FLOP per token", "days", "stored, TB"],
        [
            [
                row.name,
                f"{2 * row.units:.4g} N",
                f"{row.days:.1f}",
                f"{row.cache_bytes / 1e12:.1f}" if row.cache_bytes else "-",
            ]
            for row in laid_out.days
        ],
        caption=f"{laid_out.tokens_per_day / 1e6:.0f} M tokens a day end to end.",
    )


def _time(hours: float) -> str:
    from stackwise.tracking import units

    return units.duration(hours * 3600)
