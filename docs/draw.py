"""Draws the pictures of docs/concepts.md as SVG files in docs/pictures.

    python docs/draw.py            write them again (`make docs`)

Each picture brings its own background, light or dark as the reader's system has it, so that it can be read on any page.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

PICTURES = Path(__file__).parent / "pictures"
WIDTH = 700

STYLE = """
  text { font: 14px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2430; }
  .small { font-size: 12px; } .bold { font-weight: 600; } .soft { fill: #596273; } .mono { font-family: monospace; }
  .paper { fill: #ffffff; } rect, path { stroke-width: 1.4; }
  .trains { fill: #f6a463; stroke: #b8581a; } .frozen { fill: #d9dee7; stroke: #8a94a6; }
  .through { fill: #fdebdc; stroke: #b8581a; stroke-dasharray: 4 3; } .absent { fill: none; stroke: #b6bdca; stroke-dasharray: 2 4; }
  .frame { fill: none; stroke: #8a94a6; } .wire { fill: none; stroke: #596273; } .head { fill: #596273; }
  .listed { fill: none; stroke: #8a94a6; } .a { fill: #9cc4ee; stroke: #2b6cb0; } .b { fill: #8fd3c1; stroke: #1f7a64; }
  .c { fill: #f2cf7e; stroke: #94690a; } .d { fill: #d9b3e6; stroke: #7b3f96; } .dark-ink { fill: #1f2430; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e8eaf0; } .soft { fill: #aab2c0; } .paper { fill: #171a20; }
    .frozen { fill: #3b4250; stroke: #828c9e; } .through { fill: #3a2a1e; stroke: #e58a45; } .trains { fill: #c9672a; stroke: #f3a566; }
    .absent { stroke: #545d6d; } .wire { stroke: #aab2c0; } .head { fill: #aab2c0; } .listed { stroke: #828c9e; }
    .a { fill: #2b6cb0; } .b { fill: #1f7a64; } .c { fill: #94690a; } .d { fill: #7b3f96; } .dark-ink { fill: #e8eaf0; }
  }
"""


class Picture:
    """Boxes, words and arrows on a sheet of WIDTH by `height` pixels; `title` is what a screen reader says."""

    def __init__(self, title: str, height: int) -> None:
        self.title, self.height, self.parts = title, height, list[str]()

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def box(self, x: float, y: float, w: float, h: float, kind: str, words: str = "", size: str = "") -> None:
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" class="{kind}"/>')
        if words:
            self.text(x + w / 2, y + h / 2 + 5, words, f"dark-ink {size}")

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.parts.append(f'<path d="M{x:g} {y:g} L{to_x:g} {to_y:g}" class="wire" marker-end="url(#tip)"/>')

    def line(self, path: str) -> None:
        self.parts.append(f'<path d="{path}" class="wire"/>')

    def svg(self) -> str:
        tip = (
            '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z" class="head"/></marker>'
        )
        body = "\n".join(f"  {part}" for part in self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img">\n'
            f"  <title>{escape(self.title)}</title>\n  <style>{STYLE}  </style>\n  <defs>{tip}</defs>\n"
            f'  <rect class="paper" width="{WIDTH}" height="{self.height}" rx="8"/>\n{body}\n</svg>\n'
        )


def rack() -> Picture:
    p = Picture(
        "A rack is an embedding, stacks of blocks, a tail, a final norm and a head; a block is one layer", 268
    )
    p.text(20, 30, "Rack", "bold", "start")
    x, y, h = 20, 62, 54
    places = [
        ("embedding", 84),
        ("Stack 0", 112),
        ("Stack 1", 112),
        ("Stack 2", 112),
        ("tail", 54),
        ("norm", 54),
        ("head", 54),
    ]
    for name, width in places:
        if name.startswith("Stack"):
            p.box(x, y - 14, width, h + 28, "frame")
            p.text(x + width / 2, y - 22, name, "small")
            p.box(x + 10, y, 42, h, "a", "Block", "small")
            p.box(x + 60, y, 42, h, "a", "Block", "small")
        else:
            p.box(x, y, width, h, "frozen", name, "small")
        if name != "head":
            p.arrow(x + width + 1, y + h / 2, x + width + 13, y + h / 2)
        x += width + 14
    p.text(
        WIDTH / 2,
        152,
        "older stacks  ←  position 0, 1, 2 from the embedding  →  newest, under append",
        "small soft",
    )
    p.text(20, 188, "Block", "bold", "start")
    x, y = 84, 196
    p.arrow(x - 24, y + 22, x, y + 22)
    names = [("norm", 62), ("attention", 92), ("+", 30), ("norm", 62), ("feed-forward", 112), ("+", 30)]
    starts: list[float] = []
    for name, width in names:
        starts.append(x)
        p.box(x, y, width, 44, "frozen" if name in ("norm", "+") else "a", name)
        p.arrow(x + width + 1, y + 22, x + width + 19, y + 22)
        x += width + 20
    for begin, plus in ((0, 2), (3, 5)):
        left, right = starts[begin] - 10, starts[plus] + 15
        p.line(f"M{left:g} {y + 22} L{left:g} {y - 12} L{right:g} {y - 12} L{right:g} {y}")
    return p


def split() -> Picture:
    p = Picture(
        "Which part of the rack is prefix, active or suffix under append, prepend and cyclic training", 404
    )
    rows = [
        ("append", "fffT", "the newest stack is next to the head"),
        ("prepend", "Tsss", "the newest stack is next to the embedding"),
        ("cyclic", "fTss", "the visited stack is somewhere inside"),
    ]
    kinds = {"f": "frozen", "T": "trains", "s": "through"}
    y = 34
    for name, cells, why in rows:
        p.text(20, y + 6, name, "bold", "start")
        p.text(100, y + 6, why, "small soft", "start")
        ends = "T" if name == "append" else "s"
        x = 20
        for label, width, cell in [
            ("embedding", 96, "f"),
            *[(f"Stack {i}", 92, c) for i, c in enumerate(cells)],
            ("norm, head", 96, ends),
        ]:
            p.box(x, y + 16, width, 34, kinds[cell], label, "small")
            x += width + 8
        y += 76
    y += 4
    heads = ["", "weights", "gradients", "moments", "activations", "backward pass"]
    costs = [
        ("prefix", "frozen", "yes *", "–", "–", "–", "–"),
        ("active", "trains", "yes", "yes", "yes", "yes", "yes"),
        ("suffix", "through", "yes *", "–", "–", "yes", "to its input only"),
    ]
    columns = [20, 150, 246, 346, 450, 590]
    for x, words in zip(columns[1:], heads[1:], strict=True):
        p.text(x + 20, y + 8, words, "small bold")
    for name, kind, *cells in costs:
        y += 30
        p.box(20, y - 10, 84, 24, kind, name, "small")
        for x, words in zip(columns[1:], cells, strict=True):
            p.text(x + 20, y + 7, words, "small")
    p.text(
        20, y + 38, "* may be stored in 16, 8 or 4 bits, or streamed from host memory", "small soft", "start"
    )
    return p


CURRICULA = [
    ("append", ["T", "fT", "ffT", "TTT"], ["1", "2", "3", "joint"]),
    ("prepend", ["T", "Ts", "Tss"], ["1", "2", "3"]),
    ("grow", ["T", "TT", "TTTT"], ["1", "2", "3"]),
    ("cyclic", ["Tss", "fTs", "ffT"], ["visit", "visit", "visit"]),
    ("independent", ["T..", ".T.", "..T", "fff"], ["any", "any", "any", "merged"]),
    ("append, gradual joint phase", ["T", "fT", "ffT", "fTT", "TTT"], ["1", "2", "3", "joint", "joint"]),
    ("end to end", ["TTT"], ["1"]),
]
"""Name; of every stage its stacks from the embedding up (T trains, f frozen prefix, s frozen suffix, . absent); labels."""


def curricula() -> Picture:
    p = Picture("Seven curricula: which stacks are there and which of them train in every stage", 452)
    kinds = {"T": "trains", "f": "frozen", "s": "through", ".": "absent"}
    places = [(20, 24), (208, 24), (368, 24), (528, 24), (20, 222), (248, 222), (528, 222)]
    for (name, stages, labels), (left, top) in zip(CURRICULA, places, strict=True):
        p.text(left, top + 12, name, "bold", "start")
        floor = top + 146
        for column, (stage, label) in enumerate(zip(stages, labels, strict=True)):
            x = left + column * 42
            for height, cell in enumerate(stage):
                p.box(x, floor - 28 * (height + 1), 36, 24, kinds[cell])
            p.text(x + 18, floor + 14, label, "small soft")
    y = 420
    p.text(20, y + 17, "top: next to the head", "small soft", "start")
    for x, kind, words in (
        (190, "trains", "trains"),
        (290, "frozen", "frozen, no gradient"),
        (460, "through", "frozen, gradient passes"),
    ):
        p.box(x, y, 28, 22, kind)
        p.text(x + 36, y + 16, words, "small", "start")
    return p


def depth_as_time() -> Picture:
    p = Picture("Each of four stacks owns a quarter of the shares of hidden characters", 322)
    p.text(20, 30, "Which stack owns which share of hidden characters", "bold", "start")
    left, width = 60, 580
    stacks = [
        ("a", "Stack 3, next to the head"),
        ("b", "Stack 2"),
        ("c", "Stack 1"),
        ("d", "Stack 0, next to the embedding"),
    ]
    rows = [
        "the cat sat ▢n the mat",
        "t▢e c▢t ▢at on ▢he ma▢",
        "▢h▢ ▢▢t s▢▢ ▢n t▢▢ ▢at",
        "▢▢▢▢c▢▢ ▢▢▢▢▢▢▢▢▢▢ ▢▢▢",
    ]
    for i, ((kind, _), row) in enumerate(zip(stacks, rows, strict=True)):
        p.box(left + i * width / 4, 50, width / 4, 36, kind, f"Stack {3 - i}")
        y = 162 + 32 * i
        p.box(60, y - 15, 20, 20, kind)
        p.text(92, y, row, "mono", "start")
        p.text(
            340,
            y,
            ["light noise: one pass fills the rest", "", "", "heavy noise: begins with a blank page"][i],
            "small soft",
            "start",
        )
    for i in range(5):
        p.text(left + i * width / 4, 106, ["0", "1/4", "1/2", "3/4", "1"][i], "small")
    p.arrow(left + width, 122, left, 122)
    p.text(
        60,
        288,
        "Sampling goes along the arrow, from heavy noise to light, one stack after the other.",
        "small",
        "start",
    )
    p.text(
        60,
        308,
        "Training: each stack alone between embedding and head, on the share that it owns.",
        "small",
        "start",
    )
    return p


def commit() -> Picture:
    p = Picture("Three commits of a growing run list the same files where a part has not changed", 330)
    parts = ["embedding", "Stack 0", "Stack 1", "Stack 2", "tail, norm, head", "optimizer state"]
    grid = [
        ("stage-01", ["new", "new", "", "", "new", "new"]),
        ("stage-02", ["same", "same", "new", "", "new", "new"]),
        ("stage-03", ["same", "same", "same", "new", "new", "new"]),
    ]
    p.text(20, 30, "What a commit writes", "bold", "start")
    for row, name in enumerate(parts):
        p.text(20, 86 + 34 * row, name, "small", "start")
    for column, (pin, cells) in enumerate(grid):
        x = 170 + column * 176
        p.text(x + 66, 54, pin, "small bold")
        for row, cell in enumerate(cells):
            y = 68 + 34 * row
            if cell == "new":
                p.box(x, y, 132, 26, "trains", "written", "small")
            elif cell == "same":
                p.box(x, y, 132, 26, "listed", "the same file", "small")
                p.arrow(x - 4, y + 13, x - 40, y + 13)
    p.text(
        20,
        296,
        "A part is a file named by the SHA-256 of its bytes; a commit is a list of such names, the place in the",
        "small soft",
        "start",
    )
    p.text(
        20,
        314,
        "data, counters and random states. Optimizer state is there for what trains.",
        "small soft",
        "start",
    )
    return p


DRAWINGS = {
    "rack": rack,
    "split": split,
    "curricula": curricula,
    "depth-as-time": depth_as_time,
    "commit": commit,
}


def pictures() -> dict[Path, str]:
    """File -> its text, as it should be."""
    return {PICTURES / f"{name}.svg": draw().svg() for name, draw in DRAWINGS.items()}


if __name__ == "__main__":
    for path, text in pictures().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
