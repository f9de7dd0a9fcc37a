"""A family of models: the two-way description of its config.json and of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stackwise.config.errors import Problem, did_you_mean
from stackwise.interop.table import BlockRows, EndRows, Row, rows_of
from stackwise.model.spec import RackSpec

Settings = dict[str, Any]
"""Keys of `model.*` by name; `n_layers` is the number of blocks, which the cut into stacks turns into keys."""

REQUIRED = object()


def words(text: str) -> frozenset[str]:
    """Names with blanks between them."""
    return frozenset(text.split())


COMMON = words(
    """
    model_type architectures dtype torch_dtype transformers_version use_cache initializer_range _name_or_path
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id decoder_start_token_id unk_token_id
    _attn_implementation attn_implementation gradient_checkpointing return_dict output_hidden_states output_attentions
    task_specific_params id2label label2id problem_type finetuning_task tokenizer_class prefix
    use_return_dict torchscript chunk_size_feed_forward
    do_sample max_length min_length temperature top_k top_p typical_p repetition_penalty length_penalty num_beams
    num_beam_groups num_return_sequences no_repeat_ngram_size early_stopping diversity_penalty bad_words_ids
    forced_bos_token_id forced_eos_token_id begin_suppress_tokens suppress_tokens remove_invalid_values
    exponential_decay_length_penalty encoder_no_repeat_ngram_size output_scores return_dict_in_generate
    """
)
"""Keys of any config.json that change neither tensors nor what the model computes from them."""
ABSENT = {"is_decoder": False, "is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {}}
"""Keys of any config.json that must have this value, or be missing. What the model is made of would change."""


@dataclass(frozen=True)
class Key:
    """One key of config.json and the key of `model.*` that holds the same value. null is as if it were missing."""

    theirs: str
    ours: str
    default: Any = REQUIRED
    """Where the file has no such key; None leaves `ours` to its own default."""


@dataclass(frozen=True)
class Family:
    """A family. `settings` are the keys of `model.*` that all its models share.

    `fixed`: keys of config.json with the values that are understood; the first stands for a missing key and is what is
    written. `ignored`: further keys without meaning here. `read` adds what single keys do not say, `write` the
    keys of the file for it. `layer`: prefix of a layer's tensors, {} its number. `skipped`: patterns of tensors in the
    file that the model does not compute with. `base`: prefix that files of the bare model leave out.
    """

    model_type: str
    architecture: str
    settings: Settings
    keys: tuple[Key, ...]
    fixed: dict[str, tuple[Any, ...]]
    layer: str
    ends: EndRows
    block: BlockRows
    ignored: frozenset[str] = frozenset()
    read: Callable[[dict[str, Any], Settings, list[Problem]], None] | None = None
    write: Callable[[RackSpec], dict[str, Any]] | None = None
    skipped: tuple[str, ...] = ()
    base: str = ""
    copies: tuple[tuple[str, str], ...] = ()
    """Tensors that some files hold twice where they are tied, and the names under which they are read."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Endings of names in older files, and the ones of today."""
    also: tuple[str, ...] = field(default=())
    """Further architectures that are read: the bare model, for one."""

    def model_settings(self, config: dict[str, Any], file: str) -> tuple[Settings, list[Problem]]:
        """Keys of `model.*` from a config.json, and everything in it that is not understood."""
        problems: list[Problem] = []
        given = {key: value for key, value in config.items() if value is not None}
        settings = dict(self.settings)
        for key in self.keys:
            value = given.get(key.theirs, key.default)
            if value is REQUIRED:
                problems.append(Problem(key.theirs, f"is missing, and a {self.model_type} needs it"))
            elif value is not None:
                settings[key.ours] = value
        for name, allowed in {**{k: (v,) for k, v in ABSENT.items()}, **self.fixed}.items():
            if name in given and given[name] not in allowed:
                texts = ", ".join(str(value) for value in allowed)
                problems.append(
                    Problem(name, "is not understood with this value", given[name], texts, file=file)
                )
        used = {key.theirs for key in self.keys}
        if self.read is not None:
            seen = _Watched(given)
            self.read(seen, settings, problems)
            used |= seen.asked
        known = used | COMMON | self.fixed.keys() | ABSENT.keys() | self.ignored
        for name in sorted(given.keys() - known):
            hint = (
                "weights in a quantised format are not read: take the folder of the unquantised model"
                if name == "quantization_config"
                else did_you_mean(name, known - COMMON)
            )
            message = f"is not a key of {self.model_type} that is understood, and it may change the model"
            problems.append(Problem(name, message, given[name], hint=hint, file=file))
        return settings, problems

    def config_of(self, spec: RackSpec, facts: Settings) -> dict[str, Any]:
        """The config.json of a rack; `facts` are its `model.*` keys (see `facts.facts_of`)."""
        config: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.architecture]}
        config |= {key.theirs: facts[key.ours] for key in self.keys}
        config |= {name: allowed[0] for name, allowed in self.fixed.items()}
        return config | (self.write(spec) if self.write is not None else {})

    def rows(self, spec: RackSpec) -> list[Row]:
        """The table of all tensors."""
        return list(rows_of(spec, self.ends, self.block, self.layer))

    def today(self, name: str) -> str:
        """A tensor's name as files of today have it."""
        for old, new in self.renamed:
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name

    def skips(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.skipped)


class _Watched(dict[str, Any]):
    """A map that notes which keys were asked for."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)
