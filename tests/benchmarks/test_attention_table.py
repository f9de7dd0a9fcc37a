"""The table of attentions: every row trains and decodes, and the page can be written again from its records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 60


@pytest.fixture
def program(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import attention_table

    monkeypatch.setattr(attention_table, "LENGTH", 32)
    monkeypatch.setattr(attention_table, "LENGTHS", (16, 48, 80))
    monkeypatch.setattr(attention_table, "STEPS", 2)
    monkeypatch.setattr(attention_table, "SEEDS", (1,))
    (tmp_path / "input.txt").write_text(TEXT)
    return attention_table


def test_every_attention_trains_decodes_and_stands_in_the_table(program, tmp_path):
    out = tmp_path / "out"
    records = program.main(["--data", str(tmp_path), "--out", str(out)], show=lambda line: None)
    assert [record["name"] for record in records] == list(program.ROWS)
    page = (out / "attention-table.md").read_text()
    assert all(f"| {name} |" in page for name in program.ROWS)
    assert (out / "attention.png").stat().st_size > 5000
    (out / "attention-table.md").unlink()
    program.main(["--report-only", "--out", str(out)])
    assert (out / "attention-table.md").read_text() == page
    assert json.loads((out / "attention-table.json").read_text()) == records


def test_caches_grow_as_their_formulas_say(program):
    grows = {}
    for name in program.ROWS:
        held = program.costs(name)["cache_bytes"]
        grows[name] = (held["80"] - held["48"]) / 32
    blocks, floats, heads, width, rope, latent = 4, 4, 8, 16, 8, 16
    assert grows["multi-head"] == blocks * floats * 2 * heads * width
    assert grows["multi-query"] == blocks * floats * 2 * width
    assert grows["grouped-query (efficient_gqa)"] == blocks * floats * 2 * 2 * width
    assert grows["latent (mla_attention)"] == blocks * floats * (latent + rope)
    assert grows["softmax kernel, linear time"] == 0


def test_a_folder_without_text_is_refused(program, tmp_path):
    with pytest.raises(SystemExit, match=r"no file input\.txt"):
        program.main(["--data", str(tmp_path / "nothing")])
