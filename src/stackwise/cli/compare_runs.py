"""The runs of a comparison: which are done, which can go on, and training the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stackwise.cli.errors import UsageError

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig
    from stackwise.data.tokenizers import Tokenizer
    from stackwise.planning.contest import Contestant
    from stackwise.tracking.events import Sink
    from stackwise.tracking.groups import RunGroup


class _Run(NamedTuple):
    contestant: Contestant
    seed: int
    path: Path
    config: StackWiseConfig


@dataclass(frozen=True)
class Race:
    """`seeds` runs of every contestant, with seeds from `first_seed` on, in folders below `out`."""

    out: Path
    tokenizer: Tokenizer
    first_seed: int
    seeds: int

    def check(self, contestants: Sequence[Contestant]) -> None:
        """UsageError where a folder holds a run of other settings: before anything trains."""
        for run in self._runs(contestants):
            changed = self._changed(run)
            if changed:
                raise UsageError(
                    f"{run.path} holds a run of other settings ({', '.join(changed)}); choose another --out, give the "
                    f"config another name ('CONFIG training.run_id=NAME'), or delete it: stackwise runs rm {run.path}"
                )

    def run(
        self,
        contestants: Sequence[Contestant],
        sinks: Callable[[], list[Sink] | None],
        tell: Callable[[str], None],
        again: str,
    ) -> Exception | None:
        """Train what is not done yet. A run whose numbers are not finite ends, the others go on; the last such error is
        returned. A stop by signal is raised with the command that continues."""
        from stackwise.training.errors import Interrupted, NumericError
        from stackwise.training.run import train

        runs, failed = list(self._runs(contestants)), None
        for number, run in enumerate(runs, 1):
            title = f"Run {number} of {len(runs)}: {run.path.name}"
            if _status(run.path) == "done":
                tell(f"{title}, done before")
                continue
            tell(title)
            try:
                train(run.config, sinks=sinks(), report=False)
            except NumericError as error:
                tell(f"{run.path.name} failed: {error}")
                failed = error
            except Interrupted as error:
                raise Interrupted(error.signum, f"{error}. To continue:\n  {again}") from None
        return failed

    def groups(self, contestants: Sequence[Contestant]) -> list[RunGroup]:
        """The runs of each contestant, as their folders tell them."""
        from stackwise.tracking.groups import RunGroup
        from stackwise.tracking.page import ReportedRun

        return [
            RunGroup(one.name, [ReportedRun.read(run.path) for run in self._runs([one])])
            for one in contestants
        ]

    def _runs(self, contestants: Sequence[Contestant]) -> Iterator[_Run]:
        for contestant in contestants:
            for seed in range(self.first_seed, self.first_seed + self.seeds):
                config = contestant.config.model_copy(deep=True)
                config.training.seed = seed
                config.training.run_id = f"{contestant.name}-s{seed}"
                config.checkpoint.resume, config.checkpoint.overwrite = "auto", False
                yield _Run(contestant, seed, self.out / config.training.run_id, config)

    def _changed(self, run: _Run) -> list[str]:
        """Keys in which a stored run differs, of those that decide what it comes to."""
        from stackwise.config.resolve import resolve
        from stackwise.config.root import StackWiseConfig
        from stackwise.tracking.folder import RunFolder
        from stackwise.training.changes import changes_between, course_of

        folder = RunFolder(run.path)
        if not folder.config.exists():
            return []
        stored = StackWiseConfig.from_yaml(folder.config)
        wanted, _ = resolve(run.config, vocab_size=self.tokenizer.vocab_size, mask_id=self.tokenizer.mask_id)
        changed = [change.key for change in changes_between(course_of(stored), course_of(wanted))]
        theirs, ours = stored.evaluation.model_dump(), wanted.evaluation.model_dump()
        return changed + [f"evaluation.{name}" for name in ours if theirs[name] != ours[name]]


def _status(path: Path) -> str | None:
    """The state of a stored run; null without one."""
    from stackwise.tracking.folder import RunFolder
    from stackwise.tracking.history import RunHistory
    from stackwise.tracking.metrics import read_metrics

    folder = RunFolder(path)
    if not folder.metrics.exists():
        return None
    return RunHistory.from_events(read_metrics(folder.metrics, strict=False).events).status
