"""The readers that are fuzzed: for each kind of file whole files to start from, and what reads a changed one.

A reader either takes a file or raises one of the errors that its documentation names. Folders are on the RAM disk.
"""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from reliability.mutate import changed_bytes, changed_json
from stackwise.checkpoint.errors import CheckpointError
from stackwise.checkpoint.manifest import Part, parse, serialize
from stackwise.config.document import dump
from stackwise.config.errors import ConfigError
from stackwise.config.root import StackWiseConfig
from stackwise.data.corpus import Corpus
from stackwise.data.errors import DataError
from stackwise.data.packing import make_rows
from stackwise.data.prepare import prepare
from stackwise.data.settings import DataSettings
from stackwise.data.sources import FileSource
from stackwise.data.tokenizer_rules import checked
from stackwise.data.tokenizers import load_tokenizer, train_bpe
from stackwise.interop.errors import InterchangeError
from stackwise.interop.families import family_of
from stackwise.interop.folder import ModelFolder
from stackwise.interop.hf_import import check_architecture, stackwise_config
from stackwise.interop.limits import check_room, check_sizes
from stackwise.model.describe import rack_spec
from stackwise.storage.errors import DamagedFileError, UnsafeInputError
from stackwise.storage.header import check_length, parse_header
from stackwise.storage.regular import parse_object
from stackwise.storage.tensors import TensorInfo
from stackwise.tracking.events import FIELDS
from stackwise.tracking.metrics import MetricsError, read_metrics
from stackwise.trunk.budget import Budget
from stackwise.trunk.disk import DiskStore
from stackwise.trunk.errors import CacheError
from stackwise.trunk.layout import Header

STORED = (DamagedFileError, UnsafeInputError)
TEXT = "To be, or not to be, that is the question: whether 'tis nobler\n"


@dataclass(frozen=True)
class Sample:
    """A whole file to start from. `name`: which file of its folder it is, where there are several."""

    data: bytes
    name: str = ""
    fields: Any = None
    """The same as JSON, where it is JSON."""

    def changed(self, draw: random.Random) -> bytes:
        if self.fields is not None and draw.random() < 0.7:
            return changed_json(self.fields, draw)
        return changed_bytes(self.data, draw)


class Target:
    """A kind of file. `share` of all inputs go to it; `errors` are what its reader may raise."""

    share = 1.0
    errors: tuple[type[Exception], ...] = STORED
    samples: list[Sample]

    def __init__(self, folder: Path) -> None:
        raise NotImplementedError

    def read(self, name: str, data: bytes) -> None:
        """Read an input as the product does."""
        raise NotImplementedError


def _json(value: Any, name: str = "") -> Sample:
    return Sample(json.dumps(value).encode(), name, value)


class Headers(Target):
    """Headers of safetensors files."""

    share = 0.38

    def __init__(self, folder: Path) -> None:
        entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
        fields = {"__metadata__": {"format": "pt"}, "a.weight": entry}
        fields["b.bias"] = {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]}
        fields["empty"] = {"dtype": "U8", "shape": [0], "data_offsets": [34, 34]}
        whole = save({"x": torch.zeros(3), "y": torch.ones(2, 2, dtype=torch.int64)}, {"format": "pt"})
        self.samples = [Sample(whole, "file"), _json(fields, "header")]

    def read(self, name: str, data: bytes) -> None:
        length, size = len(data), 34
        if name == "file":
            check_length(data[:8], len(data))
            length = int.from_bytes(data[:8], "little")
            data, size = data[8 : 8 + length], len(data) - 8 - length
        parse_header(data[:length], size, foreign=True)
        parse_header(data[:length], size)


class Manifests(Target):
    """Manifests of commits, under the name that their own bytes give: as somebody would write them who wants to."""

    share = 0.2
    errors = (*STORED, CheckpointError, ValueError)

    def __init__(self, folder: Path) -> None:
        infos = (TensorInfo("a.weight", "F32", (2, 3)), TensorInfo("b", "I64", ()))
        parts = {
            name: Part(name, hashlib.sha256(name.encode()).hexdigest(), 152, infos)
            for name in ("embedding/weights", "stack:s0/weights", "stack:s0/optimizer")
        }
        meta = {"format": 1, "progress": {"step": 7, "tokens": 100}, "loader": {"cursor": 3}, "loss": 0.25}
        _, text = serialize(
            number=2, step=7, parent="0" * 64, pin=None, bytes_written=9, meta=meta, parts=parts
        )
        self.samples = [Sample(text, fields=json.loads(text))]

    def read(self, name: str, data: bytes) -> None:
        parse(Path(f"000000007-{hashlib.sha256(data).hexdigest()[:16]}.json"), data, 0.0)


