"""Adapter sets in PEFT's file format: `adapter_config.json` and `adapter_model.safetensors` in a folder.

PEFT itself loads LoRA and DoRA sets from there, `PeftModel.from_pretrained(rack, folder)`, and what PEFT wrote for the
layers of a rack can be loaded here. MoRA and bottleneck sets are written the same way under peft_type MORA and
BOTTLENECK, which PEFT does not know. Tensors are named as PEFT names them, by the path inside the saved module and
without the set's name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackwise.adapters.attach import adapter_parameters, attach, checked_names, remove
from stackwise.adapters.package import adapted_linear
from stackwise.adapters.targets import ALL, linear_paths, targeted_paths
from stackwise.model.block import Stack
from stackwise.model.files import load_tensors, save_tensors
from stackwise.model.rack import Rack
from stackwise.model.spec import AdapterSpec
from stackwise.storage import ops
from stackwise.storage.errors import UnsafeInputError
from stackwise.storage.regular import read_json, refuse_pickles
from stackwise.storage.sums import check_sums, write_sums

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."


def save_set(module: Rack | Stack, name: str, folder: str | Path) -> Path:
    """Write one set of a rack or a stack; returns the folder. Nothing of this name: ValueError.

    Stacks may differ in rank and alpha, not in method, dropout or rslora.
    """
    specs = {
        prefix: spec for prefix, stack in _stacks(module) for spec in stack.adapters if spec.name == name
    }
    if not specs:
        for _, stack in _stacks(module):
            checked_names(stack, name)
    alike = {(spec.method, spec.dropout, spec.rslora) for spec in specs.values()}
    if len(alike) > 1:
        raise ValueError(
            f"the set {name!r} differs between stacks in method, dropout or rslora: {sorted(alike)}; save the stacks "
            "one by one"
        )
    tensors: dict[str, Tensor] = {}
    for prefix, stack in _stacks(module):
        for path, parameter in adapter_parameters(stack, name).items():
            tensors[_file_name(prefix + path, name)] = parameter.detach().contiguous()
    folder = Path(folder)
    ops.make_dir(folder)
    ops.replace_text(folder / CONFIG, json.dumps(_config(specs, tensors), indent=2, sort_keys=True))
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_sums(folder, [CONFIG, WEIGHTS])
    ops.sync_dir(folder)
    return folder


def load_set(module: Rack | Stack, folder: str | Path, name: str) -> None:
    """Attach the set of a folder under `name` to the layers it was saved from.

    Layers that the rack lacks, tensors of another shape, ranks that differ within one stack: ValueError, and nothing is
    attached. A missing file: FileNotFoundError. A file that is damaged or not safe to read: as `open_tensors`.
    """
    folder = Path(folder)
    refuse_pickles(folder, WEIGHTS)
    check_sums(folder, [CONFIG, WEIGHTS])
    config = _checked(read_json(folder / CONFIG), folder / CONFIG)
    held, _ = load_tensors(folder / WEIGHTS)
    tensors = {_model_name(key, name): tensor for key, tensor in held.items()}
    specs: dict[str, AdapterSpec] = {}
    for prefix, stack in _stacks(module):
        layers = sorted({n[len(prefix) :].partition(".lora_")[0] for n in tensors if n.startswith(prefix)})
        if layers:
            specs[prefix] = _spec(config, stack, prefix, layers, tensors, name, folder)
    stray = [n for n in tensors if not n.startswith(tuple(specs))]
    if stray:
        raise ValueError(f"{folder} holds sets for layers that are not here: {', '.join(stray[:3])}")
    done: list[Stack] = []
    try:
        for prefix, stack in _stacks(module):
            if prefix in specs:
                attach(stack, specs[prefix])
                done.append(stack)
                _copy(stack, prefix, name, tensors, folder)
    except ValueError:
        for stack in done:
            remove(stack, name)
        raise


_MAX_RANK = 65_536
_PATTERN = re.compile(r"[\w.\\^$|*-]{0,512}")
"""Patterns of names without groups, which no text can make slow."""


def _checked(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration of a set, its fields of the kinds that are needed; ValueError names the first that is not."""
    kinds: dict[str, tuple[type, ...]] = {
        "r": (int,),
        "lora_alpha": (int, float),
        "lora_dropout": (int, float),
    }
    for name, kind in {**kinds, "use_rslora": (bool,), "peft_type": (str,)}.items():
        value = config.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            raise ValueError(f"{path}: {name} is {value!r:.80}, needed: {kind[0].__name__}")
    patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, table in patterns.items():
        if not isinstance(table, dict) or not all(_PATTERN.fullmatch(key) for key in table):
            raise UnsafeInputError(
                f"{path}: {name} must map plain patterns of names, without groups, to numbers"
            )
        if not all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in table.values()
        ):
            raise ValueError(f"{path}: {name} must map patterns to numbers")
    ranks = [config["r"], *patterns["rank_pattern"].values()]
    if not all(1 <= rank <= _MAX_RANK for rank in ranks) or not 0 <= config["lora_dropout"] < 1:
        raise ValueError(
            f"{path}: a rank is outside of 1 to {_MAX_RANK}, or lora_dropout outside of 0 to below 1"
        )
    return config


