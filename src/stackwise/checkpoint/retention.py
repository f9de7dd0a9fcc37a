"""Which commits are kept, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stackwise.checkpoint.manifest import Commit
    from stackwise.checkpoint.settings import CheckpointSettings


@dataclass(frozen=True)
class Retention:
    """What pruning leaves. Whatever is asked for, the newest commit, those pinned by hand and the last verified
    one stay."""

    last: int = 1
    """The newest commits, at least 1."""
    best: int = 0
    """Those with the lowest validation losses."""
    every: int | None = None
    """Those whose step is a multiple of this; of several at one step the newest."""
    stages: bool = True
    """Those pinned by the run itself: the newest of each stage end."""

    def __post_init__(self) -> None:
        if self.last < 1 or self.best < 0 or (self.every is not None and self.every < 1):
            raise ValueError(f"{self}: last and every must be 1 or more, best 0 or more")

    @classmethod
    def of(cls, settings: CheckpointSettings) -> Retention:
        """What a run's configuration asks for."""
        return cls(settings.keep_last, settings.keep_best, settings.keep_every)


def kept(
    commits: Sequence[Commit],
    retention: Retention,
    *,
    pins: Mapping[str, str],
    scores: Mapping[str, float],
    verified: Mapping[str, float],
) -> dict[str, tuple[str, ...]]:
    """Why each kept commit is kept, by id. `commits` are all, oldest first; the order of nothing depends on a clock.

    pins: commit by pin made by hand. scores: validation loss by commit; equal losses: the older one is better.
    verified: time by commit.
    """
    reasons: dict[str, list[str]] = {}

    def keep(commit: Commit, why: str) -> None:
        reasons.setdefault(commit.id, []).append(why)

    for commit in commits[-retention.last :]:
        keep(commit, "newest" if commit is commits[-1] else f"last {retention.last}")
    known = [commit for commit in commits if commit.id in scores]
    for commit in sorted(known, key=lambda commit: scores[commit.id])[: retention.best]:
        keep(commit, f"best {retention.best}")
    if retention.every is not None:
        steps = {commit.step: commit for commit in commits if commit.step % retention.every == 0}
        for commit in steps.values():
            keep(commit, f"every {retention.every}")
    if retention.stages:
        ends = {commit.pin: commit for commit in commits if commit.pin is not None}
        for name, commit in ends.items():
            keep(commit, str(name))
    for commit in commits:
        for name in sorted(name for name, held in pins.items() if held == commit.id):
            keep(commit, f"pin {name}")
    whole = [commit for commit in commits if commit.id in verified]
    if whole:
        keep(whole[-1], "verified")
    return {commit: tuple(why) for commit, why in reasons.items()}
