"""A clock with threads that work when a test says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.task import Clock

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ThreadedClock"]


class ThreadedClock(Clock):
    """``in_thread`` keeps what a thread would do; `work` does the oldest of it."""

    def __init__(self) -> None:
        super().__init__()
        self._queued: list[Callable[[], object]] = []

    @property
    def queued(self) -> int:
        """How much there is to do for threads."""
        return len(self._queued)

    def in_thread(self, work: Callable[[], object]) -> None:
        """Keep it for later."""
        self._queued.append(work)

    def callFromThread(self, callable: Callable[..., object], *args: Any, **kwargs: Any) -> None:  # noqa: A002  # Twisted's name
        """Call at once."""
        callable(*args, **kwargs)

    def work(self) -> None:
        """Do the oldest of it."""
        self._queued.pop(0)()
