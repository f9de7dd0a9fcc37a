"""One run of the frontier: from keys and a corpus to a record of losses, costs and counted bytes."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depth_corpus import Automaton
from frontier_budget import Keys, config_of
from stackwise.config.resolve import resolve
from stackwise.curriculum.curricula import stages
from stackwise.curriculum.specs import first_spec
from stackwise.data.corpus import TokenSplit
from stackwise.data.loader import EvalLoader, TokenLoader
from stackwise.data.prepare import prepare
from stackwise.model.modes import eval_mode
from stackwise.model.rack import Rack
from stackwise.objectives.causal import CausalLM
from stackwise.planning.budget import run_flops
from stackwise.training.device import computing_in, keep_freed_memory, pick_device, pick_dtype
from stackwise.training.hooks import Hooks
from stackwise.training.loop import Engine

VERSION = 1
"""Part of every record's key: raise it when records of before can no longer stand beside new ones."""
EVAL_ROWS = 128
FLOPS_TOLERANCE = 0.005
"""By how much the FLOPs that a run has counted may differ from those its budget was computed with."""


@dataclass(frozen=True)
class Corpus:
    """Where the rows come from. `path` null: the automaton's language, `rows` and `held_out` rows of it."""

    name: str
    rows: int = 0
    held_out: int = 0
    path: str | None = None
    sha256: str = ""
    """Of the text file; the path itself may change."""

    @property
    def language(self) -> Automaton | None:
        return Automaton() if self.path is None else None

    @property
    def identity(self) -> list[Any]:
        """What the rows depend on."""
        return [self.name, self.rows, self.held_out, self.sha256]


@dataclass(frozen=True)
class Job:
    """One run. `axis`: what its budget was made equal on; `flops`: what it is expected to cost."""

    corpus: Corpus
    variant: str
    axis: str
    keys: Keys
    flops: float

    @property
    def seed(self) -> int:
        return int(self.keys["training.seed"])

    @property
    def name(self) -> str:
        """The record's file name: who it is, and a hash of everything that decides its numbers."""
        text = json.dumps([VERSION, {**asdict(self), "corpus": self.corpus.identity}], sort_keys=True)
        words = "-".join([self.corpus.name, self.variant.replace(",", "").replace(" ", "_"), self.axis])
        return f"{words}-s{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Data:
    """A corpus in memory. `hash` names it in the keys of stored activations."""

    train: TokenSplit
    validation: TokenSplit
    vocab_size: int
    hash: str


@lru_cache(maxsize=4)
def load(corpus: Corpus, seq_len: int) -> Data:
    """The rows of a corpus; text is cut into characters, its last tenth held out."""
    language = corpus.language
    if language is not None:
        name = f"automaton {asdict(language)}, {corpus.rows} rows of {seq_len}"
        train = language.split(corpus.rows, seq_len, seed=100)
        held_out = language.split(corpus.held_out, seq_len, seed=200, name="validation")
        return Data(train, held_out, language.vocab_size, hashlib.sha256(name.encode()).hexdigest())
    keys = {"data.source": "text", "data.path": corpus.path, "data.tokenizer": "char"}
    with tempfile.TemporaryDirectory() as folder:
        made = prepare(config_of(keys).data, folder)
        train, validation = (
            TokenSplit.from_arrays(split.tokens.copy(), split.doc_starts.copy(), name=split.name)
            for split in (made.train, made.validation)
        )
        return Data(train, validation, made.tokenizer.vocab_size, made.hash)


def rows_in(corpus: Corpus, seq_len: int) -> int:
    """Training rows of a corpus."""
    return (load(corpus, seq_len).train.n_tokens - 1) // seq_len


def run(job: Job) -> dict[str, Any]:
    """Train, and return the record. Raises RuntimeError where the run did not cost what its budget says."""
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as cache:
        keys = {**job.keys, "training.progressive.cache_dir": cache}
        record = train(job.corpus, keys, job.flops)
    answers = "" if record["accuracy"] is None else f", {100 * record['accuracy']:.1f} % of answers"
    corpus = {**asdict(job.corpus), "path": job.corpus.path and Path(job.corpus.path).name}
    head = {
        "job": {**asdict(job), "corpus": corpus, "name": job.name},
        "line": f"loss {record['loss']:.4f}{answers}",
    }
    return {**head, **record}


def engine_of(corpus: Corpus, keys: Keys, emit: Callable[[dict[str, Any]], None]) -> Engine:
    """The product's loop over the stages of a config on the rows of a corpus; `emit` hears of every event."""
    config, _ = resolve(config_of(keys))
    seq_len, batch = config.training.seq_len, config.training.batch_size
    data, device = load(corpus, seq_len), pick_device(config.training.device)
    dtype = pick_dtype(config.training.dtype, device)
    listed = stages(config)
    loader = TokenLoader(data.train, seq_len=seq_len, batch_size=batch, seed=config.training.seed)
    return Engine(
        config,
        Rack(first_spec(config, listed), seed=config.training.seed),
        listed,
        loader,
        device=device,
        dtype=dtype,
        hooks=Hooks(emit=emit),
        identity={
            "tokenizer": "ids",
            "data": data.hash,
            "rows": f"rows of {seq_len}",
            "corruption": "clm",
            "compute": f"{dtype} on {device.type}",
        },
    )


