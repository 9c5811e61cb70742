"""Reading the present states of many tasks: a few keys by each command, a few commands on their way."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from .._slices import drained, in_slices
from ..errors import ConnectionLost, NotSent
from .outcomes import outcome_of
from .replies import CommandRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

    from twisted.internet.defer import Deferred
    from twisted.internet.interfaces import IDelayedCall, IReactorTime

    from .protocol import CommandProtocol

__all__ = ["Fetcher"]

#: Keys in one command, at first and at most: what comes back is decoded in one go, and bounded by ``max_reply_size``.
_SMALL, _BATCH = 8, 64
#: Bytes of a reply beyond which the next one is asked to be smaller.
_LARGE = 262_144
#: Commands that may wait for their answers.
_IN_FLIGHT = 2
#: Seconds until a server is asked again that cannot answer now.
_REST = 0.1


class Fetcher:
    """Fetches what is wanted, over one connection after the other.

    ``key_of`` gives a task's key; ``wanted`` holds the task ids that are still waited for when it is their turn. ``found`` is
    called with an id and what stands under its key; ``refused`` with ids and the server's final word.
    """

    def __init__(
        self,
        clock: IReactorTime,
        *,
        key_of: Callable[[str], bytes],
        wanted: Container[str],
        found: Callable[[str, bytes], object],
        refused: Callable[[list[str], Exception], object],
    ) -> None:
        self._clock = clock
        self._key_of = key_of
        self._wanted = wanted
        self._found = found
        self._refused = refused
        self._queue: deque[str] = deque()
        #: More of them, drawn when there is nothing more urgent.
        self._source: Iterator[str] = iter(())
        self._exhausted = True
        self._size = _SMALL
        self._in_flight = 0
        self._connection: CommandProtocol | None = None
        #: Answers that are being handed over.
        self._handing: set[Deferred[None]] = set()
        #: Set while a pause lasts, or where there is work for the next turn of the reactor.
        self._call: IDelayedCall | None = None

    @property
    def idle(self) -> bool:
        """Whether everything that was asked for has been fetched."""
        return self._exhausted and not self._queue and not self._in_flight and not self._handing

    def fetch(self, task_ids: Iterable[str]) -> None:
        """Fetch these, with what else is asked for in this turn of the reactor."""
        self._queue.extend(task_ids)
        if self._call is None and self._connection is not None and (self._queue or not self._exhausted):
            self._call = self._clock.callLater(0, self._pump)

    def fetch_at_leisure(self, task_ids: Iterator[str]) -> None:
        """Fetch these, drawn from the iterator as the server keeps up; those of before are forgotten."""
        self._source = task_ids
        self._exhausted = False
        self.fetch(())

    def connected(self, connection: CommandProtocol) -> None:
        """Use this connection from now on."""
        self._connection = connection
        self.fetch(())

    def disconnected(self) -> None:
        """The connection is gone; whatever was on its way has come back by now."""
        self._connection = None
        self._size = min(self._size, _SMALL)
        self._in_flight = 0
        self._cancel()

    def stop(self) -> None:
        """Forget everything."""
        self._queue.clear()
        self._source = iter(())
        self._exhausted = True
        self._cancel()
        for handing in list(self._handing):
            handing.cancel()

    def _cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None

    @property
    def _may_ask(self) -> bool:
        return self._call is None and self._in_flight + len(self._handing) < _IN_FLIGHT

    def _pump(self) -> None:
        self._call = None
        connection = self._connection
        while connection is not None and connection.writable and self._may_ask:
            ids, overdue = self._batch()
            if not ids:
                return
            self._in_flight += 1
            command = ("MGET", *map(self._key_of, ids))
            connection.send((command,), partial(self._answered, ids, overdue, connection))

    def _batch(self) -> tuple[list[str], bool]:
        """Take what is to be fetched next, and tell whether some of it comes from `fetch_at_leisure`."""
        ids: list[str] = []
        overdue = False
        queue, wanted = self._queue, self._wanted
        while len(ids) < self._size:
            if queue:
                task_id = queue.popleft()
            else:
                following = next(self._source, None)
                if following is None:
                    self._exhausted = True
                    break
                task_id = following
                overdue = True
            if task_id in wanted:
                ids.append(task_id)
        return ids, overdue

    def _answered(
        self, ids: list[str], overdue: bool, connection: CommandProtocol, outcome: list[Any] | Exception
    ) -> None:
        if connection is self._connection:
            self._in_flight -= 1
        if not isinstance(outcome, Exception) and not _is_answer(outcome[0], ids):
            outcome = connection.misfit("to MGET, something else than a value for each key")
        if isinstance(outcome, CommandRefused):
            # A user who may not use it (ACL ``-mget``) may use GET, as stock Celery does.
            self._get_each(ids, connection)
        elif isinstance(outcome, Exception):
            self._failed(ids, outcome)
        else:
            self._found_some(ids, overdue, connection, outcome[0])
        if self._call is None:
            self._pump()

    def _found_some(
        self, ids: list[str], overdue: bool, connection: CommandProtocol, values: list[bytes | None]
    ) -> None:
        found = [(task_id, value) for task_id, value in zip(ids, values, strict=True) if value is not None]
        if overdue and len(found) < len(ids):
            missing = [task_id for task_id, value in zip(ids, values, strict=True) if value is None]
            command = ("EXISTS", *map(self._key_of, missing))
            connection.send((command,), partial(self._counted, missing, connection))
        size = sum(len(value) for _, value in found)
        self._size = max(1, self._size // 8) if size > _LARGE else min(_BATCH, self._size * 2)
        if found:
            # Decoding takes its time; what comes next is asked for meanwhile.
            handing = in_slices(self._clock, drained(found), self._hand_over)
            if not handing.called:
                self._handing.add(handing)
                handing.addBoth(self._handed_over, handing)

    def _counted(
        self, missing: list[str], connection: CommandProtocol, outcome: list[Any] | Exception
    ) -> None:
        """MGET passes over what is no string. Where there is something all the same, ask for each, to hear what it is."""
        if not isinstance(outcome, Exception) and outcome[0]:
            self._get_each(missing, connection)

    def _get_each(self, ids: list[str], connection: CommandProtocol) -> None:
        for task_id in ids:
            connection.send((("GET", self._key_of(task_id)),), partial(self._got, task_id))

    def _got(self, task_id: str, outcome: list[Any] | Exception) -> None:
        if isinstance(outcome, Exception):
            self._failed([task_id], outcome)
        elif isinstance(outcome[0], bytes):
            self._hand_over((task_id, outcome[0]))

    def _handed_over(self, _: object, handing: Deferred[None]) -> None:
        self._handing.discard(handing)
        if self._call is None:
            self._pump()

    def _hand_over(self, found: tuple[str, bytes]) -> None:
        task_id, value = found
        if task_id in self._wanted:
            self._found(task_id, value)

    def _failed(self, ids: list[str], error: Exception) -> None:
        if isinstance(outcome_of(error), NotSent | ConnectionLost):
            self._queue.extendleft(reversed(ids))
            # The connection may have ended because the answer was too large for it.
            self._size = max(1, self._size // 8)
            if self._call is None and self._connection is not None:
                # Not at once, whatever it is: the connection may take nothing more, and end in a moment.
                self._call = self._clock.callLater(_REST, self._pump)
        else:
            self._refused(ids, error)


def _is_answer(reply: Any, ids: list[str]) -> bool:
    """Whether this can be the answer of MGET for so many keys."""
    return (
        isinstance(reply, list)
        and len(reply) == len(ids)
        and all(value is None or isinstance(value, bytes) for value in reply)
    )
