"""`stackwise chat`."""

from __future__ import annotations

import contextlib
import sys

from stackwise.cli.errors import UsageError
from stackwise.cli.generate import (
    Greedy,
    MaxNewTokens,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    on_best_device,
    sampling,
    writer,
)
from stackwise.cli.options import Run, Threads, find_run


def chat(
    run: Run,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    seed: Seed = None,
    greedy: Greedy = False,
    threads: Threads = None,
) -> None:
    """Write a text in turns with the model of a run: you a line, the model what follows.

    The model continues the whole text so far, as far as its context reaches. It was trained to continue text, not to
    answer. Ctrl-D or Ctrl-C ends it. A model that sees both directions cannot: `stackwise generate` fills gaps with it.

    \b
    Examples:
      stackwise chat runs/demo
      stackwise chat demo --temperature 0.7 --stop $'\\n' --max-new-tokens 200
    """
    path = find_run(run)
    from stackwise.training.stored import open_run

    opened = open_run(path)
    if not opened.rack.is_causal:
        raise UsageError(
            "`stackwise chat` needs a causal model, and that of this run sees both directions; "
            "`stackwise generate` fills masked positions with it (in Python: Rack.denoise)"
        )
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
        "seed": seed,
    }
    settings = sampling(opened, options, greedy)
    from stackwise.inference.chat import ChatSession

    with contextlib.suppress(ImportError):  # where there is one, lines can be edited and recalled
        import readline  # noqa: F401

    in_terminal = sys.stdin.isatty()
    if in_terminal:
        print(f"{path}, step {opened.commit.step}. Write a line; Ctrl-D ends.")
    session = ChatSession(on_best_device(opened), opened.tokenizer, settings)
    session.loop(lambda: input("> " if in_terminal else ""), writer())
