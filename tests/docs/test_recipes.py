"""Every recipe loads, says how to run it, is planned, and trains when it is made small; two cost the same."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
import torch

from stackwise import Rack, StackWiseConfig, plan, stages, train
from stackwise.cli.main import main
from stackwise.config.resolve import resolve
from stackwise.config.shape import names_of
from stackwise.curriculum.costs import stage_flops
from stackwise.curriculum.settings import CurriculumKeys
from stackwise.data.prepare import prepare
from stackwise.data.reference import reference_lines
from stackwise.data.tokenizers import ByteTokenizer
from stackwise.evaluation.masked import masked_scores
from stackwise.model.describe import rack_spec
from stackwise.objectives.build import objective_of
from stackwise.objectives.denoiser import denoiser_of
from stackwise.training.stored import open_run

STAGES = {
    "append-text": 5,
    "prepend-text": 5,
    "grow-text": 4,
    "cyclic-text": 40,
    "independent-text": 4,
    "stages-text": 5,
    "end-to-end-text": 1,
    "shakespeare-char": 1,
    "diffusion-char": 1,
    "time-as-input": 1,
    "depth-as-time": 5,
    "tiny-bert": 1,
    "llama-70b-h200": 21,
}
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

FROM_TEXT = ("data.source=text", "data.tokenizer=byte")
"""For recipes that want other data: the text and tokenizer that are at hand."""

SMALL = (
    "model.d_model=32",
    "model.n_heads=2",
    "model.max_seq_len=64",
    "training.device=cpu",
    "training.dtype=float32",
    "training.batch_size=4",
    "training.seq_len=32",
    "training.warmup_steps=1",
    "training.max_steps=3",
    "checkpoint.save_interval=100",
    "evaluation.batches=2",
    "generation.max_new_tokens=1",
    "tracking.report=false",
)
SHORT = {
    "cyclic-text": ("training.progressive.cycle_sweeps=2",),
    "end-to-end-text": ("training.max_steps=12",),
    **dict.fromkeys(
        ("shakespeare-char", "diffusion-char", "time-as-input", "tiny-bert"), ("training.max_steps=12",)
    ),
    "stages-text": (
        "training.max_steps=null",
        "training.stages.0.batch_size=4",
        *(f"training.stages.{i}.max_steps=3" for i in range(4)),
        *(f"training.stages.{i}.warmup_steps=1" for i in range(5)),
        "training.stages.4.max_tokens=400",
    ),
}
"""What makes a recipe's run as short as it is narrow."""


