"""The run as it is seen in a terminal: a live display below, one lasting line per thing worth keeping above.

Where standard output is not a terminal (a pipe, a log file, CI) there is no live display and no colour: one plain
line per event. ``rich`` is imported when a ``ConsoleProgress`` is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stackwise.tracking import units
from stackwise.tracking.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

__all__ = ["ConsoleProgress"]

_SAMPLE_LINES = 8
_WIDE = 64  # columns that the line about a growth takes, words and all


class ConsoleProgress:
    """Sink that shows a run in the terminal.

    ``console``: a ``rich.console.Console`` (default: one on standard output). ``live``: True or False forces the live
    display on or off; None asks the console whether it is a terminal.
    """

    def __init__(self, console: Console | None = None, *, live: bool | None = None) -> None:
        from rich.console import Console

        self.console = console or Console(highlight=False)
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal if live is None else live
        self.progress = Progress()
        self._live: Live | None = None
        self._before: Mapping[str, Any] | None = None  # the evaluation that a growth is measured against
        self._losses: list[float] = []  # the first and the last that this stage has logged

    def emit(self, event: Mapping[str, Any]) -> None:
        self.progress.update(event)
        handler = getattr(self, f"_on_{event['event']}")
        handler(event)
        if event["event"] == "stage_start" and self.live:
            self._show_live()

    def close(self) -> None:
        """Take the live display down; what was printed stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show_live(self) -> None:
        if self._live is None:
            from rich.live import Live

            from stackwise.tracking.display import Display

            # Drawn by its own clock and not per event: thousands of short steps must not pay for it.
            self._live = Live(
                Display(self.progress), console=self.console, refresh_per_second=4, transient=True
            )
            self._live.start()

    # One method per kind of event ----------------------------------------------------------------------------------

    def _on_run_start(self, event: Mapping[str, Any]) -> None:
        stages = len(event["stages"])
        resumed = f", resumed after step {units.steps(event['start_step'])}" if event["start_step"] else ""
        facts = [
            f"{stages} {'stage' if stages == 1 else 'stages'}",
            f"{units.steps(event['total_steps'])} steps",
            f"{units.count(event['n_params'])} parameters",
            f"{event['device']} {event['dtype']}",
            f"vocabulary {units.steps(event['vocab_size'])}",
            f"context {units.steps(event['seq_len'])}",
            f"{units.steps(event['batch_tokens'])} tokens a step",
        ]
        name = self._text(
            ("run ", "bold"), (units.printable(event["run_id"]), "bold cyan"), (resumed, "yellow")
        )
        self.console.print(
            name, soft_wrap=True
        )  # a long name is broken by the terminal, not torn from its label
        self._print_facts(facts, style="dim")

    def _on_stage_start(self, event: Mapping[str, Any]) -> None:
        self._losses = []
        trained = self.progress.stages[event["stage"]]["trains"] if self.progress.stages else []
        stacks = f"{event['n_stacks']} {'stack' if event['n_stacks'] == 1 else 'stacks'}"
        share = f"{units.count(event['trainable_params'])} of {units.count(event['params'])} parameters train"
        facts = [stacks, share, f"{units.steps(event['steps'])} steps"]
        if self.live:
            self._print()
        self._print_facts(
            facts, (f"stage {self._of(event)} ", "bold"), (units.printable(event["name"]) + "  ", "bold cyan")
        )
        if trained:
            self._print(("  trains " + units.printable(", ".join(trained)), "dim"))

    def _on_step(self, event: Mapping[str, Any]) -> None:
        self._losses = [*self._losses[:1], event["loss"]]
        if self.live:
            return
        progress = self.progress
        parts = [
            f"step {event['step']}/{progress.total_steps}",
            f"stage {self._of(event)}",
            f"loss {event['loss']:.4f}",
            f"lr {event['lr']:.2e}",
            f"grad {event['grad_norm']:.2f}",
            units.rate(progress.tokens_per_s),
            f"memory {units.size(event['rss_bytes'])}",
            f"left {units.remaining(progress.seconds_left)}",
        ]
        self._print(("  ".join(parts), ""))

    def _on_experts(self, event: Mapping[str, Any]) -> None:
        if self.live:
            return
        load = f"busiest {event['max_load']:.2f}, idlest {event['min_load']:.2f} times the mean"
        self._print((f"  experts {load}  balancing {event['loss']:.4f}", "dim"))

    def _on_eval(self, event: Mapping[str, Any]) -> None:
        when, before = event["when"], self._before
        self._before = None if when == "after_growth" else event
        if when == "before_growth":
            return  # its line comes with the growth, both values beside each other
        if when == "after_growth":
            self._growth(before, event)
            return
        label = {"interval": "", "stage_end": "end of the stage", "final": "end of the run"}[when]
        self._print_facts(
            [*filter(None, [label]), *self._figures(event)],
            ("  validation ", "green"),
            (units.loss(event["loss"]) + "  ", "bold green"),
            style="dim",
        )

    def _growth(self, before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> None:
        if before is None or before["step"] != after["step"]:
            self._print(("  grew  validation after growth ", ""), (units.loss(after["loss"]), "bold"))
            return
        arrow = "->" if self._ascii else "→"
        words = ("before ", "after ") if self.console.width >= _WIDE or not self.live else ("", "")
        self._print(
            (f"  grew  validation {words[0]}", "magenta"),
            (units.loss(before["loss"]), "bold magenta"),
            (f" {arrow} {words[1]}", "magenta"),
            (units.loss(after["loss"]), "bold magenta"),
            (f"  ({units.signed(after['loss'] - before['loss'])})", "dim"),
        )

    def _on_sample(self, event: Mapping[str, Any]) -> None:
        self._print(("  sample", "blue"), (f" after step {units.steps(event['step'])}", "dim"))
        bar = "  | " if self._ascii else "  │ "
        text = self._text((units.printable(event["prompt"]), "bold"), (units.printable(event["text"]), ""))
        lines = text.split("\n")
        shown = lines[:_SAMPLE_LINES]
        for line in shown:
            line.expand_tabs(4)
            line.truncate(max(8, self.console.width - len(bar)), overflow="ellipsis")
            self.console.print(self._text((bar, "blue")).append_text(line), no_wrap=True)
        if len(lines) > len(shown):
            self._print((f"{bar}{len(lines) - len(shown)} more lines", "dim"))

    def _on_checkpoint(self, event: Mapping[str, Any]) -> None:
        if not self.live:  # the live display names the last saved step
            written = f"{units.size(event['bytes_written'])} written"
            self._print((f"saved step {event['step']}  {written}  {event['seconds']:.2f} s", ""))

    def _on_note(self, event: Mapping[str, Any]) -> None:
        self._print(("note ", "yellow"), (units.printable(event["message"]), "dim"))

    def _on_stage_end(self, event: Mapping[str, Any]) -> None:
        arrow = "->" if self._ascii else "→"
        losses = self._losses or [event["loss_first"], event["loss_last"]]
        facts = [f"training loss {units.loss(losses[0])} {arrow} {units.loss(losses[-1])}"]
        shown = self._before is not None and self._before["step"] == event["step"]
        if event["eval_loss"] is not None and not shown:
            facts.append(f"validation {units.loss(event['eval_loss'])}")
        facts += [units.duration(event["seconds"]), f"{units.size(event['bytes']['peak'])} counted memory"]
        mark = "  done  " if self._ascii else "  ✓ "
        self._print_facts(facts, (mark, "green"))
        if event["stored"] is not None:
            self._print_facts(units.stored(event["stored"]), ("  stored outputs  ", "green"), style="dim")

    def _on_run_end(self, event: Mapping[str, Any]) -> None:
        self.close()
        style = {"done": "bold green", "stopped": "bold yellow", "failed": "bold red"}[event["status"]]
        facts = [
            f"{units.steps(event['step'])} steps",
            f"final loss {units.loss(event['final_loss'])}",
            f"{units.count(event['tokens'])} tokens",
            units.flops(event["flops"]),
            f"{units.duration(event['seconds'])} of training",
            f"peak memory {units.size(event['peak_rss_bytes'])}",
        ]
        if self.live:
            self._print()
        self._print_facts(facts, (event["status"] + "  ", style))

    # Small pieces --------------------------------------------------------------------------------------------------

    def _figures(self, event: Mapping[str, Any]) -> list[str]:
        figures = [units.labelled(f"perplexity {event['perplexity']:.2f}", event["label"])]
        if event["bits_per_byte"] is not None:
            figures.append(f"{event['bits_per_byte']:.3f} bits per byte")
        if not self.live or event["when"] == "interval":
            figures.append(f"step {units.steps(event['step'])}")
        return figures

    def _of(self, event: Mapping[str, Any]) -> str:
        return f"{event['stage'] + 1}/{max(len(self.progress.stages), event['stage'] + 1)}"

    @property
    def _ascii(self) -> bool:
        return self.console.options.ascii_only

    def _text(self, *parts: tuple[str, str]) -> Text:
        from rich.text import Text

        return Text.assemble(
            *((units.encodable(text, self.console.encoding), style) for text, style in parts)
        )

    def _print_facts(self, facts: list[str], *lead: tuple[str, str], style: str = "") -> None:
        """``lead``, then the facts with dots between them; in a terminal a line breaks between facts only."""
        line, dot = self._text(*lead), ", " if self._ascii else " · "
        first = True
        for fact in facts:
            if not first and self.live and line.cell_len + len(dot) + len(fact) > self.console.width:
                self.console.print(line)
                line, first = self._text(("    ", "")), True
            line.append_text(self._text((fact if first else dot + fact, style)))
            first = False
        self.console.print(line, soft_wrap=not self.live)

    def _print(self, *parts: tuple[str, str]) -> None:
        text = self._text(*parts)
        if not self.live:
            self.console.print(text, soft_wrap=True)  # a log file must not be broken at 80 columns
            return
        first, *rest = text.wrap(self.console, max(8, self.console.width - 4)) if parts else [text]
        self.console.print(first)
        for line in rest:
            self.console.print(self._text(("    ", "")).append_text(line))
