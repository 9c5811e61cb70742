"""Redis, laid out as kombu's Redis transport lays it out, as a broker.

A message is confirmed by the answer to the command that puts it into its queue. Commands of one connection are carried out in
their order, so messages leave without waiting for one another; except that the bindings of an exchange have to be read before
a message to it can be put anywhere, as kombu reads them for each message: what is published meanwhile waits in line behind it.
Where a binding is not there that this connection has declared for the message (FLUSHDB, eviction), it is declared again first.

What the server says about itself passes by (LOADING, OOM, READONLY): the message goes back as `NotSent`, the
listener hears that this server is of no use now, and after a moment work is taken again, here or at the new master.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from .._keeper import Keeper
from .._outcomes import Outcomes
from ..errors import ConnectionLost, NotSent, Refused, Unroutable
from .outcomes import outcome_of, passing
from .routing import ANONYMOUS, IN_PIECES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from twisted.internet.defer import Deferred
    from twisted.internet.interfaces import IDelayedCall, IReactorTime

    from .._keeper import Attempt
    from .._operations import Entity, Publish
    from ..errors import ConnectionFailed
    from ..interfaces import BrokerListener, Done
    from .protocol import CommandProtocol
    from .routing import Command, Routing

__all__ = ["RedisBroker"]

#: Seconds until work is taken again from a server that cannot do it now.
_REST = 0.1

#: Entities remembered as declared; declaring again does no harm.
_ENTITIES = 10_000


class RedisBroker:
    """See `twistedcelery.interfaces.Broker`. ``routing`` makes the routing for a database number."""

    def __init__(
        self,
        clock: IReactorTime,
        attempts: Iterator[Attempt[CommandProtocol]],
        round_size: int,
        connect_timeout: float | None,
        retry_policy: Callable[[int], float],
        siblings: list[Keeper[Any]] | None = None,
        *,
        routing: Callable[[int], Routing],
    ) -> None:
        self._clock = clock
        self._keeper: Keeper[CommandProtocol] = Keeper(
            clock=clock,
            attempts=attempts,
            round_size=round_size,
            connect_timeout=connect_timeout,
            retry_policy=retry_policy,
            on_connected=self._connected,
            on_disconnected=self._disconnected,
            on_round_failed=self._round_failed,
            name="publishing",
            siblings=siblings,
        )
        self._outcomes = Outcomes(clock, self._changed)
        self._make_routing = routing
        self._connection: CommandProtocol | None = None
        self._routing: Routing | None = None
        self._entities: set[Entity] = set()
        self._entity_keys: set[object] = set()
        #: The bindings that entities stand for, by exchange.
        self._bindings: dict[Entity, dict[str, list[bytes]]] = {}
        #: Messages in the order of `publish`, from the first one on whose way is not known yet.
        self._line: deque[_InLine] = deque()
        self._rest: IDelayedCall | None = None
        self._stopped = False
        self.ready = False

    @property
    def url(self) -> str:
        """The server in use or tried last."""
        return self._keeper.url or ""

    @property
    def connected(self) -> bool:
        """Whether there is an open connection."""
        return self._connection is not None

    def listen(self, listener: BrokerListener) -> None:
        """Say whom to tell."""
        self._listener = self._outcomes.listener = listener

    def connect(self) -> None:
        """Begin, or go on, trying to connect."""
        self._stopped = False
        self._keeper.start()

    def stop(self, timeout: float) -> Deferred[None]:
        """Close."""
        self._stopped = True
        self.ready = False
        self._cancel_rest()
        return self._keeper.stop(timeout).addCallback(lambda _: self._outcomes.when_told())

    # The connection

    def _connected(self, connection: CommandProtocol) -> None:
        self._connection = connection
        self._routing = self._make_routing(connection.config.db)
        connection.on_writable = self._changed
        connection.on_ending = self._ending
        self._changed()

    def _ending(self) -> None:
        """Take no work: whoever is told how a message ended may send the next."""
        self.ready = False

    def _disconnected(self, reason: Exception) -> None:
        self._connection = self._routing = None
        self._forget()
        self.ready = False
        # Whoever stands in line has its answer by now, but for one whose answer was no answer.
        line, self._line = self._line, deque()
        lost = NotSent("the connection was lost before the message left", url=self.url)
        self._outcomes.tell([(place.message, place.error or lost) for place in line])

    def _round_failed(self, reason: ConnectionFailed) -> None:
        self._listener.broker_unavailable(reason)

    def _forget(self) -> None:
        """What a connection has declared goes with it: it may have been another server."""
        self._entities.clear()
        self._entity_keys.clear()
        self._bindings.clear()

    def _changed(self) -> None:
        connection = self._connection
        ready = (
            connection is not None
            and connection.writable
            and self._rest is None
            and not self._stopped
            and not self._outcomes.untold
        )
        was, self.ready = self.ready, ready
        if ready and not was:
            self._listener.broker_ready()

    def _pause(self, reason: Exception) -> None:
        """Take no work for a moment, and say why."""
        self.ready = False
        if self._rest is None and not self._stopped:
            # Later: the commands behind this one have the same answer.
            self._rest = self._clock.callLater(0, self._say_why, reason)

    def _say_why(self, reason: Any) -> None:
        self._rest = self._clock.callLater(_REST, self._go_on)
        self._listener.broker_unavailable(reason)

    def _go_on(self) -> None:
        self._rest = None
        self._changed()

    def _cancel_rest(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None

    def _failure(self, error: Exception) -> Exception:
        """Take note of a command's error, and give what its sender is told."""
        outcome = outcome_of(error)
        if passing(error):
            self._pause(outcome)
        elif isinstance(outcome, NotSent):
            # The connection is closing; the next one is on its way.
            self.ready = False
        return outcome

    # Declaring

    def prepare(self, message: Publish, done: Done) -> bool:
        """Declare what the message needs."""
        entities = self._entities
        missing = [
            entity for entity in message.entities if not (entity.cacheable and entity in entities)
        ]  # fmt: skip
        return not missing or self._declare(missing, done)

    def _declare(self, missing: list[Entity], done: Done) -> bool:
        routing, connection = self._routing, self._connection
        assert routing is not None
        assert connection is not None
        commands: list[Command] = []
        known = True
        try:
            for entity in missing:
                declared = entity.key in self._entity_keys
                if not (declared and entity.cacheable):
                    known = known and declared
                    commands += routing.declare(entity.declarations)
        except Refused as error:
            error.url = self.url
            done(error)
            return False
        if known or not commands:
            # What may vanish by itself is declared for each message. It was taken before: its answer need not be waited
            # for, and the message that follows has the same if anything is wrong.
            self._remember(missing)
            if commands:
                connection.send(commands, _ignore)
            return True
        connection.send(commands, partial(self._declared, missing, commands, done), transaction=True)
        return False

    def _declared(
        self, entities: list[Entity], commands: list[Command], done: Done, outcome: list[Any] | Exception
    ) -> None:
        error = self._not_declared(commands, outcome)
        if error is None:
            self._remember(entities)
        done(error)

    def _not_declared(self, commands: list[Command], outcome: list[Any] | Exception) -> Exception | None:
        """Tell why a transaction has not declared what it should, or None."""
        if isinstance(outcome, Exception):
            return self._failure(outcome)
        if len(outcome) != len(commands):
            return self._misfit("to a transaction, another number of answers than commands")
        for command, reply in zip(commands, outcome, strict=True):
            if command[0] == "EXISTS" and not reply:
                return Refused(f"NOT_FOUND - no queue {command[1]!r}", code=404, url=self.url)
        return None

    def _remember(self, entities: Iterable[Entity]) -> None:
        if len(self._entities) > _ENTITIES:
            self._forget()
        self._entities.update(entities)
        self._entity_keys.update(entity.key for entity in entities)

    # Publishing

    def publish(self, message: Publish) -> None:
        """Send a prepared message."""
        routing, connection = self._routing, self._connection
        assert routing is not None
        assert connection is not None
        kind = routing.type_of(message.exchange)
        if kind == "fanout":
            self._broadcast(message)
        elif kind != ANONYMOUS:
            place = _InLine(message)
            self._line.append(place)
            connection.send((routing.table(message.exchange),), partial(self._found, place))
        elif self._line:
            self._line.append(_InLine(message, (message.routing_key,)))
        else:
            self._put(message, (message.routing_key,))
        if not connection.writable:
            # The transport has enough for now; `_changed` is called when it has room again.
            self.ready = False

    def _put(self, message: Publish, queues: Iterable[str]) -> None:
        """Put a message into queues, all or none."""
        assert self._routing is not None
        try:
            commands = self._routing.push(message, tuple(queues))
        except Exception as error:  # noqa: BLE001  # whatever JSON makes of headers, or an encoder of the user's
            self._unsendable(message, error)
            return
        self._send(message, commands, partial(self._outcome, message))

    def _broadcast(self, message: Publish) -> None:
        assert self._routing is not None
        try:
            envelope = self._routing.envelope(message)
        except Exception as error:  # noqa: BLE001  # whatever JSON makes of headers, or an encoder of the user's
            self._unsendable(message, error)
            return
        channels = self._routing.channels(message.exchange, message.routing_key)
        self._send(
            message,
            [("PUBLISH", channel, envelope) for channel in channels],
            partial(self._heard, message) if message.mandatory else partial(self._outcome, message),
        )

    def _send(
        self, message: Publish, commands: list[Command], done: Callable[[list[Any] | Exception], object]
    ) -> None:
        connection = self._connection
        if connection is None:
            self._listener.published(message, NotSent("the connection was lost", url=self.url))
            return
        connection.send(
            commands, done, transaction=len(commands) > 1, in_pieces=len(message.body) > IN_PIECES
        )

    def _unsendable(self, message: Publish, error: Exception) -> None:
        """What JSON cannot hold, headers for example: nothing of it was sent."""
        self._listener.published(message, Refused(f"it cannot be encoded: {error!r}", url=self.url))

    def _outcome(self, message: Publish, outcome: list[Any] | Exception) -> None:
        if not isinstance(outcome, Exception):
            if all(isinstance(reply, int) for reply in outcome):
                self._listener.published(message, None)
                return
            outcome = self._misfit("to LPUSH or PUBLISH, something else than a number")
        error = self._failure(outcome)
        if isinstance(error, ConnectionLost):
            # One of all those that were on their way.
            self._outcomes.tell_later(message, error)
        else:
            self._listener.published(message, error)

    def _misfit(self, what: str) -> ConnectionLost:
        """The server has answered what no Redis answers: it is none, and nothing is known of what it was asked."""
        self.ready = False
        if self._connection is None:
            return ConnectionLost(what, url=self.url)
        return self._connection.misfit(what)

    def _heard(self, message: Publish, outcome: list[Any] | Exception) -> None:
        """Take the answer to a broadcast that somebody has to hear: how many have."""
        if isinstance(outcome, list) and not any(outcome):
            self._listener.published(message, self._unroutable(message))
        else:
            self._outcome(message, outcome)

    # Finding a way

    def _found(self, place: _InLine, outcome: list[Any] | Exception) -> None:
        """Take the bindings for a message in line."""
        if isinstance(outcome, Exception):
            place.fail(self._failure(outcome), self.url)
        elif not (isinstance(outcome[0], list) and all(isinstance(one, bytes) for one in outcome[0])):
            place.fail(self._misfit("to SMEMBERS, something else than a set"), self.url)
        else:
            lost = self._lost(place.message, outcome[0])
            if lost and not place.declared_again:
                self._declare_again(place, lost)
            else:
                self._look_up(place, outcome[0])
        self._move_up()

    def _lost(self, message: Publish, members: list[bytes]) -> list[Entity]:
        """List what was declared for a message, and is not there any more."""
        routing = self._routing
        assert routing is not None
        lost = []
        for entity in message.entities:
            bindings = self._bindings.get(entity)
            if bindings is None:
                bindings = self._bindings[entity] = routing.bindings(entity.declarations)
            if not all(member in members for member in bindings.get(message.exchange, ())):
                lost.append(entity)
        return lost

    def _declare_again(self, place: _InLine, lost: list[Entity]) -> None:
        """Declare what has vanished under the connection, and read the bindings once more. Once for each message."""
        routing, connection = self._routing, self._connection
        assert routing is not None
        assert connection is not None
        place.declared_again = True
        commands = [command for entity in lost for command in routing.declare(entity.declarations)]
        commands.append(routing.table(place.message.exchange))
        connection.send(commands, partial(self._found_again, place, commands), transaction=True)

    def _found_again(self, place: _InLine, commands: list[Command], outcome: list[Any] | Exception) -> None:
        error = self._not_declared(commands, outcome)
        if error is None:
            assert isinstance(outcome, list)
            self._found(place, outcome[-1:])
        else:
            place.fail(error, self.url)
            self._move_up()

    def _move_up(self) -> None:
        """Send those at the head of the line on their way, or tell why they have none."""
        line = self._line
        while line and (line[0].error is not None or line[0].queues is not None):
            first = line.popleft()
            if first.error is not None:
                self._listener.published(first.message, first.error)
            elif first.queues:
                self._put(first.message, first.queues)
            else:
                mandatory = first.message.mandatory
                unwanted = first.message.task_id is not None if mandatory is None else mandatory
                self._listener.published(first.message, self._unroutable(first.message) if unwanted else None)

    def _look_up(self, place: _InLine, members: list[bytes]) -> None:
        message = place.message
        assert self._routing is not None
        try:
            place.queues = self._routing.lookup(message.exchange, message.routing_key, members)
        except Exception as error:  # noqa: BLE001  # kombu's code, with whatever stands there and whatever the caller gave
            place.error = Refused(
                f"no way can be found to exchange {message.exchange!r} with routing key {message.routing_key!r}: {error!r}",
                url=self.url,
            )

    def _unroutable(self, message: Publish) -> Unroutable:
        return Unroutable(
            f"no queue is bound to exchange {message.exchange!r} that takes the routing key {message.routing_key!r}",
            exchange=message.exchange,
            routing_key=message.routing_key,
            url=self.url,
        )


class _InLine:
    """A message whose turn has not come."""

    __slots__ = ("declared_again", "error", "message", "queues")

    def __init__(self, message: Publish, queues: Iterable[str] | None = None) -> None:
        self.message = message
        #: Where it goes; None: not known yet.
        self.queues = queues
        self.error: Exception | None = None
        #: Whether what it needs had vanished.
        self.declared_again = False

    def fail(self, error: Exception, url: str) -> None:
        """Take down why there is no way for it. Of the message itself no byte has left."""
        self.error = NotSent(str(error), url=url) if isinstance(error, ConnectionLost) else error


def _ignore(outcome: list[Any] | Exception) -> None:
    """Take an answer that nobody waits for."""
