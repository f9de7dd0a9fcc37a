"""The `stackwise` command: its verbs, and the one place where errors become messages and exit codes.

Verbs import what they need when they run, so that help and mistakes in a configuration never import torch.
"""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from stackwise.cli import (
    cache,
    chat,
    ckpt,
    compare,
    config,
    data,
    demo,
    encoder,
    evaluate,
    generate,
    hf,
    info,
    merge,
    nlu,
    plan,
    profile,
    report,
    runs,
    tokenizer,
    train,
    watch,
)
from stackwise.cli.errors import GENERAL, INTERRUPTED, exit_code, explain, is_known
from stackwise.tracking.units import printable

HELP_NAMES = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="stackwise",
    # Plain help: it is readable everywhere, and rich would take as long to import as all the rest.
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP_NAMES,
    epilog="Exit codes: 0 done, 2 usage or configuration, 3 damaged data, 4 run in use, 5 loss not finite, "
    "6 no space, 7 stored run does not fit, 8 unsafe input, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 1 anything else.",
)


@dataclass
class Flags:
    """Options before the verb."""

    debug: bool = False


def _version(wanted: bool) -> None:
    if wanted:
        from stackwise import __version__

        print(f"stackwise {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="STACKWISE_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train transformer language models stack by stack.

    \b
    First steps:
      stackwise demo                             a model grows from 1 to 4 stacks, in two minutes
      stackwise generate runs/demo               text from it
      stackwise config show demo --source > my.yaml
      stackwise plan my.yaml                     what it will cost
      stackwise train my.yaml data.source=text data.path=my.txt

    CONFIG is a YAML file or the name of a shipped preset; further KEY=VALUE words override single keys
    (`stackwise config schema` lists them all). RUN is a run folder, or its name where it lies in ./runs.
    """
    context.obj.debug = debug


app.command("demo", short_help="Watch a small model grow on real text, in two minutes.")(demo.demo)
app.command("train", short_help="Train as a configuration says.")(train.train)
app.command("merge", short_help="Unite stacks that were trained independently.")(merge.merge)
app.command("import", short_help="Take over a model of the Hugging Face format.")(hf.import_model)
app.command("export", short_help="Write a run in the Hugging Face format.")(hf.export_model)
app.command("plan", short_help="Show the stages of a run and what they cost.")(plan.plan)
app.command("profile", short_help="Run a few steps: speed, operators, and bytes planned and measured.")(
    profile.profile
)
app.command("compare", short_help="Train several configs for the same compute, and compare them.")(
    compare.compare
)
app.command("generate", short_help="Continue a prompt, or fill the gaps of a text.")(generate.generate)
app.command("chat", short_help="Continue one prompt after another.")(chat.chat)
app.command("fill", short_help="Show likely tokens for the gaps of a text.")(encoder.fill)
app.command("embed", short_help="Turn texts into vectors.")(encoder.embed)
app.command("nlu", short_help="Fine-tune a run on tasks of language understanding.")(nlu.nlu)
app.command("eval", short_help="Measure a run on its held-out text.")(evaluate.evaluate)
app.add_typer(runs.app, name="runs")
app.add_typer(ckpt.app, name="ckpt")
app.command("report", short_help="Build the report of a run again.")(report.report)
app.command("watch", short_help="Show a run in the browser while it trains.")(watch.watch)
app.add_typer(cache.app, name="cache")
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(tokenizer.app, name="tokenizer")
app.command("info", short_help="Show what a run would find on this machine.")(info.info)


def run() -> None:
    """The console entry point."""
    _prepare_process()
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code. Every error ends here, on standard error."""
    flags = Flags()
    try:
        result = app(list(arguments), prog_name="stackwise", standalone_mode=False, obj=flags)
        sys.stdout.flush()
        return _returned(result)
    except BrokenPipeError:
        return _reader_gone()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last place where it can be explained
        return _failed(error, arguments, flags)


def _returned(result: Any) -> int:
    """typer hands back the code of an early exit, and 130 for Ctrl-C, in place of the verb's own None."""
    if result == INTERRUPTED:
        # the terminal has put ^C on the line that was being written
        print("\ninterrupted" if sys.stderr.isatty() else "interrupted", file=sys.stderr)
    return result if isinstance(result, int) else 0


def _failed(error: BaseException, arguments: Sequence[str], flags: Flags) -> int:
    if flags.debug:
        import traceback

        traceback.print_exception(error)
    else:
        print(printable(explain(error)), file=sys.stderr)
        if not is_known(error):
            again = shlex.join(["stackwise", "--debug", *arguments])
            print(f"This was not foreseen. For the traceback: {again}", file=sys.stderr)
    return exit_code(error)


def _reader_gone() -> int:
    """Who read our output has closed it (`stackwise config schema | head`): nothing to report, nobody to tell."""
    # What is still buffered would raise once more at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return GENERAL


def _prepare_process() -> None:
    """SIGTERM and SIGHUP clean up, text that the terminal cannot show ends no run, a warning is one line without source code."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, _unwind)
    # Threads of the math libraries that wait by spinning cost ten times the work itself when cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("default", category=DeprecationWarning, module=r"stackwise\.")
    warnings.formatwarning = _one_line


def _unwind(signum: int, frame: Any) -> None:
    """SIGTERM or SIGHUP outside of the training loop, which has its own answer."""
    sys.exit(128 + signum)


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"warning: {printable(str(message))}\n"


if __name__ == "__main__":
    run()
