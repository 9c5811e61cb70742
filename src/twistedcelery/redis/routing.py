"""Where a message goes in Redis, and what it looks like there: kombu's virtual exchanges, without I/O.

Redis has lists, sets and channels; kombu's Redis transport makes a broker of them, which every worker expects:

- a queue is a list, one for each priority step, pushed to on the left;
- a binding is a member of the set ``_kombu.binding.<exchange>``: routing key, pattern and queue between separators. Since kombu 5.7
  it stands in ``_kombu.binding_permanent.<exchange>`` too, or, where the queue expires, has a deadline in
  ``_kombu.binding_deadlines``: what has neither may be swept. Older workers take no notice, so both are always written;
- a fanout exchange is a channel, and nothing keeps what nobody listens to;
- exchanges themselves are nowhere: each client remembers their types from its own declarations.

How a routing key matches is asked of kombu's own exchange classes.
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from bisect import bisect
from typing import TYPE_CHECKING, Any

from kombu.transport.virtual.exchange import STANDARD_EXCHANGE_TYPES
from kombu.utils.json import JSONEncoder
from kombu.utils.uuid import uuid

from .._operations import BindQueue, DeclareExchange, DeclareQueue
from ..errors import Refused
from .pieces import Pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from .._operations import Declaration, Publish
    from .settings import Layout

    #: What Redis is asked to do: a command with its arguments.
    Command: TypeAlias = tuple[Any, ...]

__all__ = ["ANONYMOUS", "IN_PIECES", "Routing"]

#: The exchange type of the default exchange: the routing key is the queue.
ANONYMOUS = ""

#: Bytes of a body beyond which its envelope is made in pieces.
IN_PIECES = 128 * 1024

#: What kombu calls an exchange without a name that a queue is bound to.
_UNNAMED = "amq.direct"

#: kombu's bounds of a message's priority; what is outside is brought to the nearest.
_PRIORITIES = range(10)

#: kombu's lifetime of a binding that nobody refreshes: so many times the queue's expiry, and never less than an hour.
_EXPIRIES = 2
_LEAST_LIFETIME = 3_600_000

#: Adds member ARGV[1] to the set KEYS[1], and puts the deadline of ARGV[2] in KEYS[2] off to ARGV[3] milliseconds from now.
#: kombu does it with ZADD GT, which Redis has since 6.2.
_BIND_EXPIRING = """
redis.call('SADD', KEYS[1], ARGV[1])
local now = redis.call('TIME')
local due = now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[3]
local before = redis.call('ZSCORE', KEYS[2], ARGV[2])
if not before or tonumber(before) < due then redis.call('ZADD', KEYS[2], due, ARGV[2]) end
"""

#: As ``kombu.utils.json.dumps``, which makes an encoder for each message.
_encode: Callable[[object], str] = JSONEncoder().encode

#: They are used for their pure methods only, which ask nothing of a channel.
_TYPES: dict[str, Any] = {
    name: kind(None)  # type: ignore[no-untyped-call]  # kombu's
    for name, kind in STANDARD_EXCHANGE_TYPES.items()
}


class Routing:
    """What one connection knows of exchanges and queues, and the commands that follow from it.

    ``known_type`` gives the type of an exchange that was not declared here, or None. ``expiring`` tells whether
    workers of the kombu that is installed let a queue with ``x-expires`` expire.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        known_type: Callable[[str], str | None] = lambda exchange: None,
        expiring: bool = True,
    ) -> None:
        self.layout = layout
        self._known_type = known_type
        self._expiring = expiring
        self._exchanges: dict[str, DeclareExchange] = {}
        #: Queues that expire, with the milliseconds.
        self._expiries: dict[str, int] = {}
        steps = layout.priority_steps
        found = (steps[bisect(steps, priority) - 1] for priority in _PRIORITIES)
        self._suffixes = [f"{layout.sep}{step}" if step else "" for step in found]
        self._every_suffix = [f"{layout.sep}{step}" if step else "" for step in steps]

    # Declarations

    def declare(self, declarations: Sequence[Declaration]) -> list[Command]:
        """Give the commands that declare; raises `Refused` where kombu raises.

        Of EXISTS, an answer of 0 means that a passive declaration found no queue.
        """
        commands: list[Command] = []
        for declaration in declarations:
            if isinstance(declaration, DeclareExchange):
                self._declare_exchange(declaration)
            elif isinstance(declaration, DeclareQueue):
                if declaration.passive:
                    commands.append(("EXISTS", *self.keys_of(declaration.queue)))
                self._expire(declaration)
            elif isinstance(declaration, BindQueue):
                commands += self._bind(declaration)
            else:
                raise Refused("kombu's Redis transport cannot bind an exchange to an exchange", code=540)
        return commands

    def _declare_exchange(self, declaration: DeclareExchange) -> None:
        before = self._exchanges.get(declaration.exchange)
        if declaration.passive:
            if before is None:
                raise Refused(f"NOT_FOUND - no exchange {declaration.exchange!r}", code=404)
        elif declaration.type not in _TYPES:
            known = ", ".join(sorted(_TYPES))
            raise Refused(
                f"exchange {declaration.exchange!r}: Redis has no exchanges of type {declaration.type!r}, "
                f"only {known}",
                code=503,
            )
        elif before is None:
            self._exchanges[declaration.exchange] = declaration
        elif before.key != declaration.key:
            raise Refused(
                f"PRECONDITION_FAILED - exchange {declaration.exchange!r} was declared as {before}, "
                f"which is not equivalent to {declaration}",
                code=406,
            )

    def _expire(self, declaration: DeclareQueue) -> None:
        try:
            expiry = int((declaration.arguments or {})["x-expires"])
        except (KeyError, TypeError, ValueError):
            # kombu leaves out what is no number.
            self._expiries.pop(declaration.queue, None)
        else:
            if self._expiring:
                self._expiries[declaration.queue] = expiry

    def bindings(self, declarations: Sequence[Declaration]) -> dict[str, list[bytes]]:
        """Give what `table` has to answer for each exchange once these have been declared."""
        found: dict[str, list[bytes]] = {}
        for declaration in declarations:
            if isinstance(declaration, BindQueue):
                exchange, member = self._binding(declaration)
                found.setdefault(exchange, []).append(member.encode())
        return found

    def _binding(self, declaration: BindQueue) -> tuple[str, str]:
        """Give the exchange of a binding, and the member of its set that it is."""
        queue, exchange = declaration.queue, declaration.exchange or _UNNAMED
        routing_key, pattern, _ = _TYPES[self.type_of(exchange)].prepare_bind(
            queue, exchange, declaration.routing_key, declaration.arguments
        )
        return exchange, self.layout.sep.join([routing_key or "", pattern or "", queue])

    def _bind(self, declaration: BindQueue) -> list[Command]:
        queue = declaration.queue
        exchange, member = self._binding(declaration)
        prefix = self.layout.global_keyprefix
        table = f"{prefix}_kombu.binding.{exchange}"
        expiry = self._expiries.get(queue)
        if expiry is None:
            return [("SADD", table, member), ("SADD", f"{prefix}_kombu.binding_permanent.{exchange}", member)]
        lifetime = max(expiry * _EXPIRIES, _LEAST_LIFETIME)
        deadlines = f"{prefix}_kombu.binding_deadlines"
        return [("EVAL", _BIND_EXPIRING, 2, table, deadlines, member, exchange, lifetime)]

    # Where messages go

    def type_of(self, exchange: str) -> str:
        """Give the type of an exchange; what nobody knows is direct, as in kombu."""
        if not exchange:
            return ANONYMOUS
        declared = self._exchanges.get(exchange)
        if declared is not None:
            return declared.type
        known = self._known_type(exchange)
        return known if known in _TYPES else "direct"

    def table(self, exchange: str) -> Command:
        """Give the command that reads the bindings of an exchange."""
        return ("SMEMBERS", f"{self.layout.global_keyprefix}_kombu.binding.{exchange}")

    def lookup(self, exchange: str, routing_key: str, members: Sequence[bytes]) -> list[str]:
        """Find the queues that a message goes to; ``members`` is what `table` has answered.

        Raises ValueError where that cannot be read.
        """
        kind, default = self.type_of(exchange), self.layout.deadletter_queue
        bindings = [tuple(member.decode().split(self.layout.sep)) for member in members]
        try:
            found = _TYPES[kind].lookup(bindings, exchange, routing_key, default)
        except re.error as error:
            raise ValueError(f"a pattern: {error}") from error
        if kind == "topic":
            found = {queue for queue in found if queue and queue != default}
        elif not found and default is not None:
            found = {default}
        return sorted(found)

    def channels(self, exchange: str, routing_key: str) -> list[str]:
        """Give the channels of a message to a fanout exchange."""
        layout = self.layout
        end = f"{exchange}/{routing_key}" if routing_key and layout.fanout_patterns else exchange
        prefixes = [layout.fanout_prefix]
        if layout.legacy_fanout_prefix is not None:
            prefixes.append(layout.legacy_fanout_prefix)
        return [f"{layout.global_keyprefix}{prefix}{end}" for prefix in prefixes]

    def key_of(self, queue: str, priority: object = 0) -> str:
        """Give the list that holds the messages of a queue with this priority."""
        try:
            number = int(priority)  # type: ignore[call-overload]  # whatever it is, as kombu tries it
        except (TypeError, ValueError):
            number = 0
        return f"{self.layout.global_keyprefix}{queue}{self._suffixes[min(max(number, 0), 9)]}"

    def keys_of(self, queue: str) -> list[str]:
        """Give every list of a queue."""
        return [f"{self.layout.global_keyprefix}{queue}{suffix}" for suffix in self._every_suffix]

    def push(self, message: Publish, queues: Sequence[str]) -> list[Command]:
        """Give the commands that put a message into queues; the first ones put it, the others keep the queue alive.

        Raises TypeError or ValueError where JSON cannot hold the message.
        """
        envelope = self.envelope(message)
        priority = message.properties.get("priority")
        commands: list[Command] = [("LPUSH", self.key_of(queue, priority), envelope) for queue in queues]
        if self._expiries:
            for queue in queues:
                if queue in self._expiries:
                    expiry = self._expiries[queue]
                    commands += [("PEXPIRE", key, expiry) for key in self.keys_of(queue)]
        return commands

    # The message

    def envelope(self, message: Publish) -> bytes | Pieces:
        """Make the JSON that kombu's virtual transports carry (``virtual.Channel.prepare_message``, ``basic_publish``).

        Each sending has a delivery tag of its own: a worker keeps unacknowledged messages by it.
        """
        properties = dict(message.properties)
        content_type = properties.pop("content_type", None)
        content_encoding = properties.pop("content_encoding", None)
        priority = properties.pop("priority", None)
        info = properties.get("delivery_info")
        properties["delivery_info"] = {
            **(info or {}), "exchange": message.exchange, "routing_key": message.routing_key
        }  # fmt: skip
        properties["priority"] = priority or 0
        encoding = self.layout.body_encoding
        properties["body_encoding"] = encoding
        properties["delivery_tag"] = uuid()
        rest = {
            "content-encoding": content_encoding,
            "content-type": content_type,
            "headers": message.headers,
            "properties": properties,
        }
        tail = _encode(rest).encode()[1:]
        if encoding != "base64":
            return b'{"body": %b, %b' % (_encode(_text(message.body, content_encoding)).encode(), tail)
        # Needs no escaping: JSON need not look at it.
        if len(message.body) > IN_PIECES:
            return Pieces(b'{"body": "', message.body, b'", ' + tail)
        return b'{"body": "%b", %b' % (b2a_base64(message.body, newline=False), tail)


def _text(body: bytes, content_encoding: str | None) -> str | bytes:
    """Give a body as the serializer gave it: capture makes bytes of text."""
    if content_encoding in ("utf-8", "us-ascii"):
        try:
            return body.decode()
        except UnicodeDecodeError:
            # Compressed.
            return body
    return body
