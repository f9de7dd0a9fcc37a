"""The pictures of a page."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec

from stackwise.tracking.drawing import Plot, to_svg
from stackwise.tracking.page import text

__all__ = ["can_draw", "gallery"]

_NO_MATPLOTLIB = 'The plots need matplotlib: pip install "stackwise[train]", then build the report again.'


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def gallery(title: str, plots: Sequence[Plot]) -> str:
    """A section with these pictures, wide ones twice: for a screen and for a phone; "" without any.

    Without matplotlib the section says how to get it, and a warning is issued.
    """
    if not plots:
        return ""
    if not can_draw():
        warnings.warn(_NO_MATPLOTLIB, stacklevel=3)
        return f'<h2>{title}</h2>\n<p class="notice">{text(_NO_MATPLOTLIB)}</p>'
    figures = []
    for plot in plots:
        drawing = f'<div class="narrow">{to_svg(plot)}</div>'
        if plot.wide:
            drawing += f'<div class="wide-drawing">{to_svg(plot, wide=True)}</div>'
        kind = "wide" if plot.wide else "single"
        figures.append(
            f'<figure class="card {kind}" id="{plot.name}"><h3>{plot.title}</h3>\n{drawing}\n'
            f"<figcaption>{plot.caption}</figcaption></figure>"
        )
    return f'<h2>{title}</h2>\n<div class="plots">\n' + "\n".join(figures) + "\n</div>"
