"""The pages hold together: links lead somewhere, what they name exists, and the generated parts are current."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

import stackwise

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])


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
    for name in re.findall(
        r"`((?:src|tests|docs|benchmarks|recipes|examples|\.ci)/[\w./-]*(?:::\w+)?)`", prose(page)
    ):
        file, _, test = name.partition("::")
        path = ROOT / file
        if not path.exists() or (test and test not in functions(path)):
            missing.append(name)
    assert missing == []


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def program(name: str) -> ModuleType:
    """A program in docs/, loaded and not run."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current() -> None:
    stale = [
        page.name for page, text in program("generate").pages().items() if page.read_text("utf-8") != text
    ]
    assert stale == [], "run `make docs`"


def test_pictures_are_current_and_each_is_on_a_page() -> None:
    pictures = program("draw").pictures()
    assert [path.name for path, text in pictures.items() if path.read_text("utf-8") != text] == [], (
        "run `make docs`"
    )
    assert set(pictures) == set((ROOT / "docs" / "pictures").glob("*.svg"))
    shown = {
        name for page in PAGES for name in re.findall(r"\]\((?:docs/)?pictures/([\w.-]+)\)", prose(page))
    }
    assert {path.name for path in pictures} <= shown


@pytest.mark.parametrize("picture", sorted(ROOT.glob("docs/pictures/*.svg")), ids=lambda path: path.name)
def test_a_picture_has_a_title_and_stays_on_its_sheet(picture: Path) -> None:
    root = ElementTree.parse(picture).getroot()
    width, height = (float(number) for number in root.attrib["viewBox"].split()[2:])
    tag = "{http://www.w3.org/2000/svg}"
    assert root.findtext(f"{tag}title")
    assert "prefers-color-scheme: dark" in (root.findtext(f"{tag}style") or "")
    for box in root.iter(f"{tag}rect"):
        x, y, w, h = (float(box.get(name, 0)) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
    for text in root.iter(f"{tag}text"):
        assert 0 < float(text.attrib["y"]) < height


def test_every_page_is_reached_from_the_front_page() -> None:
    linked = set(re.findall(r"\]\((docs/[\w.-]+)", (ROOT / "README.md").read_text("utf-8")))
    assert {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} <= linked


def test_the_changelog_knows_the_version() -> None:
    assert f"## [{stackwise.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_version_is_the_same_in_the_package_and_its_build_file() -> None:
    assert f'\nversion = "{stackwise.__version__}"\n' in (ROOT / "pyproject.toml").read_text("utf-8")
