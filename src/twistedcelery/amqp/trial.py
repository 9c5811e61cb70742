"""Finds the message that the server closes the connection for, so that it does not take the others down again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConnectionLost, NotSent, Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twisted.internet.interfaces import IDelayedCall, IReactorTime

    from .._operations import Publish
    from .._outcomes import Outcome
    from ..interfaces import Done

__all__ = ["Trial"]

#: Seconds that one message may hold up the others. The server closes the connection for it as soon as it reads it; what takes longer
#: is a confirm that is late for reasons of its own.
_WITHIN = 10.0


class Trial:
    """Whatever was on its way when the server closed the connection because of a message is accused, and leaves again alone.

    One whose confirm comes is innocent. One for which the connection is closed again, while nothing else was on its way, is
    refused. One by one and not by halves: each connection more has to wait for the back-off, and a call that is lost with
    a second connection may be out of patience.

    ``on_its_way`` counts the messages without an outcome, ``changed`` is called when others may leave again.
    """

    def __init__(
        self, clock: IReactorTime, on_its_way: Callable[[], int], changed: Callable[[], object]
    ) -> None:
        self._clock = clock
        self._on_its_way = on_its_way
        self._changed = changed
        #: How many were on their way when the server closed the connection because of one of them.
        self._blamed = 0
        #: The accused message that is on its way.
        self._alone: Publish | None = None
        #: Who waits until nothing is on its way: one message, and others, as in `Apart`.
        self._askers: list[Done] = []
        self._timer: IDelayedCall | None = None

    @property
    def is_held(self) -> bool:
        """Whether nothing else may leave: an accused message is on its way."""
        return self._alone is not None

    @property
    def goes_on(self) -> bool:
        """Whether it wants to hear what becomes of messages."""
        return self._alone is not None or bool(self._askers) or bool(self._blamed)

    def wait(self, done: Done, error: Exception | None = None) -> None:
        """Call ``done`` once nothing is on its way, maybe before this returns; at once with an ``error``."""
        if error is not None or not self._on_its_way():
            done(error)
        else:
            self._askers.append(done)
            self._hold_up()

    def left(self, message: Publish) -> None:
        """An accused message is on its way."""
        self._alone = message
        self._hold_up()

    def _hold_up(self) -> None:
        self._cancel_timer()
        self._timer = self._clock.callLater(_WITHIN, self._late)

    def _late(self) -> None:
        self._timer = None
        self._alone = None
        self._answer(None)
        self._changed()

    def judge(self, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """Take what has become of messages; give what they are told."""
        if not self._blamed:
            for message, error in outcomes:
                if message is self._alone:
                    # A connection that was lost for another reason proves nothing.
                    message.accused = isinstance(error, ConnectionLost | NotSent)
                    self._alone = None
                    self._cancel_timer()
            return outcomes
        if self._blamed == len(outcomes) == 1:
            message, error = outcomes[0]
            if message.accused:
                message.accused = False
                return [(message, _refusal(error))]
        for message, _ in outcomes:
            message.accused = True
        return outcomes

    def go_on(self) -> None:
        """The outcomes are told: let the next one leave."""
        if self._alone is None and not self._blamed:
            if not self._askers:
                self._changed()
            elif not self._on_its_way():
                self._cancel_timer()
                self._answer(None)

    def _answer(self, error: Exception | None) -> None:
        askers, self._askers = self._askers, []
        for asker in askers:
            asker(error)

    def closing(self) -> None:
        """The server closes the connection because of a message; none has been told what has become of it."""
        self._blamed = self._on_its_way()

    def end(self, reason: Exception) -> None:
        """The connection is gone, and everybody has been told."""
        self._blamed = 0
        self._alone = None
        self._cancel_timer()
        self._answer(ConnectionLost(f"the connection ended before the message left: {reason}"))

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _refusal(error: Exception | None) -> Refused:
    """Say that it was this message's fault."""
    assert isinstance(error, ConnectionLost)
    refused = Refused(
        f"the server has ended the connection each time that it has read this message: {error.message}",
        code=error.code,
        url=error.url,
    )
    refused.__cause__ = error
    return refused
