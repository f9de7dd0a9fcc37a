"""Fine-tuning one rack on one task: the whole rack, or adapters on its stacks; and what it then answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.adapters.attach import attach
from stackwise.evaluation.nlu.coding import Coded, batch_of, by_length, shuffled
from stackwise.evaluation.nlu.recipes import Recipe
from stackwise.evaluation.nlu.tasks import NUMBER, TAGS, Task
from stackwise.model.heads import IGNORE, SequenceClassifier, SequenceRegressor, TokenClassifier
from stackwise.model.modes import eval_mode
from stackwise.model.rack import Rack
from stackwise.model.spec import AdapterSpec
from stackwise.model.twin_heads import Twin, TwinClassifier, TwinRegressor
from stackwise.precision.convert import restore_full_precision
from stackwise.training.device import computing_in
from stackwise.training.errors import NumericError

ADAPTERS = "nlu"
ROWS = 64
"""Rows per batch where nothing is learned."""

Step = Callable[[int, int], None]
"""Told after every step: steps done, steps in all."""


@dataclass(frozen=True)
class Scale:
    """Numbers are learned with mean 0 and deviation 1 of the training rows."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, targets: Sequence[Any]) -> Scale:
        numbers = torch.tensor(targets, dtype=torch.float64)
        return cls(float(numbers.mean()), float(numbers.std(correction=0)) or 1.0)


def head_for(task: Task, rack: Rack, recipe: Recipe, seed: int) -> nn.Module:
    """The rack with a fresh head for a task."""
    options: dict[str, Any] = {"dropout": recipe.dropout, "seed": seed}
    if task.kind == TAGS:
        return TokenClassifier(rack, len(task.labels), **options)
    if task.pair and recipe.pair == "twin":
        if task.kind == NUMBER:
            return TwinRegressor(rack, **options)
        return TwinClassifier(rack, len(task.labels), **options)
    if task.kind == NUMBER:
        return SequenceRegressor(rack, pooling=recipe.pooling, **options)
    return SequenceClassifier(rack, len(task.labels), pooling=recipe.pooling, **options)


def tune(
    model: nn.Module,
    rows: Coded,
    recipe: Recipe,
    *,
    method: str,
    seed: int,
    hide_id: int,
    dtype: torch.dtype,
    told: Step = lambda done, total: None,
) -> Scale | None:
    """Learn from the rows by AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with a linear rise and fall of the rates.

    `method`: full, or lora (Hu et al. 2021, arXiv 2106.09685), which freezes the rack. `hide_id` stands for hidden tokens. All that is drawn comes from
    `seed`; the global generator is as before afterwards. Gives back the scale of numbers, null for other tasks.
    """
    rack: Rack = model.rack  # type: ignore[assignment]
    device = rack.device
    groups = _groups(model, recipe, method, seed)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    batches = math.ceil(len(rows) / recipe.batch_size)
    steps = recipe.epochs * batches
    rise = max(1.0, recipe.warmup * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1.0, steps - rise))
    )
    scale = Scale.of(rows.targets) if rows.kind == NUMBER else None
    generator = torch.Generator().manual_seed(seed)
    trained = [p for group in groups for p in group["params"]]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        if isinstance(model, Twin):
            with eval_mode(model), torch.no_grad():
                some = next(shuffled(rows, 8 * recipe.batch_size, torch.Generator().manual_seed(seed)))
                model.measure(*batch_of(rows, some).to(device).inputs)
        model.train()
        done = 0
        for _ in range(recipe.epochs):
            for chosen in shuffled(rows, recipe.batch_size, generator):
                batch = batch_of(rows, chosen)
                inputs = _hidden(batch.inputs, recipe.hidden_tokens, hide_id, generator)
                targets = batch.targets
                if scale is not None:
                    targets = (targets - scale.mean) / scale.deviation
                with computing_in(dtype, device):
                    outputs = model(*(t.to(device) for t in inputs))
                loss = model.loss(outputs.float(), targets.to(device))  # type: ignore[operator]
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, recipe.clip)
                optimizer.step()
                schedule.step()
                done += 1
                told(done, steps)
    model.eval()
    return scale


def _groups(model: nn.Module, recipe: Recipe, method: str, seed: int) -> list[dict[str, Any]]:
    """What trains, at which rates; everything else is frozen."""
    rack: Rack = model.rack  # type: ignore[assignment]
    if method == "lora":
        rack.requires_grad_(False)
        for stack in rack.stacks:
            attach(stack, AdapterSpec(ADAPTERS, rank=recipe.lora_rank, alpha=2.0 * recipe.lora_rank), seed)
    else:
        for stack in rack.stacks:
            if stack.weight_format != "fp32":
                restore_full_precision(stack)  # frozen stacks of the run, which now train
        rack.requires_grad_(True)
        for parameter in rack.head.parameters():
            parameter.requires_grad_(parameter is rack.embedding.weight)
    lr = recipe.lora_lr if method == "lora" else recipe.lr
    inside = {id(p) for p in rack.parameters()}
    kinds: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = lr if id(parameter) in inside else recipe.head_lr
            decays = parameter.dim() > 1 and "embedding" not in name
            kinds.setdefault((rate, recipe.weight_decay if decays else 0.0), []).append(parameter)
    return [{"params": held, "lr": lr, "weight_decay": decay} for (lr, decay), held in kinds.items()]


def _hidden(
    inputs: tuple[Tensor, ...], share: float, hide_id: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """The inputs with a share of their tokens hidden."""
    if not share:
        return inputs
    out = list(inputs)
    for at in range(0, len(inputs), 2):
        ids, mask = inputs[at : at + 2]
        gone = torch.rand(ids.shape, generator=generator) < share
        out[at] = ids.masked_fill(gone & mask, hide_id)
    return tuple(out)


@torch.no_grad()
def answers(
    model: nn.Module, rows: Coded, scale: Scale | None = None, *, batch_size: int = ROWS
) -> list[Any]:
    """Of each row a class, a number, or the tags of its words that were read. In float32, in the order of the rows.

    NumericError where an answer is no finite number: the largest of nothing would be a class all the same.
    """
    found: list[Any] = [None] * len(rows)
    with eval_mode(model):
        for chosen in by_length(rows, batch_size):
            batch = batch_of(rows, chosen).to(model.rack.device)  # type: ignore[arg-type]
            outputs = model(*batch.inputs).float().cpu()
            if not outputs.isfinite().all():
                raise NumericError(
                    "what was learned answers with numbers that are not finite: its learning rate is too high (--lr)"
                )
            for at, row in enumerate(chosen):
                if rows.kind == NUMBER:
                    scaled = float(outputs[at])
                    found[row] = scaled if scale is None else scaled * scale.deviation + scale.mean
                elif rows.kind == TAGS:
                    firsts = batch.targets[at].cpu() != IGNORE
                    found[row] = outputs[at][firsts].argmax(-1).tolist()
                else:
                    found[row] = int(outputs[at].argmax())
    return found
