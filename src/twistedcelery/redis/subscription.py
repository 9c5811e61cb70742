"""A Redis connection in subscriber mode, without I/O: channels and patterns wanted, messages in.

In RESP2 a connection that has subscribed takes nothing but (P)SUBSCRIBE, (P)UNSUBSCRIBE and PING, and
everything that comes is a push, the acknowledgements included: one for each channel, in the order asked.

What is wanted is written at once while fewer than `IN_FLIGHT` of our commands wait for their
acknowledgements, and gathered otherwise, to leave together, at most `BATCH` names in a command, when one
has come. So a lone subscription waits for nothing, a burst becomes a few commands, and resubscribing
100,000 channels never holds up the reactor or fills a buffer: the server's answers set the pace.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..errors import AuthenticationFailed, ConnectionLost, TwistedCeleryError
from .connection import Connection, ConnectionConfig, State, pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["BATCH", "IN_FLIGHT", "SubscriberConnection"]

#: Names in one command: some 30 kB of task channels.
BATCH = 512
#: Commands that may wait for their acknowledgements.
IN_FLIGHT = 2

_PING = b"pong"


class SubscriberConnection(Connection):
    """Wanted names in, messages and acknowledgements out."""

    __slots__ = (
        "_gathered",
        "_sent",
        "_source",
        "on_message",
        "on_pattern_message",
        "on_refused",
        "on_subscribed",
    )

    def __init__(self, config: ConnectionConfig, **hooks: Any) -> None:
        super().__init__(config, **hooks)
        #: Called with channel and payload.
        self.on_message: Callable[[bytes, bytes], object] = _nothing
        #: Called with pattern, channel and payload.
        self.on_pattern_message: Callable[[bytes, bytes, bytes], object] = _nothing
        #: Called with a channel or pattern once the server has it: from now on its messages come.
        self.on_subscribed: Callable[[bytes], object] = _nothing
        #: Called with the names of a command that the server refused, and its error.
        self.on_refused: Callable[[list[bytes], Exception], object] = _nothing
        #: Wanted, not written yet: verb as it is acknowledged -> names.
        self._gathered: dict[bytes, dict[bytes, None]] = {
            b"unsubscribe": {}, b"punsubscribe": {}, b"subscribe": {}, b"psubscribe": {},
        }  # fmt: skip
        #: Written: verb, and the names not yet acknowledged, the last one first.
        self._sent: deque[tuple[bytes, list[bytes]]] = deque()
        #: Channels to subscribe to when there is nothing more urgent.
        self._source: Iterator[bytes] = iter(())

    @property
    def waiting(self) -> bool:
        """Whether the server owes an answer."""
        return bool(self._sent)

    def subscribe(self, names: Iterable[bytes], *, patterns: bool = False) -> None:
        """Want the messages of these channels (or patterns); may be called before the connection is open."""
        self._want(*((b"psubscribe", b"punsubscribe") if patterns else (b"subscribe", b"unsubscribe")), names)

    def unsubscribe(self, names: Iterable[bytes], *, patterns: bool = False) -> None:
        """Want them no more. Messages that are on their way still come."""
        self._want(*((b"punsubscribe", b"psubscribe") if patterns else (b"unsubscribe", b"subscribe")), names)

    def resubscribe(self, channels: Iterator[bytes]) -> None:
        """Subscribe to many channels, drawn from the iterator as the server keeps up.

        It should leave out whatever is not wanted any more when it is its turn. A new one replaces the old.
        """
        self._source = channels
        self._flush()

    def _want(self, verb: bytes, opposite: bytes, names: Iterable[bytes]) -> None:
        if self.state is State.CLOSED:
            return
        wanted, withdrawn = self._gathered[verb], self._gathered[opposite]
        for name in names:
            withdrawn.pop(name, None)
            wanted[name] = None
        self._flush()

    def _flush(self) -> None:
        """Write what is gathered, as far as it may be written now."""
        if self.state is not State.OPEN:
            return
        while len(self._sent) < IN_FLIGHT:
            verb, batch = self._next_batch()
            if not batch:
                return
            data = pack([(verb, *batch)])
            batch.reverse()
            self._sent.append((verb, batch))
            self._write(data)

    def _next_batch(self) -> tuple[bytes, list[bytes]]:
        """Take what is to be written next; an empty list: nothing."""
        for verb, names in self._gathered.items():
            if names:
                batch = list(islice(names, BATCH))
                for name in batch:
                    del names[name]
                return verb, batch
        return b"subscribe", self._call(list, islice(self._source, BATCH)) or []

    def ping(self) -> None:
        """Ask for a sign of life; any bytes are one."""
        self._sent.append((_PING, []))
        self._write(b"*1\r\n$4\r\nPING\r\n")

    def drain(self, reason: Exception) -> None:
        """Take nothing more; nobody waits for an answer here, so ``drained`` is called at once."""
        if self.state is not State.CLOSED:
            self.state = State.DRAINING
            self._ending()
            self._drained(reason)

    def connection_lost(self, reason: Exception) -> None:
        """Forget everything: what is still wanted has to be said to the next connection."""
        self.state = State.CLOSED
        self._ending()
        self._sent.clear()
        self._source = iter(())
        for names in self._gathered.values():
            names.clear()

    def _became_open(self) -> None:
        """Write what was wanted before the connection was open."""
        self._flush()
        super()._became_open()

    def _replied(self, reply: Any) -> None:
        """Take a push, or the answer to a command."""
        if self.state is not State.OPEN:
            return
        if type(reply) is list:
            match reply:
                case [b"message", bytes() as channel, bytes() as payload]:
                    self._call(self.on_message, channel, payload)
                    return
                case [b"pmessage", bytes() as pattern, bytes() as channel, bytes() as payload]:
                    self._call(self.on_pattern_message, pattern, channel, payload)
                    return
                case [verb, bytes() as name, int()] if self._sent and self._sent[0][0] == verb != _PING:
                    self._acknowledged(verb, name)
                    return
                case [b"pong", bytes()] if self._sent and self._sent[0][0] is _PING:
                    self._answered()
                    return
        elif isinstance(reply, TwistedCeleryError):
            self._refused(reply)
            return
        elif reply == b"PONG" and self._sent and self._sent[0][0] is _PING:
            # As a connection that is subscribed to nothing gets it.
            self._answered()
            return
        raise self.garbage("a push that nobody asked for")

    def _acknowledged(self, verb: bytes, name: bytes) -> None:
        names = self._sent[0][1]
        if names.pop() != name:
            raise self.garbage("an acknowledgement for another channel than asked")
        if not names:
            self._answered()
        if verb in (b"subscribe", b"psubscribe"):
            self._call(self.on_subscribed, name)

    def _refused(self, error: TwistedCeleryError) -> None:
        error.url = self.config.url
        if isinstance(error, AuthenticationFailed):
            raise error
        if not self._sent:
            raise ConnectionLost(error.message, url=self.config.url) from error
        verb, names = self._sent[0]
        self._answered()
        if verb in (b"subscribe", b"psubscribe"):
            self._call(self.on_refused, names[::-1], error)

    def _answered(self) -> None:
        """The oldest command has its answer."""
        self._sent.popleft()
        self._flush()

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except Exception:  # noqa: BLE001  # whatever a callable raises: the connection goes on
            self._bug()
            return None


def _nothing(*args: object) -> None:
    """Do nothing: nobody has said what to do."""
