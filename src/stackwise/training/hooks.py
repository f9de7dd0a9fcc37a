"""What the loop needs from outside: a stream of batches, and whom it tells, asks and hands its state to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from stackwise.model.rack import Rack

if TYPE_CHECKING:
    from stackwise.training.loop import Engine

Event = dict[str, Any]


class Loader(Protocol):
    """An endless stream of batches whose position can be saved.

    `seek` goes to the batch after `batches` ones from the start, `skip` leaves the next ones out; `reshape` changes rows and batches, null to the usual.
    """

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]: ...
    def seek(self, batches: int) -> None: ...
    def skip(self, batches: int) -> None: ...
    def reshape(self, seq_len: int | None, batch_size: int | None) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Keeper(Protocol):
    """Makes the state of a run durable, at once or beside the training (`training.keeper.RunKeeper`)."""

    def begin(self, engine: Engine) -> None:
        """A stage is set up: what rests in it must not change from now on."""

    def save(self, engine: Engine, pin: str | None, since: float) -> None:
        """Begin to save; the state may change as soon as this returns. `pin`: a name under which pruning keeps it. `since`: when,
        by `time.perf_counter`, the training stopped for it."""

    def events(self) -> list[Event]:
        """What to report of the saves that ended since the last call. Raises what made one fail."""

    def drain(self) -> None:
        """Wait until everything is on the disk."""


@dataclass
class Hooks:
    """What the loop calls out to. Each may be left as it is.

    emit: takes every event. evaluate: rack, and the range of noise that the stage is scored on
    where it has one, -> {"loss": nats per token, ...}, or null. sample: rack -> (prompt, text) or null. keeper: saves.
    failed: keeps the facts of a numeric failure and returns where, or null.
    scored: told the step and the validation loss of an evaluation that followed a save of the same step.
    """

    emit: Callable[[Event], None] = lambda event: None
    evaluate: Callable[..., dict[str, Any]] | None = None
    sample: Callable[[Rack], tuple[str, str]] | None = None
    keeper: Keeper | None = None
    failed: Callable[[dict[str, Any]], str] | None = None
    scored: Callable[[int, float], object] = lambda step, loss: None
