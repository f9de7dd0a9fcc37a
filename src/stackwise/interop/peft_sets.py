"""Adapter sets of a rack as folders that PEFT loads onto the exported model.

A set on q, k and v of the rack where the file has one fused matrix becomes one set on that: the A of all one above the
other, the B along a diagonal, rank and alpha so that the scale stays.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackwise.adapters.attach import adapter_parameters
from stackwise.adapters.io import CONFIG, WEIGHTS
from stackwise.adapters.package import adapted_linear
from stackwise.interop.changes import Chain, Change, Each, Halves, Joined, Same, Transposed
from stackwise.interop.errors import InterchangeError
from stackwise.interop.table import Row
from stackwise.model.files import save_tensors
from stackwise.model.rack import Rack
from stackwise.model.spec import AdapterSpec
from stackwise.storage import ops
from stackwise.storage.sums import write_sums

_WAY_OUT = "leave --separate out, which folds the sets into the weights"


@dataclass(frozen=True)
class _Set:
    """What one layer of the rack has of a set: A [r, in], B [out, r], with DoRA also the norms of the rows [out]."""

    spec: AdapterSpec
    a: Tensor
    b: Tensor
    norms: Tensor | None

    @property
    def scale(self) -> float:
        rank = self.spec.rank
        return self.spec.alpha / (math.sqrt(rank) if self.spec.rslora else rank)


def set_names(rack: Rack) -> list[str]:
    """All names of sets, in the order of the stacks."""
    return list(dict.fromkeys(spec.name for stack in rack.stacks for spec in stack.adapters))


def write_sets(rack: Rack, rows: list[Row], folder: Path, base: str) -> list[str]:
    """Write every set below `folder`; returns the folders' names. `rows` is the table that the weights were written by.

    InterchangeError for methods that PEFT does not know, and sets on matrices that it cannot adapt.
    """
    names = set_names(rack)
    for name in names:
        _write_set(rack, rows, name, folder / name, base)
    return names


def _write_set(rack: Rack, rows: list[Row], name: str, folder: Path, base: str) -> None:
    layers = _layers(rack, name)
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    transposed = False
    for row in rows:
        sets = [
            layers.pop(ours.removesuffix(".weight"), None) for ours in row.ours if ours.endswith(".weight")
        ]
        found = [entry for entry in sets if entry is not None]
        if not found:
            continue
        target = row.theirs[0].removesuffix(".weight")
        if ".experts." in target:
            raise InterchangeError(
                f"the set {name!r} sits on experts ({target}), which Transformers holds as one tensor; {_WAY_OUT}"
            )
        if found[0].norms is not None and len(found) < len(sets):
            raise InterchangeError(f"the DoRA set {name!r} sits on a part of {target} alone; {_WAY_OUT}")
        widths, turns, flipped = _parts(row.change, found, len(sets))
        transposed = transposed or flipped
        b_parts = [
            torch.zeros(width, 0) if entry is None else turn.moved(entry.b)
            for entry, width, turn in zip(sets, widths, turns, strict=True)
        ]
        rank = sum(entry.spec.rank for entry in found)
        growth = math.sqrt(rank) if found[0].spec.rslora else rank
        path = f"base_model.model.{target}"
        tensors[f"{path}.lora_A.weight"] = torch.cat([entry.a for entry in found]).contiguous()
        tensors[f"{path}.lora_B.weight"] = torch.block_diag(*b_parts).contiguous()
        if found[0].norms is not None:
            norms = [turn.moved(e.norms) for e, turn in zip(found, turns, strict=True) if e.norms is not None]
            tensors[f"{path}.lora_magnitude_vector"] = torch.cat(norms).contiguous()
        sizes[target] = (rank, found[0].scale * growth)
    if layers:
        raise InterchangeError(
            f"the set {name!r} sits on {min(layers)}, which the file does not have; {_WAY_OUT}"
        )
    spec = next(spec for stack in rack.stacks for spec in stack.adapters if spec.name == name)
    ops.make_dir(folder)
    config = _config(spec, sizes, transposed, rack.is_causal, base)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    ops.write_new(folder / CONFIG, [text.encode()], kind="export")
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_sums(folder, [CONFIG, WEIGHTS])


def _layers(rack: Rack, name: str) -> dict[str, _Set]:
    """The set by the plain name of its layer."""
    layers: dict[str, _Set] = {}
    for stack in rack.stacks:
        spec = next((spec for spec in stack.adapters if spec.name == name), None)
        if spec is None:
            continue
        if spec.method not in ("lora", "dora"):
            raise InterchangeError(f"the set {name!r} is {spec.method}, which PEFT does not know; {_WAY_OUT}")
        held: dict[str, dict[str, Tensor]] = {}
        for path, parameter in adapter_parameters(stack, name).items():
            layer, kind = re.split(r"\.(?=lora_)", path)[:2]
            held.setdefault(layer, {})[kind.partition(".")[0]] = parameter.detach().float().cpu()
        for layer, parts in held.items():
            norms = parts.get("lora_magnitude_vector")
            layers[f"stacks.{stack.uid}.{layer}"] = _Set(spec, parts["lora_A"], parts["lora_B"], norms)
    return layers


@dataclass(frozen=True)
class _Turn:
    """How the outputs of a layer change places on the way to the file."""

    steps: tuple[Change, ...] = ()

    def moved(self, outputs: Tensor) -> Tensor:
        for step in reversed(self.steps):
            outputs = step.save([outputs])[0]
        return outputs


def _parts(change: Change, found: list[_Set], count: int) -> tuple[list[int], list[_Turn], bool]:
    """Outputs of each part of a matrix, how they change places, and whether the file holds it [in, out]."""
    steps = change.steps if isinstance(change, Chain) else (change,)
    widths = [len(found[0].b)] if count == 1 else []
    turns: list[list[Change]] = [[] for _ in range(count)]
    for step in steps:
        if isinstance(step, Joined):
            widths = list(step.sizes)
        elif isinstance(step, Each):
            turns = [[*turn, part] for turn, part in zip(turns, step.parts, strict=True)]
        elif isinstance(step, Halves):
            turns = [[*turn, step] for turn in turns]
        else:
            assert isinstance(step, Same | Transposed)
    return widths, [_Turn(tuple(turn)) for turn in turns], any(isinstance(s, Transposed) for s in steps)


def _config(
    spec: AdapterSpec, sizes: dict[str, tuple[int, float]], transposed: bool, causal: bool, base: str
) -> dict[str, Any]:
    adapted_linear()  # imports PEFT, quietly
    from peft import LoraConfig

    rank = Counter(rank for rank, _ in sizes.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in sizes.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides by r, any number will do
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        use_dora=spec.method == "dora",
        target_modules=sorted(sizes),
        rank_pattern={f"^{re.escape(name)}$": r for name, (r, _) in sizes.items() if r != rank},
        alpha_pattern={f"^{re.escape(name)}$": a for name, (_, a) in sizes.items() if a != alpha},
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM" if causal else None,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    return {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
