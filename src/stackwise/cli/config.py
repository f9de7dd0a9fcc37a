"""`stackwise config`: show, validate, schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import Config, Json, Overrides, complete_section, load_config
from stackwise.cli.output import note, print_json

if TYPE_CHECKING:
    from stackwise.config.resolve import Derived

app = typer.Typer(no_args_is_help=True, help="Show and check configurations, and list their keys.")


@app.command("show")
def show(
    config: Config,
    overrides: Overrides = None,
    source: Annotated[
        bool, typer.Option("--source", help="Print the file as it was written, with its comments.")
    ] = False,
) -> None:
    """Print the resolved configuration as YAML.

    Every key is there, and a value that was derived carries the reason as a comment. What depends on the data or the
    machine (vocabulary, device, number format) stays open until a run starts. The output is a configuration itself.

    \b
    Examples:
      stackwise config show demo
      stackwise config show demo training.max_steps=50
      stackwise config show demo --source > my.yaml
    """
    settings = load_config(config, overrides)
    if source:
        from stackwise.config.presets import locate

        if overrides:
            raise UsageError("--source prints the file as it was written: leave the overrides out")
        print(locate(config).read_text("utf-8"), end="")
        return
    from stackwise.config.document import dump
    from stackwise.config.errors import masked
    from stackwise.config.resolve import resolve

    resolved, derived = resolve(settings)
    print(_commented(dump(masked(resolved.to_dict())), derived), end="")
    for text in settings.notes():
        note(text)


@app.command("validate")
def validate(config: Config, overrides: Overrides = None) -> None:
    """Check a configuration: exit code 0, or 2 with every problem listed at once.

    \b
    Examples:
      stackwise config validate my.yaml
      stackwise config validate my.yaml model.d_model=384
    """
    settings = load_config(config, overrides)
    from stackwise.config.resolve import resolve

    resolve(settings)
    print(f"{config} is valid")
    for text in settings.notes():
        note(text)


@app.command("schema")
def schema(
    section: Annotated[
        str,
        typer.Argument(
            metavar="[SECTION]",
            help="Only the keys below this one, such as training.optimizer.",
            autocompletion=complete_section,
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """List every key with its type, default, allowed values and help.

    \b
    Examples:
      stackwise config schema
      stackwise config schema training.optimizer
      stackwise config schema --json
    """
    from stackwise.config.errors import did_you_mean
    from stackwise.config.schema import schema_rows

    every = schema_rows()
    rows = [row for row in every if not section or f"{row.key}.".startswith(f"{section}.")]
    if not rows:
        keys = {row.key for row in every}
        sections = {key[:end] for key in keys for end, char in enumerate(key) if char == "."}
        hint = did_you_mean(section, sorted(keys | sections)) or "`stackwise config schema` lists them all"
        raise UsageError(f"there is no key or section {section!r}; {hint}")
    if as_json:
        print_json([row._asdict() for row in rows])
        return
    for row in rows:
        key = typer.style(row.key, bold=True)  # echo drops the style where it goes to a file
        typer.echo(f"{key}: {row.type} = {row.default}\n    {row.help}\n    allowed: {row.allowed}\n")


def _commented(text: str, derived: list[Derived]) -> str:
    """The YAML text with the reason behind each value that was derived."""
    reasons = {item.key: item.reason for item in derived}
    lines: list[str] = []
    path: list[str] = []
    for line in text.splitlines():
        name, colon, _ = line.strip().partition(":")
        if colon and not name.startswith("- "):
            depth = (len(line) - len(line.lstrip())) // 2
            path = [*path[:depth], name]
            if reason := reasons.get(".".join(path)):
                line += f"  # {reason}"
        lines.append(line)
    return "\n".join(lines) + "\n"
