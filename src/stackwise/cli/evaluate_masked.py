"""`stackwise eval` on runs that are not causal: a bound, or pseudo figures, beside reference lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stackwise.cli.output import print_table
from stackwise.config.objective_rules import corruption_of, label_of, masks, time_of
from stackwise.data.corpus import Corpus
from stackwise.data.reference import Reference, reference_lines
from stackwise.evaluation.masked import MaskedScores, masked_scores, pseudo_perplexity
from stackwise.evaluation.nelbo import Nelbo, nelbo
from stackwise.evaluation.windows import Progress
from stackwise.objectives.build import objective_of
from stackwise.objectives.denoiser import Denoiser, denoiser_of
from stackwise.objectives.depth import stack_noise
from stackwise.objectives.masked import Masked
from stackwise.training.device import pick_device
from stackwise.training.loaders import make_eval_loader
from stackwise.training.stored import OpenRun
from stackwise.training.validate import validate

Bar = Callable[[str], Progress]


def measure_masked(
    opened: OpenRun, corpus: Corpus, *, by_time: bool, pseudo_windows: int | None, bar: Bar
) -> dict[str, Any]:
    """The figures of a run on the held-out split of a corpus, by name. `bar`: see `output.progress_bar`."""
    config = opened.config
    rack = opened.rack.to(pick_device("auto"))
    objective = objective_of(config, corpus.tokenizer.special_ids)
    if not isinstance(objective, Masked) or corruption_of(config) == "gaussian":
        passes = config.evaluation.passes if masks(config) else 1
        total, count = validate(rack, make_eval_loader(config, corpus), objective=objective, passes=passes)
        return {"held_out": {"loss": total / count, "weight": count, "label": label_of(config)}}
    denoiser = denoiser_of(rack, config, corpus.tokenizer.special_ids)
    found = _measure(opened, corpus, denoiser, objective, by_time, pseudo_windows, bar)
    found["reference"] = reference_lines(
        corpus.train, corpus.validation, rack.spec.vocab_size, objective.vocabulary.hidden
    )
    return found


def _measure(
    opened: OpenRun,
    corpus: Corpus,
    denoiser: Denoiser,
    objective: Masked,
    by_time: bool,
    pseudo_windows: int | None,
    bar: Bar,
) -> dict[str, Any]:
    config, split, special = opened.config, corpus.validation, corpus.tokenizer.special_ids
    windows: dict[str, Any] = {
        "seq_len": config.training.seq_len,
        "batch_size": config.evaluation.batch_size or config.training.batch_size,
        "packing": config.data.packing,
        "doc_mask": config.data.doc_mask,
        "pad_id": corpus.tokenizer.pad_id,
    }
    passes = config.evaluation.passes
    if label_of(config) == "bound":
        windows |= {"passes": passes, "special_ids": special}
        found = {"bound": nelbo(denoiser, split, progress=bar("bound"), **windows)}
        if by_time:
            found["by_time"] = nelbo(
                denoiser, split, estimator="t", progress=bar("bound over times"), **windows
            )
        return found
    time = time_of(config)
    points = stack_noise(config, len(denoiser.rack.stacks)).points if time == "depth" else None
    # Where time says how much is masked there is no one share: all of them then, or those of the stacks.
    shares: list[Any] = [(p, p) for p in points] if points else [None if time == "none" else (0.0, 1.0)]
    return {
        "masked": [
            masked_scores(
                denoiser,
                objective,
                split,
                passes=passes,
                noise=noise,
                progress=bar("masked tokens"),
                **windows,
            )
            for noise in shares
        ],
        "pseudo_perplexity": pseudo_perplexity(
            denoiser,
            split,
            windows=pseudo_windows,
            special_ids=special,
            progress=bar("pseudo-perplexity"),
            **windows,
        ),
    }


def print_masked(found: dict[str, Any], *, counted_here: bool = False) -> None:
    """The figures for people. `counted_here`: the unigram line was counted in the very text that it is scored on."""
    reference: Reference | None = found.get("reference")
    if "held_out" in found:
        _line("loss", f"{found['held_out']['loss']:.4f} nats ({found['held_out']['label']})")
    if "bound" in found:
        _print_bound(found["bound"])
    if "by_time" in found:
        check: Nelbo = found["by_time"]
        _line("over times", f"{_with_error(check)} nats per token ({check.label})")
    for scores in found.get("masked", ()):
        _print_masked(scores, reference)
    if "pseudo_perplexity" in found:
        pseudo = found["pseudo_perplexity"]
        _line("pseudo-perplexity", f"{pseudo.pseudo_perplexity:.3f} ({pseudo.label})")
        _line("", f"{pseudo.tokens:,} tokens of {pseudo.windows:,} windows, each masked alone")
    if reference is not None:
        _line("reference", f"{reference} ({'counted in this text' if counted_here else 'exact'})")
    if "bound" in found:
        rows = [
            (
                f"{part.low:.3g} to {part.high:.3g}",
                f"{part.nats_per_token:.4f}",
                "–" if part.masked_loss is None else f"{part.masked_loss:.4f}",
            )
            for part in found["bound"].parts
        ]
        columns = ["masked share", "nats per token", "nats per masked token"]
        print_table("The bound in parts", columns, rows)


def _print_bound(result: Nelbo) -> None:
    _line("loss", f"at most {_with_error(result)} nats per token ({result.label})")
    _line("perplexity", f"at most {result.perplexity:.3f}")
    if result.bits_per_byte is not None:
        _line("bits per byte", f"at most {result.bits_per_byte:.4f}")
    _line("tokens", f"{result.tokens:,} in {result.windows:,} windows of {result.seq_len:,}")
    _line("passes", f"{result.passes:,}, other tokens masked in each")


def _print_masked(scores: MaskedScores, reference: Reference | None) -> None:
    _line("masked share", f"{scores.share:.1%} of the tokens, {scores.tokens:,} in {scores.passes:,} passes")
    error = "" if scores.standard_error is None else f" ± {scores.standard_error:.4f}"
    _line("masked loss", f"{scores.nats_per_masked_token:.4f}{error} nats per masked token ({scores.label})")
    beside = "" if reference is None else f"; the commonest token: {reference.unigram_accuracy:.2%}"
    _line("masked accuracy", f"{scores.accuracy:.2%}{beside}")


def _with_error(result: Nelbo) -> str:
    error = "" if result.standard_error is None else f" ± {result.standard_error:.4f}"
    return f"{result.nats_per_token:.4f}{error}"


def _line(name: str, text: str) -> None:
    print(f"  {name:<18}{text}")