class Tokenizers(Target):
    """tokenizer.json, up to the point where the library would load it in a process of its own."""

    share = 0.12
    errors = (*STORED, DataError)

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tokenizer.json"
        words = train_bpe([TEXT * 9], 262).definition()
        small = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1, "b": 2}, "unk_token": "[UNK]"}
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "_"}
        template = {"id": "a", "ids": [1], "tokens": ["a"]}
        processor = {
            "type": "TemplateProcessing",
            "single": [],
            "pair": [],
            "special_tokens": {"a": template},
        }
        self.samples = [
            _json(words),
            _json(
                {
                    "version": "1.0",
                    "truncation": {"max_length": 3},
                    "padding": {"strategy": "BatchLongest"},
                    "added_tokens": [{"id": 3, "content": "new", "special": True}, {"id": 1, "content": "a"}],
                    "normalizer": {"type": "Sequence", "normalizers": [replace, {"type": "NFC"}]},
                    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated"},
                    "post_processor": processor,
                    "decoder": {"type": "Sequence", "decoders": [{"type": "Strip", "start": 1, "stop": 0}]},
                    "model": small,
                }
            ),
            _json({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5]]}}),
            _json({"format": "stackwise-tokenizer", "version": 1, "kind": "char", "characters": "abc", "separated": True}),
            _json({"format": "stackwise-tokenizer", "version": 1, "kind": "byte"}),
        ]  # fmt: skip

    def read(self, name: str, data: bytes) -> None:
        definition = parse_object(data, "tokenizer.json")
        if isinstance(definition.get("model"), dict) and definition.get("format") != "stackwise-tokenizer":
            checked(definition, "tokenizer.json")
            return
        self.path.write_bytes(data)
        load_tokenizer(self.path)


class Metrics(Target):
    """metrics.jsonl."""

    share = 0.07
    errors = (MetricsError,)

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        values = {"int": 1, "int?": None, "float": 0.5, "float?": None, "str": "a", "str?": None}
        lines = [
            {"event": kind, "time": 1.0} | {name: values[wanted] for name, wanted in FIELDS[kind].items()}
            for kind in ("note", "stage_start", "step", "sample")
        ]
        lines[2]["grad_norm"] = "NaN"
        whole = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        self.samples = [Sample(whole), *(_json(line) for line in lines)]

    def read(self, name: str, data: bytes) -> None:
        end = b"" if data.endswith(b"\n") else b"\n"
        self.path.write_bytes(data + end + self.samples[1].data + b"\n")  # a last line alone may be torn
        read_metrics(self.path, strict=False)
        read_metrics(self.path)