def _stacks(module: Rack | Stack) -> list[tuple[str, Stack]]:
    return [("", module)] if isinstance(module, Stack) else [(f"stacks.{s.uid}.", s) for s in module.stacks]


def _file_name(name: str, set_name: str) -> str:
    plain = re.sub(rf"(\.lora_\w+)\.{re.escape(set_name)}\.", r"\1.", name, count=1)
    return _ROOT + (plain.removesuffix(".weight") if "lora_magnitude_vector" in plain else plain)


def _model_name(key: str, set_name: str) -> str:
    name = key.removeprefix(_ROOT) + (".weight" if key.endswith("lora_magnitude_vector") else "")
    return re.sub(r"(\.lora_\w+)\.", rf"\1.{set_name}.", name, count=1)


def _config(specs: dict[str, AdapterSpec], tensors: dict[str, Tensor]) -> dict[str, Any]:
    adapted_linear()
    from peft import LoraConfig

    first = next(iter(specs.values()))
    rank = Counter(spec.rank for spec in specs.values()).most_common(1)[0][0]
    alpha = Counter(spec.alpha for spec in specs.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides by r, any number will do
        lora_dropout=first.dropout,
        use_rslora=first.rslora,
        use_dora=first.method == "dora",
        target_modules=sorted({key.removeprefix(_ROOT).partition(".lora_")[0] for key in tensors}),
        rank_pattern={re.escape(p) + ".*": s.rank for p, s in specs.items() if s.rank != rank},
        alpha_pattern={re.escape(p) + ".*": s.alpha for p, s in specs.items() if s.alpha != alpha},
        inference_mode=True,
    )
    data = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    return data | {"peft_type": "LORA" if first.method in ("lora", "dora") else first.method.upper()}


def _spec(
    config: dict[str, Any],
    stack: Stack,
    prefix: str,
    layers: list[str],
    tensors: dict[str, Tensor],
    name: str,
    folder: Path,
) -> AdapterSpec:
    """What a stack's set is, from the file's configuration and the layers its tensors are for."""
    known = linear_paths(stack)
    if unknown := [layer for layer in layers if layer not in known]:
        raise ValueError(f"{folder} holds sets for layers that are not here: {', '.join(unknown[:3])}")
    method = str(config["peft_type"]).lower()
    if config.get("use_dora"):
        method = "dora"
    sizes = {
        (_matching(config, "rank_pattern", prefix + layer, "r"), _matching(config, "alpha_pattern", prefix + layer, "lora_alpha"))
        for layer in layers
    }  # fmt: skip
    if len(sizes) > 1:
        raise ValueError(
            f"{folder} gives layers of stack {stack.uid!r} different ranks or alphas: {sorted(sizes)}; one set has one"
        )
    rank, alpha = sizes.pop()
    spec = AdapterSpec(name, method, int(rank), alpha, config["lora_dropout"], (ALL,), config["use_rslora"])
    return spec if layers == sorted(targeted_paths(stack, spec)) else replace(spec, targets=tuple(layers))


def _matching(config: dict[str, Any], patterns: str, layer: str, default: str) -> float:
    """The value of the first pattern that fits the layer, as PEFT reads them."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(value)
    return float(config[default])


@torch.no_grad()
def _copy(stack: Stack, prefix: str, name: str, tensors: dict[str, Tensor], folder: Path) -> None:
    own = adapter_parameters(stack, name)
    given = {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}
    problems = [f"missing {n}" for n in own.keys() - given.keys()]
    problems += [f"unexpected {n}" for n in given.keys() - own.keys()]
    problems += [
        f"{n} is {list(given[n].shape)}, needed {list(own[n].shape)}"
        for n in own.keys() & given.keys()
        if own[n].shape != given[n].shape
    ]
    if problems:
        raise ValueError(f"{folder} does not fit: " + "; ".join(sorted(problems)))
    for path, tensor in given.items():
        own[path].copy_(tensor)