def held_out_of(corpus: Corpus, seq_len: int) -> EvalLoader:
    """The held-out rows that every run is scored on."""
    return EvalLoader(load(corpus, seq_len).validation, seq_len=seq_len, batch_size=EVAL_ROWS)


def train(corpus: Corpus, keys: Keys, expected_flops: float | None = None) -> dict[str, Any]:
    """Run the stages of a config over a corpus: held-out losses, costs, bytes of the stage with the highest peak."""
    losses: list[float] = []
    stage_seconds: list[float] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            losses.append(event["loss"])
        elif event["event"] == "stage_end":
            stage_seconds.append(time.process_time() - started - sum(stage_seconds))

    engine = engine_of(corpus, keys, note)
    dtype, held_out = engine.dtype, held_out_of(corpus, engine.config.training.seq_len)
    started = time.process_time()
    history = engine.run()
    seconds = time.process_time() - started
    p = engine.progress
    if expected_flops is not None and abs(p.flops - expected_flops) > FLOPS_TOLERANCE * expected_flops:
        raise RuntimeError(
            f"the run cost {p.flops / 1e9:.2f} GFLOP, and its budget was computed as {expected_flops / 1e9:.2f}"
        )
    return {
        **score(engine.rack, held_out, corpus.language, dtype),
        "flops": p.flops,
        "tokens": p.tokens,
        "steps": p.step,
        "cpu_seconds": seconds,
        "parameters": engine.rack.get_parameter_count(),
        "dtype": str(dtype).removeprefix("torch."),
        "stages": history,
        "train_losses": losses,
        "stage_cpu_seconds": stage_seconds,
        "outside_stacks": outside_stacks(engine.rack),
        "bytes": max((stage["bytes"] for stage in history), key=lambda b: b["peak"]),
    }


def outside_stacks(rack: Rack) -> int:
    """Bytes of embedding, final norm and head: weights, gradients and two moments each, where everything trains."""
    modules = (rack.embedding, rack.norm, rack.head)
    return 4 * sum(p.nbytes for module in modules for p in module.parameters())


@torch.no_grad()
def score(rack: Rack, batches: EvalLoader, language: Automaton | None, dtype: torch.dtype) -> dict[str, Any]:
    """Nats per target over all held-out rows; for the automaton also the states alone, by distance.

    `answer_loss` and `accuracy` are of the shown states, given that a state is shown: the model's probabilities of
    the states are taken alone, since when one is shown is chance.
    """
    total, count, answers = 0.0, 0, []
    with eval_mode(rack), computing_in(dtype, rack.device):
        for batch in batches:
            example = CausalLM().corrupt({key: value.to(rack.device) for key, value in batch.items()})
            logits = rack(
                example.input_ids, position_ids=example.position_ids, document_ids=example.document_ids
            ).float()
            valid = example.labels >= 0
            nll = torch.nn.functional.cross_entropy(logits[valid], example.labels[valid], reduction="sum")
            total, count = total + float(nll), count + int(valid.sum())
            if language is not None:
                answers.append(_answers(logits, example.input_ids, example.labels, language))
    result: dict[str, Any] = {"loss": total / count, "answer_loss": None, "accuracy": None, "by_distance": {}}
    if language is not None:
        distance, nll, right = (torch.cat(parts) for parts in zip(*answers, strict=True))
        result["answer_loss"], result["accuracy"] = float(nll.mean()), float(right.float().mean())
        for d in range(1, 13):
            if (distance == d).any():
                result["by_distance"][d] = float(right[distance == d].float().mean())
    return result


def _answers(
    logits_BTV: Tensor, ids_BT: Tensor, labels_BT: Tensor, language: Automaton
) -> tuple[Tensor, Tensor, Tensor]:
    """(distance, loss, whether right) of every target that is a state."""
    tokens = torch.cat((ids_BT, labels_BT[:, -1:]), dim=1)
    distance = torch.from_numpy(language.distances(tokens.cpu().numpy()))[:, 1:].to(ids_BT.device)
    shown = (labels_BT >= 0) & (labels_BT < language.states)
    logits, states = logits_BTV[shown][:, : language.states], labels_BT[shown]
    nll = torch.nn.functional.cross_entropy(logits, states, reduction="none")
    return distance[shown], nll, logits.argmax(-1) == states


def expected_flops(corpus: Corpus, keys: Keys) -> float:
    """What a run of these keys will count."""
    config = config_of(keys)
    return run_flops(config, rows_in(corpus, config.training.seq_len))


def save(record: dict[str, Any], folder: Path) -> None:
    """Write a record so that a reader finds all of it or nothing."""
    path = folder / f"{record['job']['name']}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record) + "\n")
    part.replace(path)
