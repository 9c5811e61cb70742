"""The extension points: what a broker is, and what a result source is.

A new technology is a new folder behind these two, chosen by the scheme of the URL in one table (``_rooms.py``).
Both live in the reactor thread, connect only when asked to, and never raise from the methods below: outcomes
go to the listener, or to the callables that were handed in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.defer import Deferred

    from ._operations import Publish, Write

__all__ = ["Broker", "BrokerListener", "Done", "Meta", "ResultListener", "ResultSource"]

#: Called once, with None where the server has done it, else with the error. Errors with a meaning of their own:
#: `ConnectionLost`: the connection ended before the server answered, it may have happened or may not;
#: `NotSent`: no byte of it left; `Refused` and `Unroutable`: the server's final word, not to be retried.
Done: TypeAlias = "Callable[[Exception | None], None]"

#: A task's state as Celery's backends store and send it: ``task_id``, ``status``, ``result``,
#: ``traceback``, ``children``, ``date_done`` ..., with ``result`` decoded as Celery decodes it.
Meta: TypeAlias = "dict[str, Any]"


class BrokerListener(Protocol):
    """Whoever hands a broker its work: the outbox."""

    def broker_ready(self) -> None:
        """Work is taken (again): a connection was made, or one that was blocked is free."""

    def broker_unavailable(self, reason: Exception) -> None:
        """Every server of the list was tried once, in vain, since the last call of this method.

        There was no connection, or time and again none that could be used. Comes again after each further round, and while connected
        where the server cannot take work now. ``reason.permanent`` is true where no attempt can help; after such a round the broker
        rests until `Broker.connect` is called.
        """

    def published(self, message: Publish, error: Exception | None) -> None:
        """The outcome of a message, as for `Done`; None: the broker has confirmed it."""


class Broker(Protocol):
    """Takes declarations and messages to a message broker."""

    #: True while work is taken: connected, not blocked by the server, transport buffer not full.
    ready: bool

    @property
    def url(self) -> str:
        """The server in use or tried last, without password."""

    @property
    def connected(self) -> bool:
        """True while there is an open connection, blocked or not."""

    def listen(self, listener: BrokerListener) -> None:
        """Say whom to tell; called once, before anything else."""

    def connect(self) -> None:
        """Begin, or go on, trying to connect. Does nothing where it is already so."""

    def prepare(self, message: Publish, done: Done) -> bool:
        """Declare what the message needs, where this connection has not done so yet. Only while ``ready``.

        True: nothing to do, ``done`` is not called. False: ``done`` will be called, maybe before this returns. One message at a time:
        not again before that, unless the message was given up; then ``done`` may never be called.
        """

    def publish(self, message: Publish) -> None:
        """Send a prepared message; its outcome goes to the listener. Only while ``ready``.

        Messages for the same queue arrive in the order of these calls.
        """

    def stop(self, timeout: float) -> Deferred[None]:
        """Close in an orderly way, at the latest after ``timeout`` seconds; fires when nothing is left open.

        A message that has no outcome yet gets `ConnectionLost`.
        """


class ResultListener(Protocol):
    """Whoever waits for results: the one door through which every state comes in."""

    def meta_received(self, meta: Meta, size: int = 0) -> None:
        """A state of a task has come, decoded.

        ``size`` is the bytes that were decoded: what is kept of tasks that nobody waits for is bounded by their sum. A source that
        brings only what is watched need not tell.
        """

    def result_failed(self, task_id: str, error: Exception) -> None:
        """What came for this task cannot be given: not a result, refused by Celery's decoder, or known lost."""

    def results_lost(self, error: Exception) -> Deferred[None]:
        """Whatever was pending here up to now is known to be lost (a reply queue that was deleted).

        Fires when all who waited have been told.
        """


class ResultSource(Protocol):
    """Brings the states of tasks, and does what a result backend does for a client."""

    #: False where a state can be read once only, as it arrives (rpc).
    rereadable: bool

    @property
    def url(self) -> str:
        """The server in use or tried last, without password."""

    def listen(self, listener: ResultListener) -> None:
        """Say whom to tell; called once, before anything else."""

    def prepare(self, done: Done) -> bool:
        """Whether a message whose result comes here may leave now.

        True: yes, ``done`` is not called. False: ``done`` will be called when it may (None) or cannot (error).
        A source that finds a result which came before it listened answers True at once.
        """

    def watch(self, task_id: str) -> None:
        """Bring every state of this task from now on, and its present one where it can be found."""

    def unwatch(self, task_id: str) -> None:
        """Nobody waits for this task any more."""

    def fetch(self, task_id: str) -> Deferred[Meta | None]:
        """Read the present state; None where the source knows none."""

    def fetch_group(self, group_id: str) -> Deferred[Any]:
        """Read a saved group as its ``as_tuple`` (lists for tuples after JSON); None where there is none."""

    def forget(self, task_id: str) -> Deferred[None]:
        """Remove what is kept for this task."""

    def write(self, write: Write, done: Done) -> None:
        """Carry out a captured write; ``done`` comes with the server's answer."""

    def hand_over(self, timeout: float) -> Deferred[None]:
        """Hand over the states that have come and wait for that: fires when it is done, at the latest after ``timeout`` seconds.

        Called before `stop`, while those who wait are still there.
        """

    def stop(self, timeout: float) -> Deferred[None]:
        """Close in an orderly way, at the latest after ``timeout`` seconds."""
