"""The pages as a site (`make site`): Sphinx with MyST and Furo over the Markdown files as they are.

The source folder is the whole project, so that links between pages are the ones that work in any viewer of Markdown.
Every page stands in NAVIGATION once; `tests/docs/test_site.py` sees to it.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

NAVIGATION: dict[str, list[str]] = {
    "Start": ["docs/tutorial", "docs/howto", "examples/README"],
    "Concepts": ["docs/concepts", "docs/glossary"],
    "Models and training": [
        "docs/training",
        "docs/objectives",
        "docs/models",
        "docs/sampling",
        "docs/evaluation",
        "docs/nlu",
        "docs/compare",
        "docs/tracking",
        "docs/checkpoints",
        "docs/interchange",
    ],
    "Reference": ["docs/configuration", "docs/api", "docs/commands"],
    "Results": [
        "docs/frontier",
        "docs/depth-as-time",
        "docs/depth-diagnostics",
        "docs/benchmarks",
        "docs/reliability",
    ],
    "Project": ["docs/architecture", "docs/log", "docs/security", "CONTRIBUTING", "CHANGELOG"],
}
"""Section of the sidebar -> its pages, without `.md`; the front page is README."""

project = "StackWise"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
copyright = "the authors of StackWise"

extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "examples/*.md"]
exclude_patterns = [".*", "src", "tests", "benchmarks", "recipes", "runs", "cache", "site", "build", "dist"]

myst_heading_anchors = 4  # the anchors of headings are those of GitHub
myst_enable_extensions: list[str] = []
nitpicky = True

html_theme = "furo"
html_title = f"StackWise {version}"
html_extra_path = ["front"]  # index.html, which leads to the front page
html_static_path = ["style"]
html_css_files = ["pages.css"]
html_show_sphinx = False
html_copy_source = False


def setup(app: Any) -> None:
    """The front page gets the navigation at its end, where other viewers of the file would show it as code."""
    app.connect("source-read", add_navigation)


def add_navigation(app: Any, page: str, source: list[str]) -> None:
    """Sphinx hands over the text of a page in a list of one, to be changed in place."""
    if page == root_doc:
        trees = [
            "\n".join([f"```{{toctree}}\n:hidden:\n:caption: {section}\n", *(f"/{p}" for p in pages), "```"])
            for section, pages in NAVIGATION.items()
        ]
        source[0] = "\n\n".join([source[0], *trees])