def load(recipe: Path, tmp_path: Path, *more: str) -> StackWiseConfig:
    text = tmp_path / "my.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 200)
    paths = (f"data.path={text}", f"checkpoint.dir={tmp_path / 'runs'}")
    return StackWiseConfig.from_yaml(recipe, [*paths, *more])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_without_notes_and_has_its_stages(recipe: Path, tmp_path: Path) -> None:
    config = load(recipe, tmp_path)
    assert config.notes() == []
    assert config.training.run_id == recipe.stem
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


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_planned(recipe: Path, tmp_path: Path) -> None:
    large = recipe.stem == "llama-70b-h200"
    config = load(recipe, tmp_path, "training.batch_size=2", *(FROM_TEXT if large else ()))
    laid_out = plan(config, "h200" if large else None)
    sized, _ = resolve(config, vocab_size=ByteTokenizer().vocab_size)
    listed = stages(sized)
    assert [(row.name, row.n_stacks, row.steps) for row in laid_out.stages] == [
        (stage.name, stage.n_stacks, stage.steps) for stage in listed
    ]
    assert laid_out.fits == "yes"
    assert laid_out.notes == []
    with torch.device("meta"):
        described = Rack(rack_spec(sized))
    last = laid_out.stages[-1]
    if recipe.stem == "stages-text":  # grows by hand, beyond the model of the config
        assert last.n_stacks == 2 * laid_out.stages[-2].n_stacks
    elif large:
        assert described.get_parameter_count() < last.parameters, "adapters come on top"
    elif config.data.tokenizer != "char":  # whose vocabulary is not known here
        assert last.parameters == described.get_parameter_count()
    assert all(0 < row.trainable_parameters <= row.parameters for row in laid_out.stages)
    assert all(row.memory.peak > 4 * row.trainable_parameters for row in laid_out.stages)
    assert laid_out.total_flops == sum(row.flops for row in laid_out.stages) > 0


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES if recipe.stem != "llama-70b-h200"], ids=lambda path: path.stem
)
def test_a_small_copy_of_a_recipe_trains(recipe: Path, tmp_path: Path, monkeypatch) -> None:
    """That of llama-70b-h200 is in tests/planning/test_llama_70b.py."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    config = load(recipe, tmp_path, *SMALL, *SHORT.get(recipe.stem, ()))
    full = stages(load(recipe, tmp_path, "training.progressive.cycle_sweeps=2"))
    history = train(config, sinks=[])["training_history"]
    assert [entry["name"] for entry in history] == [stage.name for stage in full]
    assert [entry["n_stacks"] for entry in history] == [stage.n_stacks for stage in full]
    assert history[-1]["eval_loss"] < history[0]["loss_first"]


ENCODERS = ("tiny-bert", "diffusion-char", "time-as-input", "depth-as-time")


@pytest.mark.parametrize("name", ENCODERS)
def test_the_commands_that_a_recipe_shows_do_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its runs made small, one command after the other, in a folder with the recipes and a text."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(RECIPES[0].parent)
    (tmp_path / "my.txt").write_text("It was a great day, and all work and no play.\n" * 40)
    head = (tmp_path / f"recipes/{name}.yaml").read_text().partition("\n\n")[0]
    commands = [line.split(maxsplit=2)[2] for line in head.splitlines() if line.startswith("#   stackwise ")]
    assert len(commands) >= 2
    for command in commands:
        words = shlex.split(command)
        runs = words[0] in ("train", "plan")
        small = [*SMALL, "evaluation.batch_size=4", "training.max_steps=2", "--quiet"] if runs else []
        assert main([*words, *(word for word in small if words[0] == "train" or word != "--quiet")]) == 0, (
            words
        )
        told = capsys.readouterr().out
        if words[0] in ("eval", "fill"):
            assert {"eval": "(exact)", "fill": "probability"}[words[0]] in told
        elif words[0] == "generate":
            assert told.startswith("It was")
    assert {path.name for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")} >= {name}
    if name == "depth-as-time":
        bounds = []
        for run in ("depth-as-time", "merged"):
            assert main(["eval", f"runs/{run}", "--json"]) == 0
            bounds.append(json.loads(capsys.readouterr().out)["bound"])
        assert bounds[0] == bounds[1], "stacks from other processes are the same"


def test_a_small_bert_learns_what_the_commonest_character_cannot_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a text that its neighbours determine it guesses three times as much as a guess without context."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    (recipe,) = (path for path in RECIPES if path.stem == "tiny-bert")
    config = load(recipe, tmp_path, *SMALL, "training.max_steps=100", "training.batch_size=16")
    run = open_run(train(config, sinks=[])["run_dir"])
    assert run.config.data.cache_dir is not None
    corpus = prepare(run.config.data, run.config.data.cache_dir)
    objective = objective_of(run.config)
    scores = masked_scores(denoiser_of(run.rack, run.config), objective, corpus.validation, seq_len=32)
    size, hidden = run.rack.spec.vocab_size, objective.vocabulary.hidden
    unigram = reference_lines(corpus.train, corpus.validation, size, hidden)
    assert 0.1 < scores.share < 0.2
    assert scores.accuracy > 3 * unigram.unigram_accuracy
    assert scores.nats_per_masked_token < unigram.unigram / 3
