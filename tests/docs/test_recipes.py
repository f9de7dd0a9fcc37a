"""Every recipe loads, says how to run it, and can be planned; the two that are compared cost the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from stackwise import StackWiseConfig, plan

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def load(recipe: Path, tmp_path: Path) -> StackWiseConfig:
    text = tmp_path / "my.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 200)
    return StackWiseConfig.from_yaml(recipe, [f"data.path={text}", f"checkpoint.dir={tmp_path / 'runs'}"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_without_notes_and_can_be_planned(recipe: Path, tmp_path: Path) -> None:
    config = load(recipe, tmp_path)
    assert config.notes() == []
    assert config.training.run_id == recipe.stem
    assert len(plan(config).stages) == (5 if config.training.progressive.enabled else 1)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_trains_and_how_to_run_it(recipe: Path) -> None:
    head = recipe.read_text().partition("\n\n")[0]
    assert f"stackwise train recipes/{recipe.name}" in head.replace("  ", " ")


def test_the_end_to_end_control_costs_what_the_append_run_costs(tmp_path: Path) -> None:
    plans = {r.stem: plan(load(r, tmp_path)) for r in RECIPES if r.stem.endswith("-text")}
    grown, control = plans["append-text"], plans["end-to-end-text"]
    assert control.total_flops == pytest.approx(grown.total_flops, rel=0.005)
    assert control.stages[-1].parameters == grown.stages[-1].parameters
