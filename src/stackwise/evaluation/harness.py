"""Tasks of lm-eval on a stored run, without an export. Importing this module needs the package lm_eval.

The three kinds of request of lm-eval are answered by our own scorers, so causal, masked and
diffusion models all take its tasks.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

# lm-eval would resample in forked processes, which is not safe beside threads of torch; it reads this when it does so.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from stackwise.config.errors import did_you_mean
from stackwise.data.errors import DataError
from stackwise.data.tokenizers import Tokenizer
from stackwise.evaluation.requests import Request, Scorer, encode
from stackwise.evaluation.windows import Progress, unseen
from stackwise.evaluation.zero_shot import Write

MAX_NEW_TOKENS = 256
"""Where a task does not say: the default of lm-eval."""

RESAMPLES = 1000
"""For standard errors of what is no mean, such as F1."""

VERSION = str(lm_eval.__version__)


class NativeModel(LM):
    """A model as lm-eval wants it. `max_length`: tokens that the model reads."""

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        write: Write,
        max_length: int,
        *,
        progress: Progress = unseen,
    ) -> None:
        super().__init__()
        self._scorer, self._tokenizer, self._write, self._max_length = scorer, tokenizer, write, max_length
        self._progress = progress

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding would give it) of each (context, continuation)."""
        # Texts that are compared have the number of their document in common, and so hide the same places.
        asked = [
            encode(self._tokenizer, context, continuation, self._scorer.start, int(request.doc_id or 0))
            for request in requests
            for context, continuation in [request.args]
        ]
        scores = self._scorer.score(asked, greedy=True, progress=self._progress)
        return [(score.nats, bool(score.greedy)) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Nats of whole texts, window after window, each token predicted once."""
        asked: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self._tokenizer.encode(request.args[0])
            start = self._scorer.start
            windows = get_rolling_token_windows(
                token_list=ids,
                prefix_token=-1 if start is None else start,
                max_seq_len=self._max_length if start is not None else self._max_length - 1,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                given = tuple(i for i in context if i != -1)
                asked.append(Request(given, tuple(continuation), number))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._scorer.score(asked, progress=self._progress), strict=True):
            totals[owner] += score.nats
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy continuations, each without the text at which it ended."""
        found = []
        for done, request in enumerate(requests, 1):
            prompt, options = request.args
            if options.get("do_sample") or options.get("temperature"):
                raise DataError("the task samples its answers; only greedy generation can be evaluated here")
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            found.append(self._write(prompt, until, int(options.get("max_gen_toks", MAX_NEW_TOKENS))))
            self._progress(done, len(requests))
        return found


Named = str | dict[str, Any]
"""The name of one of lm-eval's tasks, or its own description of one."""


def known_tasks(names: Sequence[Named]) -> TaskManager:
    """lm-eval's tasks. DataError for a name that is not among them, and for two tasks of one name."""
    manager = TaskManager(include_defaults=any(isinstance(name, str) for name in names))
    known = manager.all_tasks
    for name in names:
        if isinstance(name, str) and name not in known:
            hint = did_you_mean(name, known) or "`lm-eval ls tasks` lists them"
            raise DataError(f"there is no file {name}, and lm-eval has no task of this name", hint=hint)
    for name, count in Counter(map(_name, names)).items():
        if count > 1:
            raise DataError(
                f"two tasks are called {name}, and results are kept by name", hint="give one another `task`"
            )
    return manager


def run_named(
    model: NativeModel, names: Sequence[Named], manager: TaskManager, *, shots: int | None, limit: int | None
) -> dict[str, Any]:
    """lm-eval's results by task: its metrics as it names them, standard errors of means, `n` and its version of the task.

    `manager`: that of `known_tasks`. DataError for data that could not be loaded, and for a task whose packages are missing.
    """
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(names),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=RESAMPLES,
        )
    except ImportError as error:
        raise DataError(
            f"lm-eval could not run {', '.join(map(_name, names))}: {error}",
            hint="install the package that this task of lm-eval asks for",
        ) from None
    except (OSError, ValueError) as error:  # what a data set that is out of reach raises
        if isinstance(error, DataError):
            raise
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise DataError(
            f"lm-eval could not run {', '.join(map(_name, names))}: {error}",
            hint=f"its own tasks take their data from the network{offline}; a local task file needs none",
        ) from None
    return {
        name: {
            "metrics": {
                key.partition(",")[0]: value
                for key, value in metrics.items()
                if isinstance(value, int | float) and "stderr" not in key and key != "sample_len"
            },
            "standard_errors": {
                key.partition(",")[0].removesuffix("_stderr"): value
                for key, value in metrics.items()
                if isinstance(value, int | float) and "_stderr" in key
            },
            "n": found["n-samples"].get(name, {}).get("effective"),
            "shots": found["n-shot"].get(name),
            "version": found["versions"].get(name),
        }
        for name, metrics in found["results"].items()
    }


def _name(name: Named) -> str:
    return name if isinstance(name, str) else str(name.get("task"))
