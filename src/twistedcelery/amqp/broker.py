"""RabbitMQ, and whatever else speaks AMQP 0-9-1, as a broker.

One connection that publishes and never consumes: under a memory alarm RabbitMQ stops reading from such a
connection, and results must go on arriving. On it, three kinds of channels:

- *control*: declarations. An error there closes only it, and it is opened again.
- *publish*: task messages, with confirms. An error of one message takes down every message on the channel, so
  it carries only messages to exchanges that this connection has declared or found to exist, of an ordinary size and kind.
- *apart* (`apart.Apart`): for messages that may be refused, one at a time on each channel.

If the publish channel is closed all the same, everything on it that has no confirm is lost, and leaves again. Where the server
names an exchange (or a topic) that only one of these messages goes to, that one is refused; where several do, or none is
named, nobody can say which it was: then these go apart, so that the guilty one is found.

If the whole connection is closed because of a message (501, 541), a `trial.Trial` finds out which it was.

Where a queue or an exchange is gone that this connection has declared (somebody has deleted it), the message that finds out
has not arrived anywhere: what it needs is declared again, and it leaves once more.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import fail

from .._keeper import Keeper
from .._operations import BindExchange, BindQueue, DeclareExchange, DeclareQueue
from .._outcomes import Outcomes
from ..errors import ConnectionLost, LocalProtocolError, NotSent, Refused, Unroutable
from .apart import Apart
from .trial import Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from twisted.internet.defer import Deferred
    from twisted.internet.interfaces import IReactorTime
    from twisted.python.failure import Failure

    from .._keeper import Attempt
    from .._operations import Declaration, Entity, Publish
    from .._outcomes import Outcome
    from ..errors import ConnectionFailed
    from ..interfaces import BrokerListener, Done
    from .protocol import AMQPProtocol, Channel

__all__ = ["AMQPBroker"]

#: Bytes of a body beyond which a message goes apart. RabbitMQ 4 refuses 16 MiB, and operators may set less.
_HUGE = 1024 * 1024

#: How RabbitMQ names the exchange, and the topic, that a message was refused for (404 and 403).
_NAMED = re.compile(r"(?:topic '(?P<topic>.*?)' in )?exchange '(?P<exchange>.*?)' in vhost")

#: What RabbitMQ calls the exchange without a name.
_UNNAMED = "amq.default"

#: AMQP's reply code for an exchange, or a queue, that there is not.
_NOT_FOUND = 404

#: Where RabbitMQ answers a request by itself; whoever has not asked for the answer there loses the channel.
_DIRECT_REPLY = "amq.rabbitmq.reply-to"

#: Entities remembered as declared; declaring again does no harm.
_ENTITIES = 10_000

#: Exchange types that promise a queue for each message; a fanout without listeners is no error.
_ROUTING = frozenset({"direct", "topic", "headers"})

#: Exchanges that are there before anybody declares them (AMQP 0-9-1, 3.1.3).
_PREDECLARED = {
    "": "direct",
    "amq.direct": "direct",
    "amq.fanout": "fanout",
    "amq.topic": "topic",
    "amq.headers": "headers",
    "amq.match": "headers",
}


class AMQPBroker:
    """See `twistedcelery.interfaces.Broker`."""

    def __init__(
        self,
        clock: IReactorTime,
        attempts: Iterator[Attempt[AMQPProtocol]],
        round_size: int,
        connect_timeout: float | None,
        retry_policy: Callable[[int], float],
        siblings: list[Keeper[Any]] | None = None,
    ) -> None:
        self._keeper: Keeper[AMQPProtocol] = Keeper(
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
        self._connection: AMQPProtocol | None = None
        self._control: Channel | None = None
        self._publish: Channel | None = None
        self._outcomes = Outcomes(clock, self._changed)
        self._apart = Apart(self._told_apart)
        self._trial = Trial(clock, self._on_their_way, self._changed)
        #: The message that was prepared last, if it is a suspect one.
        self._to_go_apart: Publish | None = None
        #: Whether the control channel, or the publish channel, is being opened.
        self._opens_control = self._opens_publish = False
        self._round_size = round_size
        #: Connections in a row that ended before they could be used.
        self._useless = 0
        self._forget()
        self.ready = False

    def _forget(self) -> None:
        """What a connection knows goes with it."""
        #: Entities that were declared, and their keys: an object that was seen before is found more quickly.
        self._entities: set[Entity] = set()
        self._entity_keys: set[object] = set()
        #: Exchanges that exist, by name, with their type where it is known.
        self._exchanges: dict[str, str | None] = dict(_PREDECLARED)

    @property
    def url(self) -> str:
        """The server in use or tried last."""
        return self._keeper.url or ""

    @property
    def connected(self) -> bool:
        """Whether there is an open connection."""
        return self._connection is not None

    @property
    def connection(self) -> AMQPProtocol | None:
        """The publishing connection, for whoever has to know which server it is."""
        return self._connection

    def listen(self, listener: BrokerListener) -> None:
        """Say whom to tell."""
        self._listener = self._outcomes.listener = listener

    def connect(self) -> None:
        """Begin, or go on, trying to connect."""
        self._keeper.start()

    def stop(self, timeout: float) -> Deferred[None]:
        """Close."""
        return self._keeper.stop(timeout).addCallback(lambda _: self._outcomes.when_told())

    # The connection

    def _connected(self, connection: AMQPProtocol) -> None:
        self._connection = connection
        connection.on_writable = self._changed
        connection.on_blocked = lambda reason: self._changed()
        connection.on_ending = self._ending
        self._open_channels()

    def _ending(self) -> None:
        """Take no work: whoever is told how a message ended may send the next."""
        self.ready = False
        if self._connection is not None and self._connection.closed_for_message:
            self._trial.closing()

    def _on_their_way(self) -> int:
        """Count the messages that have no outcome yet."""
        return self._apart.outstanding + (0 if self._publish is None else self._publish.outstanding)

    def _disconnected(self, reason: Exception) -> None:
        self._connection = self._control = self._publish = None
        self._opens_control = self._opens_publish = False
        self._forget()
        self.ready = False
        self._apart.end(reason)
        self._trial.end(reason)
        self._useless += 1
        if self._useless > self._round_size:
            # Not once, as anything is lost at times: servers that take connections and refuse channels, for example.
            self._useless = 0
            self._listener.broker_unavailable(reason)

    def _round_failed(self, reason: ConnectionFailed) -> None:
        self._useless = 0
        self._listener.broker_unavailable(reason)

    def _open_channels(self) -> None:
        """Open whichever of the two standing channels is missing, and not on its way."""
        connection = self._connection
        assert connection is not None
        if self._control is None and not self._opens_control:
            self._opens_control = True
            connection.open_channel().addCallbacks(self._control_opened, self._not_opened)
        if self._publish is None and not self._opens_publish:
            self._opens_publish = True
            connection.open_channel(confirm=True).addCallbacks(self._publish_opened, self._not_opened)

    def _control_opened(self, channel: Channel) -> None:
        if channel.connection is self._connection:
            self._opens_control = False
            self._control = channel
            channel.on_closed = self._control_closed
            self._changed()

    def _publish_opened(self, channel: Channel) -> None:
        if channel.connection is self._connection:
            self._opens_publish = False
            self._publish = channel
            channel.on_outcomes = self._told
            channel.on_closed = self._publish_closed
            self._changed()

    def _not_opened(self, failure: Failure) -> None:
        # Either the connection is lost, or the server allows no channel more: then nothing can be done with it.
        if self._connection is not None and not isinstance(failure.value, ConnectionLost):
            self._keeper.drop(ConnectionLost(f"a channel could not be opened: {failure.value}", url=self.url))

    def _control_closed(self, reason: Exception) -> None:
        self._control = None
        self.ready = False
        if isinstance(reason, Refused) and self._connection is not None:
            self._open_channels()

    def _publish_closed(self, reason: Exception) -> None:
        self._publish = None
        self.ready = False
        if isinstance(reason, Refused) and self._connection is not None:
            # An exchange has vanished that was there before: ask anew what exists.
            self._forget()
            self._open_channels()

    def _changed(self) -> None:
        if self._control is not None and self._publish is not None:
            # Not counted when it ends.
            self._useless = -1
        was, self.ready = self.ready, self._takes_work()
        if self.ready and not was:
            self._listener.broker_ready()

    def _takes_work(self) -> bool:
        connection, control, publish = self._connection, self._control, self._publish
        return (
            connection is not None
            and control is not None
            and publish is not None
            # They are not when the connection is about to end.
            and (control.is_open and publish.is_open)
            and connection.writable
            and connection.blocked is None
            and not self._outcomes.untold
            and not self._trial.is_held
        )

    # Declaring

    def prepare(self, message: Publish, done: Done) -> bool:
        """Declare what the message needs."""
        missing = self._missing(message)
        suspect = self._is_suspect(message)
        self._to_go_apart = message if suspect else None
        if message.accused:
            done = partial(self._trial.wait, done)
        elif not missing and not (suspect and not self._apart.is_free):
            return True
        _Declaring(self, missing, done, apart=suspect).go_on()
        return False

    def _is_suspect(self, message: Publish) -> bool:
        """Whether the broker may refuse the message by closing its channel."""
        properties, headers = message.properties, message.headers
        if len(message.body) > _HUGE or "user_id" in properties or "CC" in headers or "BCC" in headers:
            return True
        if "expiration" in properties:
            expiration = str(properties["expiration"])
            return not expiration.isdecimal() or len(expiration) > 9
        if properties.get("delivery_mode", 2) not in (1, 2):
            return True
        return message.suspect or str(properties.get("reply_to", "")).startswith(_DIRECT_REPLY)

    def take_apart(self, done: Done) -> None:
        """Get a channel ready for a suspect message."""
        if self._connection is None:
            done(ConnectionLost("the connection ended before the message left", url=self.url))
        else:
            self._apart.prepare(self._connection, done)

    def _missing(self, message: Publish) -> list[tuple[Entity | None, Declaration]]:
        missing: list[tuple[Entity | None, Declaration]] = []
        created: set[str] = set()
        for entity in message.entities:
            if entity in self._entities and entity.cacheable:
                continue
            if entity.cacheable and entity.key in self._entity_keys:
                self._remember(entity)
                continue
            for declaration in entity.declarations:
                if isinstance(declaration, DeclareExchange):
                    if declaration.exchange in _PREDECLARED:
                        continue
                    created.add(declaration.exchange)
                missing.append((entity, declaration))
        exchange = message.exchange
        if exchange not in self._exchanges and exchange not in created:
            missing.append((None, DeclareExchange(exchange, passive=True)))
        return missing

    def perform(self, declaration: Declaration) -> Deferred[Any]:
        """Carry out one declaration on the control channel."""
        channel = self._control
        if channel is None:
            return fail(ConnectionLost("the connection ended before the declaration", url=self.url))
        if isinstance(declaration, DeclareExchange):
            return channel.declare_exchange(
                declaration.exchange,
                declaration.type,
                passive=declaration.passive,
                durable=declaration.durable,
                auto_delete=declaration.auto_delete,
                internal=False,
                arguments=declaration.arguments,
            )
        if isinstance(declaration, DeclareQueue):
            return channel.declare_queue(
                declaration.queue,
                passive=declaration.passive,
                durable=declaration.durable,
                exclusive=declaration.exclusive,
                auto_delete=declaration.auto_delete,
                arguments=declaration.arguments,
            )
        if isinstance(declaration, BindQueue):
            return channel.bind_queue(
                declaration.queue,
                declaration.exchange,
                declaration.routing_key,
                arguments=declaration.arguments,
            )
        assert isinstance(declaration, BindExchange)
        return channel.bind_exchange(
            declaration.destination,
            declaration.source,
            declaration.routing_key,
            arguments=declaration.arguments,
        )

    def declared(self, entity: Entity | None, declaration: Declaration) -> None:
        """Remember what the present connection has declared."""
        if isinstance(declaration, DeclareExchange):
            if len(self._exchanges) >= _ENTITIES:
                self._exchanges = dict(_PREDECLARED)
            self._exchanges[declaration.exchange] = None if declaration.passive else declaration.type
        if entity is not None and entity.cacheable and declaration is entity.declarations[-1]:
            self._remember(entity)

    def _remember(self, entity: Entity) -> None:
        if len(self._entities) >= _ENTITIES:
            self._entities.clear()
            self._entity_keys.clear()
        self._entities.add(entity)
        self._entity_keys.add(entity.key)

    # Publishing

    def publish(self, message: Publish) -> None:
        """Send a prepared message."""
        mandatory = message.mandatory
        if mandatory is None:
            mandatory = message.task_id is not None and self._exchanges.get(message.exchange) in _ROUTING
        channel = self._publish if message is not self._to_go_apart else self._apart.take(message)
        connection = self._connection
        try:
            if channel is None or connection is None or not channel.is_open:
                # The connection is ending, or the server has closed this channel, which was free: that is told in a moment.
                self.ready = self._takes_work()
                raise NotSent("the connection ended before the message left", url=self.url)
            if message.immediate and connection.server_properties.get("product") == "RabbitMQ":
                raise Refused(
                    "RabbitMQ does not know immediate=True; it would close the connection", code=540
                )
            channel.publish(
                message.exchange,
                message.routing_key,
                message.properties,
                message.headers,
                message.body,
                mandatory=mandatory,
                immediate=message.immediate,
                token=message,
            )
        except (LocalProtocolError, NotSent, Refused) as error:
            # What AMQP cannot encode, for example: nothing of it was written.
            self._apart.give_back(message)
            error.url = self.url
            self._listener.published(message, error)
        except Exception as problem:  # noqa: BLE001  # a body that is none, or whatever a class of the user's raises: not written either
            self._apart.give_back(message)
            refusal = Refused(f"the message cannot be encoded: {problem!r}", url=self.url)
            refusal.__cause__ = problem
            self._listener.published(message, refusal)
        else:
            if message.accused:
                self._trial.left(message)
                self.ready = False
            if not connection.writable:
                self.ready = False

    def _told(self, outcomes: Sequence[Outcome]) -> None:
        error = outcomes[0][1] if outcomes else None
        if isinstance(error, Refused) and error.code:
            outcomes = self._whose_fault([message for message, _ in outcomes], error)
        self._tell(outcomes)

    def _tell(self, outcomes: Sequence[Outcome]) -> None:
        on_trial = self._trial.goes_on
        if on_trial:
            outcomes = self._trial.judge(outcomes)
        if any(error is not None for _, error in outcomes):
            outcomes = [(message, self._final(message, error)) for message, error in outcomes]
        self._outcomes.tell(outcomes)
        if self._outcomes.untold:
            self.ready = False
        if on_trial:
            self._trial.go_on()

    def _final(self, message: Publish, error: Exception | None) -> Exception | None:
        """Give what a message is told; `NotSent` where it leaves once more, because what it needs was gone."""
        gone = isinstance(error, Unroutable) or (isinstance(error, Refused) and error.code == _NOT_FOUND)
        if gone:
            # Whatever comes next declares it again.
            if isinstance(error, Unroutable):
                self._entities.difference_update(message.entities)
                self._entity_keys.difference_update([entity.key for entity in message.entities])
            else:
                self._forget()
            if message.entities and message.leaves_again and not message.once_more:
                message.once_more = True
                again = NotSent(f"what the message needs was gone: {error}", url=self.url)
                again.__cause__ = error
                return again
        return error

    def _whose_fault(self, messages: list[Publish], error: Refused) -> list[Outcome]:
        """Tell what the end of the publish channel means for the messages on it."""
        named = _NAMED.search(error.message)
        concerned = messages
        if named is not None:
            exchange, topic = named["exchange"], named["topic"]
            if exchange == _UNNAMED:
                exchange = ""
            concerned = [
                message
                for message in messages
                if message.exchange == exchange and topic in (None, message.routing_key)
            ]
        guilty = concerned[0] if len(concerned) == 1 else None
        if guilty is None:
            for message in concerned:
                message.suspect = True
        lost = f"the channel was closed under the message: {error.message}"
        return [
            (message, error if message is guilty else ConnectionLost(lost, url=self.url))
            for message in messages
        ]

    def _told_apart(self, outcomes: Sequence[Outcome]) -> None:
        for message, error in outcomes:
            # A connection that was lost for another reason proves nothing.
            message.suspect = message.suspect and isinstance(error, ConnectionLost)
        self._tell(outcomes)


class _Declaring:
    """Carries out the declarations of one message, one after the other, and gets it a channel of its own if need be."""

    __slots__ = ("_apart", "_broker", "_done", "_missing")

    def __init__(
        self,
        broker: AMQPBroker,
        missing: list[tuple[Entity | None, Declaration]],
        done: Done,
        *,
        apart: bool,
    ) -> None:
        self._broker = broker
        self._missing = missing
        self._done = done
        self._apart = apart

    def go_on(self) -> None:
        """Perform the next declaration, or be done."""
        if not self._missing:
            if self._apart:
                self._broker.take_apart(self._done)
            else:
                self._done(None)
            return
        self._broker.perform(self._missing[0][1]).addCallbacks(self._performed, self._failed)

    def _performed(self, _: object) -> None:
        self._broker.declared(*self._missing.pop(0))
        self.go_on()

    def _failed(self, failure: Failure) -> None:
        error = failure.value
        assert isinstance(error, Exception)
        self._done(error)
