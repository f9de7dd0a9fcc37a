"""A rack as a folder that Transformers loads: as a known family where it equals one, else describing itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stackwise.config.errors import ConfigError, did_you_mean
from stackwise.config.root import StackWiseConfig
from stackwise.data.tokenizers import Tokenizer
from stackwise.interop.card import write_card
from stackwise.interop.errors import InterchangeError
from stackwise.interop.facts import differences, facts_of
from stackwise.interop.families import families
from stackwise.interop.family import REQUIRED, Family
from stackwise.interop.folder import CONFIG, GENERATION
from stackwise.interop.hf_import import stackwise_config
from stackwise.interop.own import MODEL_TYPE, PREFIX, own_config
from stackwise.interop.peft_sets import write_sets
from stackwise.interop.plain import PlainRack
from stackwise.interop.shards import Group, write_shards
from stackwise.interop.table import Row, file_shapes, row
from stackwise.interop.tokenizer_files import write_tokenizer
from stackwise.model.describe import rack_spec
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec
from stackwise.storage import ops
from stackwise.storage.sums import write_sums

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
ADAPTERS = "adapters"
SHOWN = 4
"""Differences that a message tells at most."""
SHARD = 5_000_000_000
"""Bytes of a file at most."""


@dataclass
class Exported:
    """What was written: the family, or `stackwise`, and what to know about it."""

    path: Path
    family: str
    files: list[str]
    notes: list[str] = field(default_factory=list)


def family_for(spec: RackSpec, wanted: str = "auto") -> tuple[Family | None, dict[str, Any], str]:
    """The family that a rack equals, with its config.json, or null and why the nearest is not it.

    `wanted`: a family's name, which is then the only one looked at. Another name: InterchangeError.
    """
    known = families()
    if wanted not in ("auto", MODEL_TYPE, *known):
        hint = did_you_mean(wanted, (*known, MODEL_TYPE))
        raise InterchangeError(
            f"there is no family {wanted!r}; known: auto, {', '.join(known)}, {MODEL_TYPE}"
            + (f"; {hint}" if hint else "")
        )
    if wanted == MODEL_TYPE:
        return None, {}, "asked for"
    reasons: dict[str, list[str]] = {}
    configs: dict[str, dict[str, Any]] = {}
    for name, family in known.items():
        if wanted in ("auto", name):
            configs[name], reasons[name] = _as_family(family, spec)
            if not reasons[name]:
                return family, configs[name], ""
    # one that no config.json describes was not compared as a whole, so it comes after all others
    nearest = min(reasons, key=lambda name: (not configs[name], len(reasons[name])))
    more = len(reasons[nearest]) - SHOWN
    rest = f"; and {more} more" if more > 0 else ""
    return None, {}, f"it is no {nearest}: {'; '.join(reasons[nearest][:SHOWN])}{rest}"


def _as_family(family: Family, spec: RackSpec) -> tuple[dict[str, Any], list[str]]:
    """The config.json that describes the rack best, and in what the model that it describes differs from the rack.

    Where the rack has no part that a key is about (experts, a latent), the family's default or 1 stands in, so that the
    rest can be compared. Without a config.json there is no such model.
    """
    facts = facts_of(spec)
    lacking = [key for key in family.keys if key.ours not in facts]
    stand_ins = {key.ours: 1 if key.default is REQUIRED else key.default for key in lacking}
    found = [f"{key.ours} is not there" for key in lacking]
    try:
        config = family.config_of(spec, facts | stand_ins)
        read = rack_spec(stackwise_config(family, config))
    except ConfigError as error:
        return {}, found + [str(problem) for problem in error.problems]
    return config, found + differences(spec, read)


def write_model(
    rack: Rack,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    family: str = "auto",
    dtype: str = "float32",
    shard_bytes: int = SHARD,
    fold: bool = True,
    config: StackWiseConfig | None = None,
    generation: dict[str, Any] | None = None,
    ids: dict[str, Any] | None = None,
    facts: dict[str, str] | None = None,
) -> Exported:
    """Write the folder `out`, whole or not at all.

    `fold` false writes adapter sets below `adapters`, in PEFT's format, and not into the weights. `config` is that of the run; `generation` the content of
    generation_config.json and `ids` special tokens, both null: from the tokenizer. `facts` go into the model card.
    Raises FileExistsError where `out` is there, InterchangeError where the rack does not equal the `family` asked for.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already; choose another folder with --out")
    if dtype not in DTYPES:
        raise InterchangeError(f"dtype {dtype!r} cannot be written; known: {', '.join(DTYPES)}")
    plain = PlainRack(rack, fold=fold)
    found, described, reason = family_for(plain.spec, family)
    if found is None and family not in ("auto", MODEL_TYPE):
        raise InterchangeError(
            f"the model cannot be written as {family}: {reason}; --family auto writes it as it is"
        )
    notes = (
        [] if found is not None or family == MODEL_TYPE else [f"written as a StackWise model, for {reason}"]
    )
    rows = found.rows(plain.spec) if found is not None else [row(PREFIX + name, name) for name in plain.empty]
    described = described or own_config(plain.spec, config)
    special = _special(tokenizer) if ids is None else ids
    described |= {"dtype": dtype, **special}
    name = MODEL_TYPE if found is None else found.model_type
    with ops.appearing(out) as folder:
        files = write_shards(folder, _groups(rows, plain, DTYPES[dtype]), shard_bytes)
        _write_json(folder / CONFIG, described)
        if plain.spec.is_causal:
            _write_json(folder / GENERATION, generation or _generation(special))
        if not fold:
            sets = write_sets(rack, rows, folder / ADAPTERS, out.name)
            files += [f"{ADAPTERS}/{name}" for name in sets]
            if not sets:
                notes.append("there are no adapter sets to write separately")
        write_tokenizer(tokenizer, folder, plain.spec.max_seq_len)
        title = out.name if config is None else config.training.run_id
        write_card(folder, plain.spec, rack.get_parameter_count(), name, title, dtype, facts or {})
        write_sums(folder)
    return Exported(out, name, files, notes)


def _groups(rows: list[Row], plain: PlainRack, dtype: torch.dtype) -> list[Group]:
    shapes = file_shapes(rows, plain.empty)

    def kept(tensor: torch.Tensor) -> torch.dtype:
        return dtype if tensor.is_floating_point() else tensor.dtype

    def group(entry: Row) -> Group:
        return Group(
            entry.theirs,
            tuple(shapes[name] for name in entry.theirs),
            (kept(plain.empty[entry.ours[0]]),) * len(entry.theirs),
            lambda: entry.change.save([plain.get(name) for name in entry.ours]),
        )

    return [group(entry) for entry in rows]


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def _generation(ids: dict[str, Any]) -> dict[str, Any]:
    return {
        name: ids[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if ids.get(name) is not None
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    ops.write_new(path, [(json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()], kind="export")
