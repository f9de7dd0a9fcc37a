"""The site: the pages as they are, built without a warning; nothing in it leads nowhere or to the network."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

for name in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(name, reason='the site needs: pip install -e ".[docs]" -c constraints.txt')

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """What `make site` runs, from `source` to `out`."""
    options = ["-W", "--keep-going", "-q", "-b", "html", "-c", str(ROOT / "docs")]
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(source), str(out)], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def conf() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """Addresses that a page links or loads, and the anchors it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.links, self.loaded, self.anchors = path, [], [], set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {values.get("id")}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if address := values.get("src") or (tag == "link" and values.get("href")):
            self.loaded.append(address)


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path.resolve(): Page(path) for path in site.rglob("*.html")}


def test_every_page_has_one_place_in_the_navigation(conf: ModuleType) -> None:
    listed = [page for section in conf.NAVIGATION.values() for page in section]
    written = [str(page.relative_to(ROOT).with_suffix("")) for page in SOURCES]
    assert sorted([conf.root_doc, *listed]) == sorted(written), "NAVIGATION in docs/conf.py"


def test_every_page_is_reached_from_the_sidebar_of_every_page(conf: ModuleType, site: Path) -> None:
    for page in [page for section in conf.NAVIGATION.values() for page in section]:
        sidebar = re.search(
            r'class="sidebar-tree">(.*?)</aside>', (site / f"{page}.html").read_text("utf-8"), re.S
        )
        assert sidebar is not None
        assert sidebar[1].count('class="toctree-l1') == len(SOURCES) - 1


def test_the_folder_opens_at_the_front_page(site: Path) -> None:
    assert 'url=README.html"' in (site / "index.html").read_text()
    assert "Two commands" in (site / "README.html").read_text("utf-8")


def test_every_link_leads_to_a_file_and_an_anchor_in_it(pages: dict[Path, Page]) -> None:
    broken = []
    for page in pages.values():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            file, _, anchor = unquote(link).partition("#")
            target = (page.path.parent / file).resolve() if file else page.path.resolve()
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append((page.path.name, link))
    assert broken == []
    assert sum(len(page.links) for page in pages.values()) > 1000


def test_nothing_is_loaded_from_the_network(pages: dict[Path, Page]) -> None:
    assert [a for page in pages.values() for a in page.loaded if re.match(r"(https?:)?//", a)] == []


@pytest.mark.parametrize(
    ("word", "page"),
    [
        ("bucket", "docs/training"),
        ("nf4", "docs/training"),
        ("alibi", "docs/models"),
        ("perplex", "docs/objectives"),
    ],
)
def test_the_search_finds_words_of_the_text(site: Path, word: str, page: str) -> None:
    text = (site / "searchindex.js").read_text("utf-8")
    index = json.loads(text[text.index("(") + 1 : text.rindex(")")])
    found = index["terms"][word]
    names = [index["docnames"][i] for i in ([found] if isinstance(found, int) else found)]
    assert page in names


def test_a_link_to_nowhere_breaks_the_build(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Front\n\nSee [below](#nowhere).\n")
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode != 0
    assert "nowhere" in done.stderr
