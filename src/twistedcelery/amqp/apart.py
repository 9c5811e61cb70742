"""Channels for messages that the broker may refuse: one message at a time on each, so that a refusal hits no other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConnectionLost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twisted.python.failure import Failure

    from .._operations import Publish
    from .._outcomes import Outcome
    from ..interfaces import Done
    from .protocol import AMQPProtocol, Channel

__all__ = ["Apart"]

#: Channels, and so messages on their way, at most.
_LIMIT = 8


class Apart:
    """A few channels of one connection. Whoever comes when all are busy waits for a confirm.

    `prepare` sees that a channel is free, `take` hands it to a message, and it is free again with the message's outcome, which
    ``outcomes`` is told.
    """

    def __init__(self, outcomes: Callable[[Sequence[Outcome]], None]) -> None:
        self._tell = outcomes
        self._free: list[Channel] = []
        self._taken: dict[Publish, Channel] = {}
        #: Channels that exist or are being opened.
        self._count = 0
        #: Who waits for a channel: one message, and others whose calls have ended meanwhile, whose declarations ended when they liked.
        self._askers: list[tuple[AMQPProtocol, Done]] = []

    @property
    def is_free(self) -> bool:
        """Whether a message may take a channel now."""
        return bool(self._free)

    @property
    def outstanding(self) -> int:
        """How many messages have no outcome yet."""
        return len(self._taken)

    def prepare(self, connection: AMQPProtocol, done: Done) -> None:
        """Call ``done`` once a channel is free, maybe before this returns, or with why there will be none."""
        if self._free:
            done(None)
            return
        self._askers.append((connection, done))
        if self._count < _LIMIT:
            self._open(connection)

    def _open(self, connection: AMQPProtocol) -> None:
        self._count += 1

        def opened(channel: Channel) -> None:
            channel.on_outcomes = self._outcomes
            channel.on_closed = lambda reason: self._closed(channel)
            self._free.append(channel)
            self._answer(None)

        def failed(failure: Failure) -> None:
            self._count -= 1
            error = failure.value
            assert isinstance(error, Exception)
            if not isinstance(error, ConnectionLost):
                error = ConnectionLost(f"a channel could not be opened: {error}", url=connection.config.url)
            self._answer(error)

        connection.open_channel(confirm=True).addCallbacks(opened, failed)

    def _answer(self, error: Exception | None) -> None:
        askers, self._askers = self._askers, []
        for _, done in askers:
            done(error)

    def take(self, message: Publish) -> Channel | None:
        """Hand a free channel to a message; None where there is none."""
        if not self._free:
            return None
        channel = self._taken[message] = self._free.pop()
        return channel

    def give_back(self, message: Publish) -> None:
        """The message has its outcome, or was not sent: its channel is free again, if it is open."""
        channel = self._taken.pop(message, None)
        if channel is None or not channel.is_open:
            return
        self._free.append(channel)
        self._answer(None)

    def _outcomes(self, outcomes: list[Outcome]) -> None:
        for message, _ in outcomes:
            self.give_back(message)
        self._tell(outcomes)

    def _closed(self, channel: Channel) -> None:
        """The server has refused the message of this channel, or the connection is gone."""
        self._count -= 1
        if channel in self._free:
            self._free.remove(channel)
        if self._askers:
            self._open(self._askers[-1][0])

    def end(self, reason: Exception) -> None:
        """The connection is gone: nobody waits any more."""
        self._answer(ConnectionLost(f"the connection ended before the message left: {reason}"))
