"""Starting a run from the weights of another one (`checkpoint.init_from`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from stackwise.config.errors import ConfigError, Problem
from stackwise.curriculum.growth import plain_tensors
from stackwise.data.tokenizers import Tokenizer
from stackwise.model.own_io import InOut
from stackwise.model.rack import Rack
from stackwise.tracking.folder import RunFolder
from stackwise.training.stored import open_run

KEY = "checkpoint.init_from"


@torch.no_grad()
def start_from(rack: Rack, path: str | Path, tokenizer: Tokenizer, *, to_all: bool = False) -> str:
    """Load every tensor of `rack` that the run at `path` holds by name; says in a sentence what was taken.

    Stacks in a storage format are unpacked, adapters folded into their weights. `to_all`: the run has one stack, and
    all stacks of the rack start as a copy of it. Raises RunFolderError or CheckpointError where there is no such run,
    and ConfigError where its tokens, the number or order of its stacks or a shape are others, where this rack has no
    place for its tail or head, or nothing fits.
    """
    if (Path(path) / "config.json").is_file() and not RunFolder(path).holds_a_run():
        message = "is a model folder of the Hugging Face format, not a run"
        raise ConfigError(Problem(KEY, message, str(path), hint=f"stackwise import {path} makes one of it"))
    run = open_run(path)
    if to_all and len(run.rack.stacks) != 1:
        message = f"has {len(run.rack.stacks)} stacks, and a shared start is a run of one"
        hint = "or set training.progressive.shared_start_fraction to 0"
        raise ConfigError(Problem(KEY, message, str(path), hint=hint))
    if run.tokenizer.hash != tokenizer.hash:
        message = "has another tokenizer, so its embedding means other tokens"
        hint = (
            f"base: {Path(path) / 'config.yaml'} takes over its tokenizer with the rest of its configuration"
        )
        raise ConfigError(Problem(KEY, message, str(path), hint=hint))
    theirs = [stack.uid for stack in run.rack.stacks]
    shared = [stack.uid for stack in rack.stacks if to_all or stack.uid in theirs]
    if not to_all and shared != [uid for uid in theirs if uid in shared]:
        message = f"has its stacks in another order ({', '.join(theirs)}) than this run ({', '.join(shared)})"
        raise ConfigError(Problem(KEY, message, str(path), hint="use its building_mode"))
    values = {n: t for n, t in run.rack.state_dict().items() if not n.startswith("stacks.")}
    for stack in run.rack.stacks:
        for uid in shared if to_all else [stack.uid]:
            values |= {f"stacks.{uid}.{name}": tensor for name, tensor in plain_tensors(stack).items()}
    have = {stack.uid for stack in run.rack.stacks if stack.io is not None}
    for stack in rack.stacks:
        if stack.uid in have:
            stack.io = InOut(rack.spec).copy_from(rack)
    own = rack.state_dict()
    _refuse_to_drop(sorted({run.rack.part_of(n) for n in values if n not in own} & {"tail", "head"}), path)
    taken = [name for name in own if name in values]
    for name in taken:
        new = own[name].shape[0] - values[name].shape[0]
        if (
            rack.part_of(name) in ("embedding", "head")
            and 0 < new == rack.spec.vocab_size - run.tokenizer.vocab_size
        ):
            values[name] = torch.cat((values[name], own[name][-new:].to(values[name])))  # the mask token
    problems = [
        f"{name} is {list(values[name].shape)} there and {list(own[name].shape)} here"
        for name in taken
        if values[name].shape != own[name].shape
    ]
    if problems:
        raise ConfigError(Problem(KEY, "holds tensors of other shapes: " + "; ".join(problems), str(path)))
    if not taken:
        raise ConfigError(Problem(KEY, "holds no tensor of this model", str(path)))
    for name in taken:
        own[name].copy_(values[name])
    for stack in rack.stacks:
        stack.trained = stack.trained or stack.uid in shared
    rack.spec = rack.spec.with_stacks(
        [
            replace(stack, trained=stack.trained or stack.uid in shared, own_io=stack.uid in have)
            for stack in rack.spec.stacks
        ]
    )
    fresh = sorted({rack.part_of(name) for name in own if name not in values})
    rest = f"; new: {', '.join(fresh)}" if fresh else ""
    return f"started from {run.folder.path}, commit {run.commit.id}: {len(taken)} of {len(own)} tensors{rest}"


def _refuse_to_drop(parts: list[str], path: str | Path) -> None:
    """Stacks may be left out, for they may grow anew. Without the parts that end the model it has forgotten everything."""
    if not parts:
        return
    hints = {
        "tail": "train the rack of an append run: training.unit=rack or training.stages, with training.progressive.enabled "
        "and building_mode as they were there",
        "head": "model.tie_embeddings=false",
    }
    message = f"has a {' and a '.join(parts)} of its own, for which this run has no place"
    raise ConfigError(Problem(KEY, message, str(path), hint="; ".join(hints[part] for part in parts)))
