"""The last section of a report: what it takes to run the same again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stackwise.config.document import dump, parse
from stackwise.config.errors import ConfigError, masked
from stackwise.tracking.page import ReportedRun, text

__all__ = ["how_to_repeat"]


def how_to_repeat(reported: ReportedRun) -> str:
    """Configuration, environment and notes, folded up."""
    run, folder = reported.history, reported.folder
    sections = [
        ("Configuration", folder.config.name, _config_text(folder.config)),
        ("Environment", folder.environment.name, _environment_text(folder.environment)),
    ]
    if run.notes:
        sections.append(("Notes", f"{len(run.notes)}", "\n".join(event["message"] for event in run.notes)))
    parts = [
        f'<details class="card"><summary>{title} <small>{text(detail)}</small></summary>\n<pre>{text(content)}</pre>'
        "</details>"
        for title, detail, content in sections
    ]
    return "<h2>How to repeat it</h2>\n" + "\n".join(parts)


def _environment_text(path: Path) -> str:
    found = _file_text(path)
    try:
        facts: Any = json.loads(found)
    except ValueError:
        return found
    return "\n".join(_flat_lines("", facts)) if isinstance(facts, dict) else found


def _flat_lines(prefix: str, facts: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += _flat_lines(f"{prefix}{name}.", value)
        else:
            lines.append(f"{prefix}{name}: {value if isinstance(value, str) else json.dumps(value)}")
    return lines


def _config_text(path: Path) -> str:
    """The configuration as it was written, but for secrets: a report is shown to others."""
    found = _file_text(path)
    try:
        data = parse(found, path.name).data
    except ConfigError:
        return found
    return found if masked(data) == data else dump(masked(data))


def _file_text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
