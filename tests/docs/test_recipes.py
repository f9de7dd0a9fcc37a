"""Every recipe loads, says how to run it, and has its stages; the two that are compared cost the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stackwise import Rack, StackWiseConfig, stages
from stackwise.config.resolve import resolve
from stackwise.config.shape import names_of
from stackwise.curriculum.costs import stage_flops
from stackwise.curriculum.settings import CurriculumKeys
from stackwise.data.tokenizers import ByteTokenizer
from stackwise.model.describe import rack_spec

STAGES = {
    "append-text": 5,
    "prepend-text": 5,
    "grow-text": 4,
    "cyclic-text": 40,
    "independent-text": 4,
    "stages-text": 5,
    "end-to-end-text": 1,
    "shakespeare-char": 1,
}
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def load(recipe: Path, tmp_path: Path) -> StackWiseConfig:
    text = tmp_path / "my.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 200)
    return StackWiseConfig.from_yaml(recipe, [f"data.path={text}", f"checkpoint.dir={tmp_path / 'runs'}"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_without_notes_and_has_its_stages(recipe: Path, tmp_path: Path) -> None:
    config = load(recipe, tmp_path)
    assert config.notes() == []
    assert config.training.run_id == recipe.stem
    if recipe.stem in STAGES:
        assert len(stages(config)) == STAGES[recipe.stem]


def test_every_building_mode_has_a_recipe(tmp_path: Path) -> None:
    shown = [load(recipe, tmp_path).training for recipe in RECIPES]
    modes = names_of(CurriculumKeys.model_fields["building_mode"])
    assert {training.progressive.building_mode for training in shown} == set(modes)
    assert any(training.stages for training in shown)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_trains_and_how_to_run_it(recipe: Path) -> None:
    head = recipe.read_text().partition("\n\n")[0]
    assert f"stackwise train recipes/{recipe.name}" in head.replace("  ", " ")


def test_the_end_to_end_control_costs_what_the_append_run_costs(tmp_path: Path) -> None:
    sums, sizes = {}, {}
    for recipe in RECIPES:
        if recipe.stem in ("append-text", "end-to-end-text"):
            config, _ = resolve(load(recipe, tmp_path), vocab_size=ByteTokenizer().vocab_size)
            sums[recipe.stem] = sum(stage_flops(config, stages(config)))
            with torch.device("meta"):
                sizes[recipe.stem] = Rack(rack_spec(config)).get_parameter_count()
    assert sums["end-to-end-text"] == pytest.approx(sums["append-text"], rel=0.005)
    assert sizes["end-to-end-text"] == sizes["append-text"]
