"""Questions and writes for a Redis that may be away for a moment."""

from __future__ import annotations

from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.task import deferLater

from ..errors import ConnectionFailed, ConnectionLost, NotSent, ServerUnreachable, Stopped
from .outcomes import outcome_of

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

    from .._keeper import Keeper
    from .._operations import Write
    from ..interfaces import Done
    from .protocol import CommandProtocol

__all__ = ["Asker"]

_T = TypeVar("_T")

#: Seconds between two attempts.
_REST = 0.1
#: Seconds that a question has at least, which a policy without retries asks once.
_ONE_TRY = 4.0


class Asker:
    """Has commands answered over the connection that a keeper keeps, and starts the keeper for it.

    ``patience`` is the seconds for which a question is asked again while the server is away, or says that it cannot answer now.
    """

    def __init__(self, clock: IReactorTime, keeper: Keeper[CommandProtocol], *, patience: float) -> None:
        self._clock = clock
        self._keeper = keeper
        self._patience = patience
        self._connection: CommandProtocol | None = None
        self._writes: list[tuple[Write, Done]] = []
        #: Questions that will be asked again in a moment.
        self._resting: set[Deferred[None]] = set()
        self._stopped = False

    async def ask(self, *command: Any) -> Any:
        """Have one command answered, which does no harm where it is carried out twice.

        Raises what the last attempt raised, `Stopped`, the error of the last round of connecting; `ConnectionLost` where there is
        no answer, and `ServerUnreachable` where there is no connection, when the patience is over.
        """
        patient = self._clock.seconds() + self._patience
        end = max(patient, self._clock.seconds() + _ONE_TRY)
        while True:
            connection = await self._connected(patient, end)
            try:
                return await self._by(end, connection.command(*command))
            except DeferredTimeout:
                raise ConnectionLost(self._late("did not answer"), url=self._keeper.url) from None
            except Exception as error:
                passes = isinstance(outcome_of(error), NotSent | ConnectionLost)
                if self._stopped or not passes or self._clock.seconds() + _REST > patient:
                    raise
            await self._rest()

    async def _connected(self, patient: float, end: float) -> CommandProtocol:
        """Wait for the connection: through every round that begins before ``patient``, and no longer than ``end``."""
        while True:
            # First, as the round may fail before `start` returns.
            connected = self._keeper.when_connected(1)
            if not self._stopped:
                self._keeper.start()
            try:
                return await self._by(end, connected)
            except DeferredTimeout:
                cause = self._keeper.last_error
                why = "" if cause is None else f": {cause}"
                raise ServerUnreachable(self._late("was away") + why, url=self._keeper.url) from cause
            except ConnectionFailed as error:
                if error.permanent or self._clock.seconds() >= patient:
                    raise

    def _by(self, end: float, waiting: Deferred[_T]) -> Deferred[_T]:
        """Bound a wait by a moment."""
        if end == inf:
            return waiting
        return waiting.addTimeout(max(0.0, end - self._clock.seconds()), self._clock)

    def _late(self, what: str) -> str:
        return (
            f"the result backend {what} for {max(self._patience, _ONE_TRY):g} s, which its retry policy allows "
            "(result_backend_transport_options: retry_policy)"
        )

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
