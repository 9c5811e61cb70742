"""Who waits for which task id. Pure: no reactor, no I/O.

Every state of a task, however it came, goes through `Waiters.meta_received`. A final one (`READY_STATES`)
settles and removes whoever waits for that id; a state that nobody waits for yet is kept in a bounded
buffer, so that one that came too early is found, and one that came too late costs nothing for long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from celery.states import READY_STATES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .interfaces import Meta

__all__ = ["Waiter", "Waiters"]


class Waiter(Protocol):
    """Somebody who waits for a task."""

    def state_received(self, meta: Meta) -> None:
        """A state has come; after a final one this waiter is in no table any more for that id."""

    def wait_failed(self, task_id: str, error: Exception) -> None:
        """The state can never be given; this waiter is in no table any more for that id."""

    def never_sent(self, task_id: str, error: Exception) -> bool:
        """A call of this task is never sent. Fail and give True, unless this waits for another call of it, that may be."""

    def forget(self, task_id: str, error: Exception) -> None:
        """Nobody is to wait for this task's own result any more; whoever needs to know only whether it fails goes on."""

    def fail(self, error: Exception) -> None:
        """Fail, whatever comes; leave the table."""

    def lose(self, error: Exception) -> None:
        """As `fail`, unless the call has not left yet, so that its result is still to come."""


class Waiters:
    """The table of all waits of one TwistedCelery.

    ``watch(task_id)`` is called when the first waiter for an id comes, ``unwatch(task_id)`` when the last one
    has gone or was settled. ``unclaimed_limit`` is the number of states kept for ids that nobody waits for, ``unclaimed_bytes``
    the sum of their sizes as they came; the oldest go first, and one that is larger than that is not kept at all.
    """

    __slots__ = (
        "_many", "_single", "_size", "_sizes", "_unwatch", "_watch", "last_states", "unclaimed", "unclaimed_bytes", "unclaimed_limit",
    )  # fmt: skip

    def __init__(
        self,
        watch: Callable[[str], None],
        unwatch: Callable[[str], None],
        *,
        unclaimed_limit: int = 1000,
        unclaimed_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self._watch = watch
        self._unwatch = unwatch
        # Nearly every id has one waiter: a list for each would double what a pending call costs.
        self._single: dict[str, Waiter] = {}
        self._many: dict[str, list[Waiter]] = {}
        #: The newest state, not final, of each task that somebody waits for.
        self.last_states: dict[str, Meta] = {}
        #: The newest state of tasks that nobody waits for, oldest first.
        self.unclaimed: dict[str, Meta] = {}
        self.unclaimed_limit = unclaimed_limit
        self.unclaimed_bytes = unclaimed_bytes
        #: The bytes that each of these had when it came, and the sum of them.
        self._sizes: dict[str, int] = {}
        self._size = 0

    def __len__(self) -> int:
        """Return how many task ids are waited for."""
        return len(self._single) + len(self._many)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._single or task_id in self._many

    def __iter__(self) -> Iterator[str]:
        yield from self._single
        yield from self._many

    def of(self, task_id: str) -> list[Waiter]:
        """Everybody who waits for this task, at this moment."""
        waiter = self._single.get(task_id)
        return [waiter] if waiter is not None else list(self._many.get(task_id, ()))

    def waiting(self) -> list[Waiter]:
        """Everybody who waits, at this moment; one who waits for several ids may come several times."""
        return [*self._single.values(), *(waiter for waiters in self._many.values() for waiter in waiters)]

    def add(self, task_id: str, waiter: Waiter) -> None:
        """Wait for a task. Where its final state has come already, the waiter has it before this returns."""
        early = self.take_unclaimed(task_id) if self.unclaimed else None
        if early is not None and early["status"] in READY_STATES:
            waiter.state_received(early)
            return
        single = self._single
        if task_id in self._many:
            self._many[task_id].append(waiter)
        elif task_id in single:
            self._many[task_id] = [single.pop(task_id), waiter]
        else:
            single[task_id] = waiter
            self._watch(task_id)
        if early is not None:
            self.last_states[task_id] = early
            waiter.state_received(early)

    def take_unclaimed(self, task_id: str) -> Meta | None:
        """Take what is kept of a task that nobody waits for, if anything is."""
        meta = self.unclaimed.pop(task_id, None)
        if meta is not None:
            self._size -= self._sizes.pop(task_id)
        return meta

    def called(self, task_id: str) -> None:
        """The task is about to be called: what has come in its name belongs to another call."""
        self.take_unclaimed(task_id)

    def discard(self, task_id: str, waiter: Waiter) -> None:
        """Stop waiting. Does nothing where this waiter does not wait for that task."""
        if self._single.get(task_id) is waiter:
            del self._single[task_id]
        elif task_id in self._many:
            rest = [other for other in self._many[task_id] if other is not waiter]
            if rest:
                self._many[task_id] = rest
                return
            del self._many[task_id]
        else:
            return
        self._gone(task_id)

    def _gone(self, task_id: str) -> None:
        if self.last_states:
            self.last_states.pop(task_id, None)
        self._unwatch(task_id)

    def _take(self, task_id: str) -> list[Waiter]:
        waiter = self._single.pop(task_id, None)
        waiters = [waiter] if waiter is not None else self._many.pop(task_id, [])
        if waiters:
            self._gone(task_id)
        return waiters

    def meta_received(self, meta: Meta, size: int = 0) -> None:
        """Hand a state to whoever waits for it, or keep it for a while; ``size`` is the bytes that it had when it came."""
        task_id = meta["task_id"]
        if meta["status"] in READY_STATES:
            waiter = self._single.pop(task_id, None)
            if waiter is not None:
                self._gone(task_id)
                waiter.state_received(meta)
                return
            waiters = self._take(task_id)
        else:
            waiter = self._single.get(task_id)
            waiters = [waiter] if waiter is not None else list(self._many.get(task_id, ()))
            if waiters:
                self.last_states[task_id] = meta
        if not waiters:
            self._keep(task_id, meta, size)
        for waiter in waiters:
            waiter.state_received(meta)

    def _keep(self, task_id: str, meta: Meta, size: int) -> None:
        unclaimed, sizes = self.unclaimed, self._sizes
        size_before = sizes.get(task_id, 0)
        before = self.take_unclaimed(task_id)
        if before is not None and before["status"] in READY_STATES:
            # A duplicate, or an older state that was delivered again: what is final stays.
            meta, size = before, size_before
        if size > self.unclaimed_bytes:
            return
        unclaimed[task_id] = meta
        sizes[task_id] = size
        self._size += size
        while len(unclaimed) > self.unclaimed_limit or self._size > self.unclaimed_bytes:
            self.take_unclaimed(next(iter(unclaimed)))

    def fail(self, task_id: str, error: Exception) -> None:
        """Tell whoever waits for this task that its result can never be given."""
        for waiter in self._take(task_id):
            waiter.wait_failed(task_id, error)

    def never_sent(self, task_id: str, error: Exception) -> bool:
        """Tell whoever waits for this task that a call of it is never sent; return whether somebody waits for that call."""
        return sum(waiter.never_sent(task_id, error) for waiter in self.of(task_id)) > 0

    def forget(self, task_id: str, error: Exception) -> None:
        """End what waits for this task's own result, which is not wanted any more."""
        for waiter in self.of(task_id):
            waiter.forget(task_id, error)
