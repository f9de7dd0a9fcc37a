"""A model folder of a known family as a rack: checked as a whole by its headers, then read tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.config.errors import ConfigError, Problem
from stackwise.config.root import StackWiseConfig
from stackwise.data.errors import DataError
from stackwise.data.tokenizers import Tokenizer, load_tokenizer, open_tokenizer
from stackwise.interop.errors import InterchangeError, listed, shape_text
from stackwise.interop.facts import differences
from stackwise.interop.families import family_of
from stackwise.interop.family import Family, Settings
from stackwise.interop.folder import CONFIG, ModelFolder
from stackwise.interop.limits import check_finite_values, check_room, check_sizes
from stackwise.interop.own import CAUSAL, MASKED, MODEL_TYPE, PREFIX, read_own
from stackwise.interop.table import Row, file_shapes, row
from stackwise.model.describe import rack_spec
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec

READABLE = {"F64", "F32", "F16", "BF16"}
"""Number formats of weights; others belong to quantised models."""


@dataclass
class Imported:
    """What a model folder held. `dtype` is that of its file; the rack computes in float32."""

    source: Path
    family: Family
    config: StackWiseConfig
    rack: Rack
    tokenizer: Tokenizer
    dtype: str
    generation: dict[str, Any] = field(default_factory=dict)
    ids: dict[str, Any] = field(default_factory=dict)
    """Special tokens as its config.json names them."""
    notes: list[str] = field(default_factory=list)


def read_model(
    path: str | Path,
    *,
    stacks: int | None = None,
    blocks_per_stack: int | None = None,
    tokenizer: str | None = None,
    watch: Callable[[int, int], None] | None = None,
    check_finite: bool = False,
) -> Imported:
    """The model of a folder, or of a hub id, cut into `stacks` stacks or stacks of `blocks_per_stack` blocks.

    `tokenizer`: what `data.tokenizer` may name, in place of the folder's. `watch` is told tensors read and their total.
    Everything that does not fit is told at once before a tensor is read: keys of config.json that are not understood,
    tensors that are missing, too many or of another shape (InterchangeError). What is not safe to read is an
    UnsafeInputError, see `ModelFolder`. `check_finite`: weights that are NaN or infinite are an InterchangeError.
    """
    folder = ModelFolder(path)
    if folder.config.get("model_type") == MODEL_TYPE:
        imported = _read_own(folder, stacks, blocks_per_stack, tokenizer, watch)
    else:
        imported = _read_family(folder, stacks, blocks_per_stack, tokenizer, watch)
    if check_finite:
        check_finite_values(imported.rack, folder.path)
    return imported


def _read_family(
    folder: ModelFolder,
    stacks: int | None,
    blocks_per_stack: int | None,
    tokenizer: str | None,
    watch: Callable[[int, int], None] | None,
) -> Imported:
    family = family_of(folder.config.get("model_type"), str(folder.path / CONFIG))
    check_architecture(family, folder)
    check_sizes(family, folder)
    config = stackwise_config(family, folder.config, str(folder.path / CONFIG), stacks, blocks_per_stack)
    return _read(folder, family, config, rack_spec(config), tokenizer, watch)


def _read_own(
    folder: ModelFolder,
    stacks: int | None,
    blocks_per_stack: int | None,
    tokenizer: str | None,
    watch: Callable[[int, int], None] | None,
) -> Imported:
    """A model that describes itself; it comes in the stacks that it was trained in."""
    for option, value in (("--stacks", stacks), ("--blocks-per-stack", blocks_per_stack)):
        if value is not None:
            raise ConfigError(Problem(option, "has no effect: a StackWise model keeps its own stacks", value))
    spec, config = read_own(folder.config, str(folder.path / CONFIG))
    family = Family(
        model_type=MODEL_TYPE,
        architecture=CAUSAL if spec.is_causal else MASKED,
        settings={},
        keys=(),
        fixed={},
        layer="",
        ends=lambda spec: [],
        block=lambda block: [],
    )
    imported = _read(folder, family, config, spec, tokenizer, watch)
    if unlike := differences(spec, rack_spec(config)):
        imported.notes.append(
            f"a run that starts from it builds another model, {'; '.join(unlike[:3])}: what is not in both starts anew"
        )
    return imported


def _read(
    folder: ModelFolder,
    family: Family,
    config: StackWiseConfig,
    spec: RackSpec,
    tokenizer: str | None,
    watch: Callable[[int, int], None] | None,
) -> Imported:
    words = _tokenizer(folder, tokenizer)
    size = spec.vocab_size
    if words.vocab_size > size:
        raise InterchangeError(
            f"{folder.path}: the tokenizer has {words.vocab_size} ids and the embedding {size} rows, so they do not "
            "belong together; name the right one by --tokenizer"
        )
    check_room(spec, folder)
    with torch.device("meta"):
        rack = Rack(spec)
    own = family.model_type == MODEL_TYPE
    rows = [row(PREFIX + name, name) for name in rack.state_dict()] if own else family.rows(spec)
    names, notes = match(family, rows, rack, folder)
    if words.vocab_size < size:
        notes.append(f"the embedding has {size - words.vocab_size} rows that no token of the tokenizer uses")
    fill(rack, rows, folder, names, watch)
    dtypes = {folder.dtypes[names[name]] for entry in rows for name in entry.theirs}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    ids = {key: folder.config[key] for key in folder.config if key.endswith("_token_id")}
    return Imported(folder.path, family, config, rack.eval(), words, dtype, folder.generation, ids, notes)


def check_architecture(family: Family, folder: ModelFolder) -> None:
    """A class with another head (a classifier, a reward model) is no language model."""
    known = (family.architecture, *family.also)
    named = folder.config.get("architectures")
    listed_ = named if isinstance(named, list) else []
    if listed_ and not set(map(str, listed_)) & set(known):
        raise InterchangeError(
            f"{folder.path / CONFIG}: architectures is {listed_}; of {family.model_type} are read: {', '.join(known)}"
        )


def stackwise_config(
    family: Family,
    theirs: dict[str, Any],
    file: str = CONFIG,
    stacks: int | None = None,
    blocks_per_stack: int | None = None,
) -> StackWiseConfig:
    """The configuration of a model, checked; ConfigError names keys as config.json spells them."""
    settings, problems = family.model_settings(theirs, file)
    layers = settings.pop("n_layers", None)
    if problems:
        raise ConfigError([replace(problem, file=problem.file or file) for problem in problems])
    model = {**nested(settings), **cut(layers, stacks, blocks_per_stack)}
    causal = settings["attention_preset"] == "gpt_style"
    training: dict[str, Any] = {
        "progressive": {"enabled": False, "training_objective": "clm" if causal else "mlm"},
    }
    length = settings.get("max_seq_len")
    if isinstance(length, int) and not isinstance(length, bool):
        training["seq_len"] = min(512, length)
    try:
        return StackWiseConfig.from_dict({"model": model, "training": training})
    except ConfigError as error:
        spelt = {f"model.{key.ours}": key.theirs for key in family.keys}
        raise ConfigError(
            [replace(p, key=spelt.get(p.key, p.key), file=file, line=None) for p in error.problems]
        ) from None


def nested(settings: Settings) -> Settings:
    """Keys with dots as maps in maps."""
    tree: Settings = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        level = tree
        for section in sections:
            level = level.setdefault(section, {})
        level[name] = value
    return tree


def cut(layers: Any, stacks: int | None, blocks_per_stack: int | None) -> Settings:
    """Keys of `model.*` that share out the layers; stacks that cannot be alike get the rest one by one."""
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise ConfigError(Problem("the number of layers", "must be an integer of at least 1", layers))
    if stacks is not None and blocks_per_stack is not None:
        raise ConfigError(Problem("--stacks", "and --blocks-per-stack say the same thing; give one of them"))
    if stacks is not None:
        if not 1 <= stacks <= layers:
            raise ConfigError(Problem("--stacks", "must share out the layers", stacks, f"1 to {layers}"))
        sizes = [layers // stacks + (i < layers % stacks) for i in range(stacks)]
    else:
        size = blocks_per_stack or layers
        if not 1 <= size <= layers:
            raise ConfigError(
                Problem("--blocks-per-stack", "must share out the layers", size, f"1 to {layers}")
            )
        sizes = [size] * (layers // size) + ([layers % size] if layers % size else [])
    settings: Settings = {"architecture": {"n_stacks": len(sizes), "blocks_per_stack": sizes[0]}}
    if len(set(sizes)) > 1:
        settings["stacks"] = [{"n_blocks": size} for size in sizes]
    return settings


def match(
    family: Family, rows: list[Row], rack: Rack, folder: ModelFolder
) -> tuple[dict[str, str], list[str]]:
    """Name in the table -> name in the file, for all tensors, and notes; InterchangeError lists what does not fit."""
    wanted = file_shapes(rows, rack.state_dict())
    bare = bool(family.base) and not any(name.startswith(family.base) for name in folder.shapes)
    held: dict[str, str] = {}
    for name in folder.shapes:
        today = family.today(name)
        full = family.base + today
        held[full if bare and (full in wanted or family.skips(full)) else today] = name
    skipped = sorted(held[name] for name in held.keys() - wanted.keys() if family.skips(name))
    extra = sorted(name for name in held.keys() - wanted.keys() if not family.skips(name))
    for copy, first in family.copies:
        if copy in extra and first in held:
            extra.remove(copy)
            if not torch.equal(folder.get(held[copy]), folder.get(held[first])):
                raise InterchangeError(
                    f"{folder.path}: tie_word_embeddings is true, but {held[copy]} is not {held[first]}; which of the two "
                    "the model needs cannot be known: set tie_word_embeddings to what it was trained with"
                )
    lines = [f"missing     {name} {shape_text(shape)}" for name, shape in wanted.items() if name not in held]
    lines += [
        f"wrong shape {held[name]} {shape_text(folder.shapes[held[name]])}, needed {shape_text(shape)}"
        for name, shape in wanted.items()
        if name in held and folder.shapes[held[name]] != shape
    ]
    lines += [f"unknown     {held[name]} {shape_text(folder.shapes[held[name]])}" for name in extra]
    lines += [
        f"not numbers {held[name]} is {folder.dtypes[held[name]]}, needed one of {', '.join(sorted(READABLE))}"
        for name in wanted
        if name in held and folder.dtypes[held[name]] not in READABLE
    ]
    if lines:
        raise InterchangeError(
            listed(
                f"{folder.path} does not hold the tensors of its config.json ({len(lines)} differ):", lines
            )
        )
    notes = [
        f"left out, the model does not compute with it: {name}" for name in skipped if "bias" not in name
    ]
    return held, notes


@torch.no_grad()
def fill(
    rack: Rack,
    rows: list[Row],
    folder: ModelFolder,
    names: dict[str, str],
    watch: Callable[[int, int], None] | None = None,
) -> None:
    """Give a rack without values those of the folder; besides the rack one row of the table is in memory."""
    for count, entry in enumerate(rows):
        tensors = entry.change.load([folder.get(names[name]) for name in entry.theirs])
        for name, tensor in zip(entry.ours, tensors, strict=True):
            _set(rack, name, tensor)
        if watch is not None:
            watch(count + 1, len(rows))
    left = [name for name, tensor in rack.state_dict().items() if tensor.is_meta]
    assert not left, f"the table has no row for {left}"


def _set(rack: Rack, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = rack.get_submodule(path)
    old = getattr(owner, leaf)
    value = torch.empty(old.shape, dtype=old.dtype)
    value.copy_(tensor)  # a copy of its own: what the file gave may be the file
    if isinstance(old, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        setattr(owner, leaf, value)


def _tokenizer(folder: ModelFolder, named: str | None) -> Tokenizer:
    if named is not None:
        return open_tokenizer(named)
    if not (folder.path / "tokenizer.json").is_file():
        raise InterchangeError(
            f"{folder.path} has no tokenizer.json; name one by --tokenizer, or convert what it has where Transformers is "
            "installed: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        return load_tokenizer(folder.path, foreign=True)
    except DataError as error:
        raise InterchangeError(str(error)) from None
