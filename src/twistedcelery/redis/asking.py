"""Questions and writes for a Redis that may be away for a moment."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater

from ..errors import ConnectionLost, NotSent, Stopped
from .outcomes import outcome_of

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

    from .._keeper import Keeper
    from .._operations import Write
    from ..interfaces import Done
    from .protocol import CommandProtocol

__all__ = ["Asker"]

#: How often a question is asked where connections break under it, and how many rounds of connecting it waits for.
_ATTEMPTS = 3
#: Seconds between two attempts.
_REST = 0.1


class Asker:
    """Has commands answered over the connection that a keeper keeps, and starts the keeper for it."""

    def __init__(self, clock: IReactorTime, keeper: Keeper[CommandProtocol]) -> None:
        self._clock = clock
        self._keeper = keeper
        self._connection: CommandProtocol | None = None
        self._writes: list[tuple[Write, Done]] = []
        #: Questions that will be asked again in a moment.
        self._resting: set[Deferred[None]] = set()
        self._stopped = False

    async def ask(self, *command: Any) -> Any:
        """Have one command answered, which does no harm where it is carried out twice.

        Raises what the last attempt raised, `Stopped`, or the error of the last round of connecting.
        """
        attempt = 0
        while True:
            attempt += 1
            if not self._stopped:
                self._keeper.start()
            connection = await self._keeper.when_connected(_ATTEMPTS)
            try:
                return await connection.command(*command)
            except Exception as error:
                passes = isinstance(outcome_of(error), NotSent | ConnectionLost)
                if self._stopped or attempt == _ATTEMPTS or not passes:
                    raise
            await self._rest()

    async def _rest(self) -> None:
        resting: Deferred[None] = deferLater(self._clock, _REST)
        self._resting.add(resting)
        try:
            await resting
        except CancelledError:
            if self._stopped:
                raise Stopped("stopped before the answer came", url=self._keeper.url) from None
            raise
        finally:
            self._resting.discard(resting)

    def write(self, write: Write, done: Done) -> None:
        """Carry out a captured write, or keep it until there is a connection or the next round has failed."""
        if self._stopped:
            done(NotSent("stopped", url=self._keeper.url))
        elif self._connection is None:
            self._writes.append((write, done))
            self._keeper.start()
        else:
            self._connection.send(write.commands, partial(_answered, done), transaction=write.transaction)

    def connected(self, connection: CommandProtocol) -> None:
        """Use this connection from now on."""
        self._connection = connection
        writes, self._writes = self._writes, []
        for write, done in writes:
            self.write(write, done)

    def disconnected(self) -> None:
        """The connection is gone."""
        self._connection = None

    def failed(self, reason: Exception) -> None:
        """Connecting has failed: what was to be written was not."""
        writes, self._writes = self._writes, []
        for _, done in writes:
            permanent = getattr(reason, "permanent", False)
            done(reason if permanent else NotSent(str(reason), url=self._keeper.url))

    def stop(self) -> None:
        """Ask nothing again, and write nothing more."""
        self._stopped = True
        for resting in list(self._resting):
            resting.cancel()
        self.failed(NotSent("stopped", url=self._keeper.url))


def _answered(done: Done, outcome: list[Any] | Exception) -> None:
    done(outcome_of(outcome) if isinstance(outcome, Exception) else None)
