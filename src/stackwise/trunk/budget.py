"""Counting bytes against a limit."""

from __future__ import annotations

from collections.abc import Callable


class Budget:
    """Bytes in use and their limit. `make_room(n)` is asked to free bytes before a request is refused."""

    def __init__(self, limit: int, used: int = 0, make_room: Callable[[int], None] | None = None) -> None:
        if limit < 0:
            raise ValueError(f"a budget is 0 bytes or more, got {limit}")
        self.limit, self.used, self.peak = limit, used, used
        self._make_room = make_room

    @property
    def left(self) -> int:
        return max(0, self.limit - self.used)

    def take(self, count: int, leave: int = 0) -> bool:
        """Reserve `count` bytes, or none and False where less than `leave` would stay free."""
        if self.used + count > self.limit - leave and self._make_room is not None:
            self._make_room(self.used + count + leave - self.limit)
        if self.used + count > self.limit - leave:
            return False
        self.charge(count)
        return True

    def charge(self, count: int) -> None:
        """Count bytes that are there already, whatever the limit."""
        self.used += count
        self.peak = max(self.peak, self.used)

    def give(self, count: int) -> None:
        """Hand reserved bytes back."""
        assert 0 <= count <= self.used
        self.used -= count
