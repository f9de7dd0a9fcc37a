"""`stackwise plan`."""

from __future__ import annotations

from stackwise.cli.options import Config, Json, Overrides, load_config
from stackwise.cli.output import note, print_json, print_table


def plan(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show the stages of a run and what they cost, before anything runs.

    Per stage: what grows, what trains, steps, tokens, parameters, floating-point operations, and the memory of
    weights, gradients and optimizer moments. Activations come on top; they depend on batch_size and seq_len.

    \b
    Examples:
      stackwise plan demo
      stackwise plan my.yaml training.progressive.target_stacks=6
      stackwise plan my.yaml --json
    """
    settings = load_config(config, overrides)
    from stackwise.planning.plan import plan as lay_out
    from stackwise.tracking import units

    laid_out = lay_out(settings)
    if as_json:
        print_json(laid_out.to_dict())
        return
    rows = [
        [
            f"{number} {stage.name}",
            stage.grows or "-",
            units.steps(stage.steps),
            units.count(stage.tokens),
            units.count(stage.parameters),
            units.count(stage.trainable_parameters),
            units.flops(stage.flops),
            units.size(sum(stage.bytes.values())),
        ]
        for number, stage in enumerate(laid_out.stages, 1)
    ]
    largest = max(laid_out.stages, key=lambda stage: sum(stage.bytes.values()))
    items = " + ".join(f"{name} {units.size(size)}" for name, size in largest.bytes.items())
    print_table(
        "",
        ["stage", "text:grows", "steps", "tokens", "weights", "trained", "compute", "memory"],
        rows,
        caption=f"In all {units.count(laid_out.total_tokens)} tokens and {units.flops(laid_out.total_flops)}. "
        f"Memory at its largest, in {largest.name}: {items}.",
    )
    print("\nTrained in each stage")
    for row, stage in zip(rows, laid_out.stages, strict=True):
        print(f"  {row[0]:<10} {', '.join(stage.trains)}")
    print("\nDerived")
    for derived in laid_out.derived:
        print(f"  {derived}")
    for text in laid_out.notes:
        note(text)
