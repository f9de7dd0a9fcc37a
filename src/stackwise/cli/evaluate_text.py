"""`stackwise eval RUN`: how well a run predicts text, its own that was held out or any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stackwise.cli.errors import UsageError
from stackwise.cli.evaluate_masked import measure_masked, print_masked
from stackwise.cli.output import note, print_json, progress_bar
from stackwise.config.objective_rules import corruption_of, label_of, masks
from stackwise.config.root import StackWiseConfig
from stackwise.data.corpus import Corpus, sha256_of
from stackwise.data.errors import DataError
from stackwise.data.prepare import prepare
from stackwise.data.reading import read_corpus
from stackwise.evaluation.perplexity import Perplexity, perplexity
from stackwise.evaluation.record import finite, keep, make_ready, record_of
from stackwise.evaluation.windows import Progress
from stackwise.training.device import pick_device
from stackwise.training.stored import OpenRun


def evaluate_text(
    path: Path,
    opened: OpenRun,
    *,
    text: str | None,
    text_key: str | None,
    seq_len: int | None,
    stride: int | None,
    batch_size: int | None,
    by_time: bool,
    pseudo_windows: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure a run on text, print the figures, and with `out` keep them in a file there."""
    config = opened.config
    causal = config.training.progressive.training_objective == "clm"
    _check(config, causal, text, text_key, by_time, pseudo_windows, stride)
    set_windows(opened, seq_len, stride, batch_size)
    corpus = own_corpus(opened) if text is None else read_corpus(text, opened.tokenizer, text_key=text_key)
    window = config.training.seq_len
    if causal and text is not None and stride is None:
        stride = window  # all of the text is scored, also the end that fills no window
    protocol = {
        "kind": "text",
        "likelihood": label_of(config),
        "seq_len": window,
        "stride": stride,
        "packing": config.data.packing,
        "doc_mask": config.data.doc_mask,
        "passes": config.evaluation.passes if masks(config) else 1,
        "by_time": by_time,
        "pseudo_windows": pseudo_windows,
        "dtype": "float32",
    }
    found = record_of(path, opened, protocol)
    found["data"] = {
        "text": text or "held out",
        "hash": sha256_of(corpus.manifest),
        "tokens": corpus.validation.n_tokens,
        "bytes": corpus.validation.n_bytes,
        "documents": corpus.validation.n_documents,
    }
    if out is not None:
        make_ready(out)
    with progress_bar() as bar:
        if causal:
            exact = _exact(opened, corpus, stride, bar("windows"))
            found |= exact.to_dict()
        else:
            measured = measure_masked(opened, corpus, by_time=by_time, pseudo_windows=pseudo_windows, bar=bar)
            found |= {name: _jsonable(value) for name, value in measured.items()}
    if out is not None:
        note(f"the figures are in {keep(out, found, found['data']['hash'])}")
    if as_json:
        print_json(finite(found))
        return
    what = f"bytes of {text}" if text is not None else "bytes of held-out text"
    print(f"{path}, step {opened.commit.step:,}, on {corpus.validation.n_bytes:,} {what}")
    if causal:
        _print(exact)
    else:
        print_masked(measured, counted_here=text is not None)


def _check(
    config: StackWiseConfig,
    causal: bool,
    text: str | None,
    text_key: str | None,
    by_time: bool,
    pseudo_windows: int | None,
    stride: int | None,
) -> None:
    """UsageError for an option that says nothing about this run."""
    label = label_of(config)
    if by_time and label != "bound":
        raise UsageError(f"--by-time is for runs whose loss is a bound, and that of this run is {label}")
    hides = label == "pseudo" and masks(config) and corruption_of(config) != "gaussian"
    if pseudo_windows is not None and not hides:
        raise UsageError(
            "--pseudo-windows is for runs that have a pseudo-perplexity: mlm, or diffusion at point masks"
        )
    if stride is not None and not causal:
        raise UsageError(
            "--stride is for causal runs: this one reads the tokens on both sides, and its windows do not overlap"
        )
    if text_key is not None and text is None:
        raise UsageError("--text-key goes with --text")


def set_windows(opened: OpenRun, seq_len: int | None, stride: int | None, batch_size: int | None) -> None:
    """Take over options on windows; those that cannot be are a UsageError that names them."""
    config, spec = opened.config, opened.rack.spec
    if batch_size is not None:
        config.evaluation.batch_size = batch_size
    if seq_len is not None:
        if not spec.fits(seq_len):
            raise UsageError(
                f"--seq-len {seq_len} is longer than the model's max_seq_len = {spec.max_seq_len}"
            )
        config.training.seq_len = seq_len
    if stride is not None and stride > config.training.seq_len:
        raise UsageError(
            f"--stride {stride} would leave out tokens between windows of {config.training.seq_len}; at most that"
        )


def own_corpus(opened: OpenRun) -> Corpus:
    """The corpus that the run was trained on, prepared again where it is not there any more."""
    config = opened.config
    if config.data.tokenizer not in ("byte", "char"):
        config.data.tokenizer = str(opened.folder.tokenizer)  # the run's own copy, which is always there
    assert config.data.cache_dir is not None  # a stored configuration is resolved
    corpus = prepare(config.data, config.data.cache_dir)
    if corpus.tokenizer.hash != opened.tokenizer.hash:
        raise DataError(
            "the text holds other characters than when the run was trained, so its tokens mean something else",
            where=f"data.path {config.data.path}",
            hint="put the text back as it was",
        )
    if not opened.meta["corpus"]:
        note(
            f"the model was imported and has no text of its own: this is what data.source {config.data.source} of its "
            "configuration holds out"
        )
    elif corpus.hash != opened.meta["corpus"]:
        note("the text has changed since the run was trained; what is held out now may have been trained on")
    return corpus


def _exact(opened: OpenRun, corpus: Corpus, stride: int | None, progress: Progress) -> Perplexity:
    """The likelihood of a causal run."""
    config = opened.config
    return perplexity(
        opened.rack.to(pick_device("auto")),
        corpus.validation,
        seq_len=config.training.seq_len,
        batch_size=config.evaluation.batch_size or config.training.batch_size,
        stride=stride,
        packing=config.data.packing,
        doc_mask=config.data.doc_mask,
        pad_id=corpus.tokenizer.pad_id,
        progress=progress,
    )


def _print(result: Perplexity) -> None:
    print(f"  loss            {result.nats_per_token:.4f} nats per token ({result.label})")
    print(f"  perplexity      {result.perplexity:.3f}")
    if result.bits_per_byte is not None:
        print(f"  bits per byte   {result.bits_per_byte:.4f}")
    overlap = "" if result.stride in (None, result.seq_len) else f", one every {result.stride:,}"
    print(f"  tokens          {result.tokens:,} in {result.windows:,} windows of {result.seq_len:,}{overlap}")


def _jsonable(value: Any) -> Any:
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return value if isinstance(value, dict) else value.to_dict()
