"""The pages hold together: links lead somewhere, what they name exists, and the generated parts are current."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import stackwise

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_internal_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_tests_that_a_page_names_exist(page: Path) -> None:
    missing = []
    for name in re.findall(r"`((?:src|tests|docs|benchmarks|recipes|\.ci)/[\w./-]*(?:::\w+)?)`", prose(page)):
        file, _, test = name.partition("::")
        path = ROOT / file
        if not path.exists() or (test and test not in functions(path)):
            missing.append(name)
    assert missing == []


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_generated_parts_are_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stale = [page.name for page, text in generate.pages().items() if page.read_text("utf-8") != text]
    assert stale == [], "run `make docs`"


def test_every_page_is_reached_from_the_front_page() -> None:
    linked = set(re.findall(r"\]\((docs/[\w.-]+)", (ROOT / "README.md").read_text("utf-8")))
    assert {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} <= linked


def test_the_changelog_knows_the_version() -> None:
    assert f"## [{stackwise.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_version_is_the_same_in_the_package_and_its_build_file() -> None:
    assert f'\nversion = "{stackwise.__version__}"\n' in (ROOT / "pyproject.toml").read_text("utf-8")