class Texts(Target):
    """Text files and rows of JSONL."""

    share = 0.07
    errors = (*STORED, DataError)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = b"".join(json.dumps({"text": TEXT, "n": i}).encode() + b"\n" for i in range(3))
        self.samples = [Sample(TEXT.encode() + "é漢🙂\n".encode(), "text"), Sample(rows, "jsonl"), _json({"text": TEXT}, "jsonl")]  # fmt: skip

    def read(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.write_bytes(data)
        for document in FileSource(name, (path,)).documents():
            document.text.encode()


class Files(Target):
    """A folder of several files, of which one is changed at a time."""

    def fill(self, folder: Path) -> None:
        self.folder = folder
        self.whole = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        self.samples = [
            Sample(data, name, json.loads(data) if name.endswith(".json") else None)
            for name, data in self.whole.items()
            if data
        ]

    def put(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)

    def restore(self, name: str) -> None:
        (self.folder / name).write_bytes(self.whole[name])


class Corpora(Files):
    """Prepared corpora: manifest, tokens, starts of documents, tokenizer; rows are made of them."""

    share = 0.05
    errors = (*STORED, DataError)

    def __init__(self, folder: Path) -> None:
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": TEXT * (i + 1)}) + "\n" for i in range(6)))
        corpus = prepare(DataSettings(source="jsonl", path=str(rows), tokenizer="char"), folder / "cache")
        self.fill(corpus.folder)

    def read(self, name: str, data: bytes) -> None:
        self.put(name, data)
        try:
            corpus = Corpus.open(self.folder)
            for split, packing in ((corpus.train, True), (corpus.validation, False)):
                split.check_vocabulary(64)
                rows = make_rows(split, 8, packing=packing)
                batch = rows.batch(np.arange(min(rows.n_rows, 64)))
                if int(batch["input_ids"].max()) >= 64 or int(batch["next_ids"].max()) >= 64:
                    raise AssertionError("an id outside of the vocabulary came through")
        finally:
            self.restore(name)


class Activations(Files):
    """Stored activations: header, index and a shard; every entry is asked for."""

    share = 0.05
    errors = (*STORED, CacheError)

    def __init__(self, folder: Path) -> None:
        self.header = Header.new({"prefix": "a" * 64, "boundary": 1}, (4, 8), 6, 2, "float32", "float32")
        store = DiskStore(folder / "store", Budget(2**30))
        draw = np.random.default_rng(0)
        for entry in range(10):
            store.put(entry, draw.integers(0, 256, self.header.entry_bytes).astype(np.uint8), self.header)
        store.close()
        self.fill(folder / "store")
        for path in list(self.whole):
            if path == "LOCK":
                del self.whole[path]
        entries = DiskStore(folder / "store", Budget(2**30))
        self.right = {}
        for entry in range(10):
            out = np.empty(self.header.entry_bytes, np.uint8)
            if not entries.get(entry, out):
                raise AssertionError("the sample is not whole")
            self.right[entry] = out
        entries.close()

    def read(self, name: str, data: bytes) -> None:
        self.put(name, data)
        store = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # that an entry is damaged and computed again
                store = DiskStore(self.folder, Budget(2**30))
                if store.header is None:
                    return
                store.header.check(self.header, self.folder)
                out = np.empty(self.header.entry_bytes, np.uint8)
                for entry in range(12):
                    if store.get(entry, out) and not np.array_equal(out, self.right.get(entry, ~out)):
                        raise AssertionError(f"entry {entry} came out with other bytes")
        finally:
            if store is not None:
                store.close()
            for path in self.folder.iterdir():  # opening cuts off what a dead writer would have left
                if path.name in self.whole:
                    self.restore(path.name)
                elif path.name != "LOCK":
                    path.unlink()
            for path_name in self.whole:
                self.restore(path_name)


class Yaml(Target):
    """Configuration files, read and checked."""

    share = 0.02
    errors = (ConfigError,)

    def __init__(self, folder: Path) -> None:
        self.path = folder / "c.yaml"
        small = {
            "model": {"d_model": 32, "n_heads": 2, "architecture": {"n_stacks": 2, "blocks_per_stack": 1}},
            "training": {"max_steps": 3, "optimizer": {"lr": 1e-4, "betas": [0.9, 0.99]}, "run_id": "x"},
            "data": {"source": "text", "path": ["a.txt"]},
        }
        written = (
            "training:\n  optimizer: {lr: 3e-4}  # note\n  seq_len: 1_28\nbase: [demo]\nmodel: {bias: true}\n"
        )
        self.samples = [Sample(dump(small).encode(), fields=small), Sample(written.encode())]

    def read(self, name: str, data: bytes) -> None:
        self.path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            StackWiseConfig.from_yaml(self.path)


class Models(Files):
    """Model folders: config.json, the index and a file of weights, up to the description of the rack."""

    share = 0.04
    errors = (*STORED, InterchangeError, ConfigError, FileNotFoundError)

    def __init__(self, folder: Path) -> None:
        shape = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
        other = {
            "rope_theta": 1e4,
            "rms_norm_eps": 1e-6,
            "architectures": ["LlamaForCausalLM"],
            "torch_dtype": "float32",
        }
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **shape, **heads, **other}))
        tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(12, 8) for i in range(3)}
        (folder / "one.safetensors").write_bytes(
            save({**tensors, "model.embed_tokens.weight": torch.zeros(20, 8)})
        )
        (folder / "two.safetensors").write_bytes(save({"model.norm.weight": torch.zeros(8)}))
        places = dict.fromkeys([*tensors, "model.embed_tokens.weight"], "one.safetensors")
        index = {
            "metadata": {"total_size": 1},
            "weight_map": {**places, "model.norm.weight": "two.safetensors"},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self.fill(folder)

    def read(self, name: str, data: bytes) -> None:
        self.put(name, data)
        try:
            opened = ModelFolder(self.folder)
            if name != "config.json":
                return
            family = family_of(opened.config.get("model_type"), "config.json")
            check_architecture(family, opened)
            check_sizes(family, opened)
            check_room(rack_spec(stackwise_config(family, opened.config)), opened)
        finally:
            self.restore(name)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "header": Headers,
    "manifest": Manifests,
    "tokenizer": Tokenizers,
    "metrics": Metrics,
    "text": Texts,
    "corpus": Corpora,
    "activations": Activations,
    "yaml": Yaml,
    "model": Models,
}
