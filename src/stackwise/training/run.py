"""A run from config to report: data, rack, resume, the loop, and everything that is written beside it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch

from stackwise.checkpoint.errors import CheckpointError
from stackwise.checkpoint.manifest import Commit
from stackwise.checkpoint.store import Store
from stackwise.config.document import dump
from stackwise.config.objective_rules import label_of, masks, writes_samples
from stackwise.config.resolve import Derived, resolve
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.assemble import build_rack
from stackwise.curriculum.choices import shared_start_steps
from stackwise.curriculum.curricula import stages as stages_of_config
from stackwise.curriculum.joint import short_phase
from stackwise.curriculum.specs import first_spec, stage_specs
from stackwise.curriculum.split import apply_training, trained_units
from stackwise.data.corpus import Corpus
from stackwise.data.prepare import prepare
from stackwise.data.reference import reference_lines, tokens_besides
from stackwise.model.lexical import take_table_of
from stackwise.model.rack import Rack
from stackwise.objectives.base import Noise, Objective
from stackwise.objectives.build import objective_of
from stackwise.objectives.masked import Masked
from stackwise.tracking.console import ConsoleProgress
from stackwise.tracking.environment import peak_rss_bytes
from stackwise.tracking.events import Sink, Tracker
from stackwise.tracking.folder import RunFolder
from stackwise.tracking.metrics import MetricsFile
from stackwise.tracking.report import build_report
from stackwise.tracking.sinks.choose import Trackers, check_libraries
from stackwise.training import state
from stackwise.training.changes import Change, check_allowed, record
from stackwise.training.device import deterministic, keep_freed_memory, pick_device, pick_dtype
from stackwise.training.errors import GoBack, IncompatibleResumeError, Interrupted
from stackwise.training.hooks import Hooks
from stackwise.training.keeper import RunKeeper
from stackwise.training.loaders import identity_of, loader_steps, make_eval_loader, make_loader
from stackwise.training.loop import Engine
from stackwise.training.repair import mend_scores
from stackwise.training.resume import Where, approved, go_back, not_exact, restore, retention_of
from stackwise.training.samples import sample_text
from stackwise.training.start import start_from
from stackwise.training.stored import open_folder
from stackwise.training.surroundings import surroundings
from stackwise.training.validate import bits_per_byte, validate


def train(
    config: StackWiseConfig,
    *,
    sinks: list[Sink] | None = None,
    report: bool | None = None,
    allow_change: Sequence[str] = (),
    require_exact: bool = False,
) -> dict[str, Any]:
    """Run a config to its end and return what happened.

    Writes `checkpoint.dir`/`training.run_id`: resolved config, environment, metrics, tokenizer, commits, plots,
    report and sample. A folder that holds a run of the same config is continued exactly where it stopped
    (`checkpoint.resume`). `sinks` replace the console; `report` overrides `tracking.report`. `allow_change`: keys of
    the schedule that a resumed run may go on with other values of. `require_exact`: refuse to resume where the
    result would not have the bits of an uninterrupted run, for its versions or threads.

    Returns {run_dir, training_history, final_loss, eval_loss, total_training_time, architecture, resumed_from}.
    Raises ConfigError, DataError, RunFolderError, IncompatibleResumeError, NumericError, Interrupted.
    """
    config.validate()
    check_libraries(config.tracking.sinks)
    allow = check_allowed(allow_change)
    device = pick_device(config.training.device)
    dtype = pick_dtype(config.training.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    notes = config.notes()
    resolved, derived = resolve(config)
    assert resolved.data.cache_dir is not None
    corpus = prepare(resolved.data, resolved.data.cache_dir)
    tokenizer = corpus.tokenizer
    resolved, derived = resolve(config, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id)
    objective = objective_of(resolved, tokenizer.special_ids)
    loader = make_loader(resolved, corpus)
    with ExitStack() as stack:
        stack.enter_context(deterministic(resolved.training.deterministic))
        stack.callback(loader.close)
        folder, store, commit = open_folder(resolved)
        meta, changes, inexact = {}, list[Change](), None
        if commit is not None:
            meta = state.read_meta(store, commit)
            vocabulary = {"vocab_size": tokenizer.vocab_size, "mask_id": tokenizer.mask_id}
            changes = approved(config, resolved, folder, meta, allow, **vocabulary)
            inexact = not_exact(meta, surroundings(device, dtype), changes)
        if inexact is not None and require_exact:
            raise IncompatibleResumeError(
                f"{inexact}. Nothing was changed; leave --require-exact out to go on"
            )
        stack.enter_context(store.lock())
        trackers = Trackers(
            resolved.tracking,
            folder,
            resolved.training.run_id,
            lambda message: tracker.emit({"event": "note", "message": message}),
        )
        metrics = MetricsFile(folder.path, None if commit is None else meta)
        listed = [ConsoleProgress()] if sinks is None else sinks
        tracker = stack.enter_context(Tracker([metrics, *trackers.sinks, *listed]))
        trackers.open(metrics, resolved.to_dict(), resumed=commit is not None)
        for sentence in mend_scores(folder, store):
            tracker.emit({"event": "note", "message": sentence})
        folder.write_config(dump(resolved.to_dict()))
        folder.write_environment()
        corpus.tokenizer.save(folder.tokenizer)
        keeper = _keeper(resolved, corpus, store, metrics)
        stack.callback(keeper.close)
        hooks = _hooks(resolved, objective, corpus, folder, keeper, tracker, device, dtype)
        where: Where = {
            "device": device,
            "dtype": dtype,
            "hooks": hooks,
            "identity": identity_of(resolved, objective, corpus, device, dtype),
            "objective": objective,
        }
        stages = stages_of_config(resolved, loader_steps(resolved, loader))
        if commit is None:
            if (short := short_phase(resolved, stages)) is not None:
                notes.append(short)
            rack = Rack(first_spec(resolved, stages), seed=resolved.training.seed)
            take_table_of(resolved, rack)
            if resolved.checkpoint.init_from is not None:
                to_all = shared_start_steps(resolved, 1) > 0
                notes = [
                    start_from(rack, resolved.checkpoint.init_from, corpus.tokenizer, to_all=to_all),
                    *notes,
                ]
            engine = Engine(resolved, rack, stages, loader, **where)
        else:
            engine = restore(resolved, loader, store, commit, metrics, where, stages, bool(changes))
        _announce(engine, tracker, notes, derived, corpus, commit)
        for message in filter(None, (metrics.problem, inexact)):
            tracker.emit({"event": "note", "message": message})
        if changes:
            engine.progress.changes += record(changes, engine.progress.step)
            engine.save_again()
        status = "failed"
        try:
            while True:
                try:
                    engine.run()
                    break
                except GoBack as wish:
                    engine = go_back(engine, wish, store, metrics, where, stages)
                    trackers.rewind(metrics)
            status = "done"
        except Interrupted:
            status = "stopped"
            raise
        except Exception as error:
            tracker.emit({"event": "note", "message": str(error) or type(error).__name__})
            raise
        finally:
            with suppress(CheckpointError):  # what went wrong before it is the news
                keeper.drain()
                for event in keeper.events():
                    tracker.emit(event)
            if status != "failed":
                for message in trackers.last_words():
                    tracker.emit({"event": "note", "message": message})
            _close(engine, tracker, status)
            if resolved.tracking.report if report is None else report:
                build_report(folder.path)
    return _result(engine, folder, commit)


def _keeper(config: StackWiseConfig, corpus: Corpus, store: Store, metrics: MetricsFile) -> RunKeeper:
    def facts() -> dict[str, Any]:
        return {**metrics.fingerprint(), "corpus": corpus.hash, "tokenizer": corpus.tokenizer.hash}

    return RunKeeper(config.checkpoint, store, facts, before=metrics.sync, retention=retention_of(config))


def _hooks(
    config: StackWiseConfig,
    objective: Objective,
    corpus: Corpus,
    folder: RunFolder,
    keeper: RunKeeper,
    tracker: Tracker,
    device: torch.device,
    dtype: torch.dtype,
) -> Hooks:
    evaluation = make_eval_loader(config, corpus, config.evaluation.batches)
    chunk = config.training.loss_chunk_tokens
    split = corpus.validation
    # What masked objectives never hide costs nothing.
    free = objective.vocabulary.hidden if isinstance(objective, Masked) else ()
    n_tokens = tokens_besides(split, free)

    def evaluate(rack: Rack, noise: Noise | None = None) -> dict[str, Any]:
        rows = None if chunk == "auto" else int(chunk)
        passes = config.evaluation.passes if masks(config) else 1
        total, count = validate(
            rack,
            evaluation,
            objective=objective,
            passes=passes,
            noise=noise,
            dtype=dtype,
            rows_per_chunk=rows,
        )
        loss = total / count
        label = label_of(config, noise)
        known = label in ("exact", "bound")
        bits = bits_per_byte(loss, n_tokens, split.n_bytes) if known else None
        return {"loss": loss, "bits_per_byte": bits, "label": label}

    def sample(rack: Rack) -> tuple[str, str]:
        prompt, text = sample_text(rack, corpus.tokenizer, config)
        folder.write_sample(prompt + text)
        return prompt, text

    samples = sample if writes_samples(config) else None
    failed = partial(folder.write_failure, config=dump(config.to_dict()))
    return Hooks(
        emit=tracker.emit,
        evaluate=evaluate,
        sample=samples,
        keeper=keeper,
        scored=keeper.scored,
        failed=failed,
    )


def _announce(
    engine: Engine,
    tracker: Tracker,
    notes: list[str],
    derived: list[Derived],
    corpus: Corpus,
    commit: Commit | None,
) -> None:
    config, training = engine.config, engine.config.training
    specs = stage_specs(config, engine.stages, first_spec(config, engine.stages), engine.run_format)
    rows = []
    for stage, spec in zip(engine.stages, specs, strict=True):
        with torch.device("meta"):
            rack = build_rack(spec)
        apply_training(rack, trained_units(spec, stage), stage.alone)
        rows.append(
            {
                "name": stage.name,
                "n_stacks": stage.n_stacks,
                "steps": stage.steps,
                "params": rack.get_parameter_count(),
                "trainable_params": rack.get_trainable_parameter_count(),
                "trains": list(stage.trains),
            }
        )
    tracker.emit(
        {
            "event": "run_start",
            "run_id": training.run_id,
            "stages": rows,
            "total_steps": sum(stage.steps for stage in engine.stages),
            "device": str(engine.device),
            "dtype": str(engine.dtype).removeprefix("torch."),
            "n_params": rows[-1]["params"],
            "start_step": engine.progress.step,
            "vocab_size": engine.rack.spec.vocab_size,
            "seq_len": training.seq_len,
            "batch_tokens": training.batch_size * training.seq_len * training.gradient_accumulation_steps,
        }
    )
    if commit is not None:
        tracker.emit({"event": "note", "message": f"resumed from commit {commit.id}, step {commit.step}"})
        return
    train_tokens, held_out = corpus.train.n_tokens, corpus.validation.n_tokens
    text = f"data: {train_tokens:,} tokens to train on, {held_out:,} held out ({config.data.source})"
    lines = _reference_of(engine, corpus)
    for message in (text, *lines, *(str(d) for d in derived), *notes):
        tracker.emit({"event": "note", "message": message})


def _reference_of(engine: Engine, corpus: Corpus) -> list[str]:
    """What guessing hidden tokens without context costs, to hold losses against."""
    if not isinstance(engine.objective, Masked):
        return []
    hidden = engine.objective.vocabulary.hidden
    size = engine.rack.spec.vocab_size
    return [f"without context: {reference_lines(corpus.train, corpus.validation, size, hidden)}"]


def _close(engine: Engine, tracker: Tracker, status: str) -> None:
    p = engine.progress
    tracker.emit(
        {
            "event": "run_end",
            "step": p.step,
            "seconds": p.seconds,
            "final_loss": p.eval_loss if p.eval_loss is not None else p.loss_last,
            "status": status,
            "tokens": p.tokens,
            "flops": p.flops,
            "peak_rss_bytes": peak_rss_bytes(),
        }
    )


def _result(engine: Engine, folder: RunFolder, commit: Commit | None) -> dict[str, Any]:
    p, rack = engine.progress, engine.rack
    architecture = engine.config.model.architecture
    return {
        "run_dir": str(folder.path),
        "training_history": p.history,
        "final_loss": p.loss_last,
        "eval_loss": p.eval_loss,
        "total_training_time": p.seconds,
        "steps": p.step,
        "tokens": p.tokens,
        "flops": p.flops,
        "resumed_from": commit.id if commit else None,
        "architecture": {
            "n_stacks": len(rack.stacks),
            "blocks_per_stack": architecture.blocks_per_stack,
            "total_blocks": len(rack.spec.blocks),
            "params": rack.get_parameter_count(),
            "trainable": rack.get_trainable_parameter_count(),
        },
    }
