"""A Redis connection as a state machine, without I/O.

::

    NEW --start()--> GREETING --all answered--> OPEN --drain()--> DRAINING --last answer--> (drained)
     |                  |                         |                   |
     +------------------+-------------------------+-------------------+--connection_lost()--> CLOSED

RESP2, which every server from Redis 5 on speaks, Valkey included; two connections, because pushes that
share a connection with replies would put the replies under the server's limit for pub/sub output
(see the design page). The greeting is one write: ``AUTH``, ``SELECT``, ``CLIENT SETNAME`` as far as the
settings ask for them, ``ROLE`` where a Sentinel named the server, and ``PING``, whose answer tells that commands are taken (a server that wants a
password, or is loading its data, says so here). ``AUTH user password`` is repeated without the user for
Redis 5, as redis-py does.

Replies come in the order of the commands, so the commands in flight are a queue and nothing else.
What is fed is parsed by hiredis; what it cannot parse, a reply that nobody asked for, a reply larger
than ``max_reply_size``, and an array of more than ``max_array_length`` items raise `RemoteProtocolError`. After an exception from `receive_data`
the connection is of no more use: drop it, and call `connection_lost`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

import hiredis

from .._limits import Limits
from ..errors import (
    AuthenticationFailed,
    ConnectionFailed,
    ConnectionLost,
    NotSent,
    Refused,
    RemoteProtocolError,
    ServerUnreachable,
    TwistedCeleryError,
    VirtualHostNotFound,
)
from .arrays import Arrays, TooLong
from .pieces import pack_in_pieces
from .replies import MISPLACED_CREDENTIALS, NotMaster, NotNow, OutOfRoom, server_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = [
    "PING_INTERVAL",
    "SILENCE_TIMEOUT",
    "CommandConnection",
    "ConnectionConfig",
    "Done",
    "State",
]

#: Seconds, where the settings say nothing.
SILENCE_TIMEOUT = 30.0
#: Seconds, where the settings say nothing: kombu's own.
PING_INTERVAL = 25.0

#: Called once: with the replies, one for each command, or with the first error among them.
Done: TypeAlias = "Callable[[list[Any] | Exception], object]"

#: hiredis's answer for "nothing complete yet"; its default, False, is a value of RESP3.
_MORE = object()

#: A reply's own framing, and what one read of a transport brings beyond it.
_SLACK = 65_536 + 1_024


class State(Enum):
    """Where a connection stands; the picture is at the top of this module."""

    NEW = "new"
    GREETING = "greeting"
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionConfig:
    """What a connection needs to know."""

    #: The server, without password: for messages.
    url: str = ""
    #: The arguments of AUTH: ``()``, ``(password,)`` or ``(user, password)``.
    credentials: tuple[str, ...] = field(default=(), repr=False)
    db: int = 0
    client_name: str | None = None
    #: Whether a replica is refused, which a Sentinel may still take for the master.
    master_only: bool = False
    #: Bytes of the largest reply that is taken; Redis's own limit of a value (``proto-max-bulk-len``).
    max_reply_size: int = 536_870_912
    #: Items of the longest array that is taken.
    max_array_length: int = Limits.array
    #: Seconds without a byte from the server, while an answer is due, after which it is given up.
    #: Celery's ``redis_socket_timeout``, kombu's ``socket_timeout``.
    silence_timeout: float = SILENCE_TIMEOUT
    #: Seconds without traffic after which PING is sent; 0: never. Kombu's ``health_check_interval``.
    ping_interval: float = PING_INTERVAL
    #: TCP keepalive, and its options as ``setsockopt(IPPROTO_TCP, key, value)``.
    keepalive: bool = False
    keepalive_options: Mapping[int, int] = field(default_factory=dict)


class Connection:
    """What the two kinds of connection share: parsing, limits and the greeting."""

    __slots__ = (
        "_arrays", "_bug", "_credentials", "_drained", "_ending", "_greeting", "_handle", "_opened", "_partial", "_reader",
        "_retry_greeting", "_write", "config", "state",
    )  # fmt: skip

    def __init__(
        self,
        config: ConnectionConfig,
        *,
        write: Callable[[bytes | Iterator[bytes]], None],
        opened: Callable[[], None],
        ending: Callable[[], None],
        drained: Callable[[Exception], None],
        bug: Callable[[], None],
    ) -> None:
        self.config = config
        self.state = State.NEW
        self._write = write
        self._opened = opened
        #: Called when nothing more is taken, before anybody is told of it.
        self._ending = ending
        self._drained = drained
        #: Called inside an ``except`` clause when a callable that was handed in raised.
        self._bug = bug
        self._reader = hiredis.Reader(replyError=server_error, notEnoughData=_MORE)
        self._arrays = Arrays(self._reader, config.max_array_length)
        self._handle: Callable[[Any], None] = self._greeted
        self._greeting: deque[str] = deque()
        self._credentials = config.credentials
        self._retry_greeting = False
        #: Bytes received of a reply that is not complete.
        self._partial = 0

    @property
    def partial(self) -> int:
        """How many bytes have come of a reply that is not complete."""
        return self._partial

    @property
    def waiting(self) -> bool:
        """Whether the server owes an answer."""
        raise NotImplementedError

    def ping(self) -> None:
        """Ask for a sign of life; any bytes are one."""
        raise NotImplementedError

    def drain(self, reason: Exception) -> None:
        """Take nothing more; ``drained`` is called with ``reason`` once every answer has come."""
        raise NotImplementedError

    def connection_lost(self, reason: Exception) -> None:
        """Fail whatever has no answer, and forget it."""
        raise NotImplementedError

    def start(self) -> None:
        """Send the greeting."""
        self.state = State.GREETING
        config = self.config
        commands: list[tuple[Any, ...]] = []
        if self._credentials:
            commands.append(("AUTH", *self._credentials))
        if config.db:
            commands.append(("SELECT", config.db))
        if config.client_name:
            commands.append(("CLIENT", "SETNAME", config.client_name))
        if config.master_only:
            commands.append(("ROLE",))
        commands.append(("PING",))
        self._greeting.extend(command[0] for command in commands)
        self._write(pack(commands))

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the server; raises a `ConnectionFailed` where the connection has to be dropped."""
        reader, arrays = self._reader, self._arrays
        complete = False
        try:
            for piece in arrays.pieces(data):
                reader.feed(piece)
                while True:
                    try:
                        reply = reader.gets()
                    except (hiredis.ProtocolError, MemoryError, TypeError) as error:
                        # TypeError: a map with a key that cannot be one. MemoryError: more than there is room for.
                        raise self.garbage(str(error) or "array too large") from error
                    if reply is _MORE:
                        break
                    complete = True
                    self._handle(reply)
        except TooLong as error:
            raise self.garbage(str(error)) from error
        held = len(arrays.held)
        self._partial = reader.len() + held if complete else self._partial + len(data)
        if self._partial > self.config.max_reply_size + _SLACK:
            raise self.garbage(f"a reply of more than {self.config.max_reply_size} bytes")

    def garbage(self, what: str) -> RemoteProtocolError:
        """Make the error for bytes that the protocol forbids."""
        return RemoteProtocolError(f"Redis protocol error: {what}", url=self.config.url)

    def _greeted(self, reply: Any) -> None:
        """Take one answer to the greeting."""
        if self.state is not State.GREETING:
            return  # lost meanwhile
        command = self._greeting.popleft()
        if isinstance(reply, Exception) and not self._retry_greeting:
            self._refused_greeting(command, reply)
        elif (
            command == "ROLE"
            and not self._retry_greeting
            and not (type(reply) is list and reply[:1] == [b"master"])
        ):
            raise ServerUnreachable("this server is not the master", url=self.config.url)
        if self._greeting:
            return
        if self._retry_greeting:
            self._retry_greeting = False
            self._credentials = self._credentials[-1:]
            self.start()
            return
        self.state = State.OPEN
        self._handle = self._replied
        self._became_open()

    def _became_open(self) -> None:
        """Tell that commands are taken."""
        self._opened()

    def _refused_greeting(self, command: str, reply: Exception) -> None:
        """Find what an error among the answers to the greeting means."""
        text = getattr(reply, "message", "")
        if command == "AUTH" and text == MISPLACED_CREDENTIALS and len(self._credentials) > 1:
            self._retry_greeting = True
            return
        kind: type[ConnectionFailed]
        if command in ("PING", "ROLE") and isinstance(reply, OutOfRoom):
            return  # it takes no writes for now; what is stored there can be read
        if isinstance(reply, NotNow | ServerUnreachable):
            kind = ServerUnreachable
        elif isinstance(reply, AuthenticationFailed) or command == "AUTH":
            kind = AuthenticationFailed
        elif command == "SELECT":
            kind = VirtualHostNotFound
        elif text.startswith("NOPERM"):
            if command in ("PING", "ROLE"):
                return  # a user who may not ask is still logged in
            kind = AuthenticationFailed
        else:
            kind = RemoteProtocolError
        raise kind(f"{command}: {text}", url=self.config.url) from reply

    def _replied(self, reply: Any) -> None:
        """Take a reply or a push of the open connection."""
        raise NotImplementedError


class _Batch:
    """Several commands whose answers belong together."""

    __slots__ = ("count", "done", "replies", "transaction")

    def __init__(self, count: int, done: Done, transaction: bool) -> None:
        self.count = count
        self.done = done
        self.replies: list[Any] = []
        self.transaction = transaction

    def outcome(self) -> list[Any] | Exception:
        """Give the replies, or the first error among them.

        In a transaction a refused command shows first where it was queued, then in EXEC's answer
        (EXECABORT): the former is the cause.
        """
        replies = self.replies
        for reply in replies:
            if isinstance(reply, Exception):
                return reply
        if not self.transaction:
            return replies
        results = replies[-1]
        if not isinstance(results, list):
            return Refused("the transaction was not carried out")
        for reply in results:
            if isinstance(reply, Exception):
                return reply
        return results


class CommandConnection(Connection):
    """Commands out, replies in."""

    __slots__ = ("_drain_reason", "_pending")

    def __init__(self, config: ConnectionConfig, **hooks: Any) -> None:
        super().__init__(config, **hooks)
        #: A bare ``done`` stands for a single command, the usual case.
        self._pending: deque[Done | _Batch] = deque()
        self._drain_reason: Exception = ConnectionLost("closed")

    @property
    def waiting(self) -> bool:
        """Whether the server owes an answer."""
        return bool(self._pending)

    def send(
        self,
        commands: Sequence[tuple[Any, ...]],
        done: Done,
        *,
        transaction: bool = False,
        in_pieces: bool = False,
    ) -> None:
        """Send commands in one write; ``done`` is called once, with their replies or the first error.

        ``transaction``: between MULTI and EXEC, and the replies are EXEC's. Arguments are str, bytes,
        int or float, with ``in_pieces`` also `Pieces`. Errors: those of `replies`; `Refused` at once for other arguments, and for
        text that UTF-8 cannot hold; `NotSent` at once where the connection is not open; `ConnectionLost` where it ends before the answer.
        """
        encode: Any = pack_in_pieces if in_pieces else pack
        try:
            if transaction:
                data: bytes | Iterator[bytes] = encode([("MULTI",), *commands, ("EXEC",)])
                entry: Done | _Batch = _Batch(len(commands) + 2, done, transaction=True)
            elif len(commands) == 1:
                data = hiredis.pack_command(commands[0]) if not in_pieces else encode(commands)
                entry = done
            else:
                data = encode(commands)
                entry = _Batch(len(commands), done, transaction=False)
        except (TypeError, ValueError) as problem:
            self._finish(done, Refused(f"Redis cannot be told this: {problem}", url=self.config.url))
            return
        if self.state is not State.OPEN:
            self._finish(done, NotSent("the Redis connection is not open", url=self.config.url))
        elif data:
            self._pending.append(entry)
            self._write(data)
        else:
            self._finish(done, [])

    def ping(self) -> None:
        """Ask for a sign of life; any bytes are one."""
        self._pending.append(_ignore)
        self._write(b"*1\r\n$4\r\nPING\r\n")

    def drain(self, reason: Exception) -> None:
        """Take nothing more; ``drained`` is called with ``reason`` once every answer has come."""
        if self.state is not State.CLOSED:
            self._drain_because(reason)
            if not self._pending:
                self._drained(reason)

    def _drain_because(self, reason: Exception) -> None:
        self.state = State.DRAINING
        self._drain_reason = reason
        self._ending()

    def connection_lost(self, reason: Exception) -> None:
        """Fail whatever has no answer with ``reason``."""
        self.state = State.CLOSED
        self._ending()
        pending, self._pending = self._pending, deque()
        for entry in pending:
            self._finish(entry.done if isinstance(entry, _Batch) else entry, reason)

    def _replied(self, reply: Any) -> None:
        """Hand a reply to the command that is due."""
        pending = self._pending
        if not pending:
            if self.state is State.CLOSED:
                return  # a callable that was handed a reply of the same read has ended the connection
            if isinstance(reply, TwistedCeleryError):
                # An error that nobody asked for is the server's farewell.
                raise ConnectionLost(reply.message, url=self.config.url) from reply
            raise self.garbage("a reply that nobody asked for")
        entry = pending[0]
        if isinstance(entry, _Batch):
            entry.replies.append(reply)
            if len(entry.replies) < entry.count:
                return
            pending.popleft()
            self._finish(entry.done, entry.outcome())
        else:
            pending.popleft()
            if isinstance(reply, Exception):
                self._finish(entry, reply)
            else:
                try:
                    entry([reply])
                except Exception:  # noqa: BLE001  # whatever a callable raises: the connection goes on
                    self._bug()
        if self.state is State.DRAINING and not pending:
            self._drained(self._drain_reason)

    def _finish(self, done: Done, outcome: list[Any] | Exception) -> None:
        if isinstance(outcome, TwistedCeleryError):
            outcome.url = outcome.url or self.config.url
            if isinstance(outcome, NotMaster | AuthenticationFailed) and self.state is State.OPEN:
                # Nothing more will be taken here. What is under way still has its answers to come.
                self._drain_because(outcome)
        try:
            done(outcome)
        except Exception:  # noqa: BLE001  # whatever a callable raises: the connection goes on
            self._bug()


def pack(commands: Sequence[tuple[Any, ...]]) -> bytes:
    """Encode commands (RESP: arrays of bulk strings)."""
    return b"".join([hiredis.pack_command(command) for command in commands])


def _ignore(outcome: list[Any] | Exception) -> None:
    """Take the answer to PING: that it came is all there is to it."""
