"""A channel: declarations, consumers, publishing with confirms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import Logger

from ..errors import ConnectionLost, LocalProtocolError, Refused, RemoteProtocolError
from . import methods
from .calls import Calls
from .codec import encode_ack, encode_nack, encode_publish, encode_reject
from .confirms import Confirms
from .events import Got
from .methods import encode_method

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .events import Acked, Delivery, MethodReceived, Returned
    from .protocol import AMQPProtocol

__all__ = ["Channel", "QueueState"]

_T = TypeVar("_T")

_log = Logger()


class QueueState(NamedTuple):
    """What the server says of a queue that was declared."""

    name: str
    messages: int
    consumers: int


class _Consumer(NamedTuple):
    on_message: Callable[[Delivery], object]
    on_cancel: Callable[[], object] | None


def _nothing(answer: object) -> None:
    """The result of a method that is answered with "ok" only."""


class Channel:
    """One channel of an `AMQPProtocol`; from `AMQPProtocol.open_channel`, open.

    An error of the server's (404, 406, ...) ends this channel alone: every Deferred that is pending on it fails with
    `Refused`, every publish without an outcome gets it, ``on_closed`` is called. If the connection ends, the same
    happens with the connection's error. Cancelling a Deferred stops waiting; the method is not unsent.
    """

    __slots__ = (
        "_calls",
        "_closing",
        "_confirms",
        "_consumers",
        "_frame_max",
        "_send",
        "_send_method",
        "_unanswered",
        "_why",
        "connection",
        "is_open",
        "number",
        "on_closed",
        "on_outcomes",
    )

    def __init__(self, connection: AMQPProtocol, number: int, *, confirm: bool) -> None:
        self.connection = connection
        self.number = number
        self.is_open = False
        #: Called once when the server has closed the channel or the connection is gone; not after `close`.
        self.on_closed: Callable[[Exception], object] | None = None
        #: Called with what has become of publishes of a channel with confirms, in order, each once: its token, and None (the
        #: server has it), `Unroutable`, `Refused`, or why the channel ended before an answer.
        self.on_outcomes: Callable[[list[tuple[Any, Exception | None]]], object] | None = None
        self._send = connection._send
        self._send_method = connection._send_method
        self._frame_max = connection.frame_max
        self._confirms = Confirms() if confirm else None
        self._consumers: dict[str, _Consumer] = {}
        self._calls = Calls()
        #: How often the connection has looked in vain for an answer that is due.
        self._unanswered = 0
        #: Why the channel is not open any more.
        self._why: Exception | None = None
        #: Who waits for the end of a channel that we close; None while we do not.
        self._closing: list[Deferred[None]] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.number} {'open' if self.is_open else 'closed'}>"

    @property
    def outstanding(self) -> int:
        """How many publishes have no outcome yet."""
        return len(self._confirms) if self._confirms is not None else 0

    # -- declarations --------------------------------------------------------------------------------------------------

    def declare_exchange(
        self,
        exchange: str,
        type: str,  # noqa: A002  # AMQP's word
        *,
        passive: bool = False,
        durable: bool = False,
        auto_delete: bool = False,
        internal: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> Deferred[None]:
        """``exchange.declare`` (AMQP 0-9-1, 1.6.2.1)."""
        values = (0, exchange, type, passive, durable, auto_delete, internal, False, arguments)
        return self._call(methods.EXCHANGE_DECLARE, values, methods.EXCHANGE_DECLARE_OK)

    def bind_exchange(
        self, destination: str, source: str, routing_key: str = "", arguments: Mapping[str, Any] | None = None
    ) -> Deferred[None]:
        """``exchange.bind``, RabbitMQ's extension: messages of ``source`` flow to ``destination``."""
        values = (0, destination, source, routing_key, False, arguments)
        return self._call(methods.EXCHANGE_BIND, values, methods.EXCHANGE_BIND_OK)

    def declare_queue(
        self,
        queue: str,
        *,
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> Deferred[QueueState]:
        """``queue.declare`` (AMQP 0-9-1, 1.7.2.1). An empty name: the server makes one up."""
        values = (0, queue, passive, durable, exclusive, auto_delete, False, arguments)
        return self._call(
            methods.QUEUE_DECLARE, values, methods.QUEUE_DECLARE_OK, take=lambda answer: QueueState(*answer)
        )

    def bind_queue(
        self, queue: str, exchange: str, routing_key: str = "", arguments: Mapping[str, Any] | None = None
    ) -> Deferred[None]:
        """``queue.bind`` (AMQP 0-9-1, 1.7.2.3)."""
        values = (0, queue, exchange, routing_key, False, arguments)
        return self._call(methods.QUEUE_BIND, values, methods.QUEUE_BIND_OK)

    def unbind_queue(
        self, queue: str, exchange: str, routing_key: str = "", arguments: Mapping[str, Any] | None = None
    ) -> Deferred[None]:
        """``queue.unbind`` (AMQP 0-9-1, 1.7.2.5)."""
        return self._call(
            methods.QUEUE_UNBIND, (0, queue, exchange, routing_key, arguments), methods.QUEUE_UNBIND_OK
        )

    def purge_queue(self, queue: str) -> Deferred[int]:
        """``queue.purge``: how many messages were thrown away (AMQP 0-9-1, 1.7.2.7)."""
        return self._call(methods.QUEUE_PURGE, (0, queue, False), methods.QUEUE_PURGE_OK, take=_first)

    def delete_queue(self, queue: str, *, if_unused: bool = False, if_empty: bool = False) -> Deferred[int]:
        """``queue.delete``: how many messages went with it (AMQP 0-9-1, 1.7.2.9)."""
        values = (0, queue, if_unused, if_empty, False)
        return self._call(methods.QUEUE_DELETE, values, methods.QUEUE_DELETE_OK, take=_first)

    # -- consuming -----------------------------------------------------------------------------------------------------

    def qos(self, prefetch_count: int) -> Deferred[None]:
        """``basic.qos``: how many unacknowledged messages each consumer may have; 0: any number."""
        return self._call(methods.BASIC_QOS, (0, prefetch_count, False), methods.BASIC_QOS_OK)

    def consume(
        self,
        queue: str,
        on_message: Callable[[Delivery], object],
        *,
        no_ack: bool,
        exclusive: bool = False,
        consumer_tag: str = "",
        arguments: Mapping[str, Any] | None = None,
        on_cancel: Callable[[], object] | None = None,
    ) -> Deferred[str]:
        """``basic.consume``: fires with the consumer tag (AMQP 0-9-1, 1.8.3.3).

        ``on_message`` is called with each message; ``on_cancel`` if the server ends the consumer, for
        example because the queue was deleted. If the Deferred is cancelled, the consumer is ended as soon as the
        server has answered, and what came for it goes back to the queue.
        """
        consumer = _Consumer(on_message, on_cancel)

        def take(answer: list[Any]) -> str:
            tag: str = answer[0]
            self._consumers[tag] = consumer
            return tag

        def give_back(message: Delivery) -> None:
            if not no_ack:
                self.reject(message.delivery_tag)

        def unwanted(tag: str) -> None:
            self._consumers[tag] = _Consumer(give_back, None)
            self.cancel(tag).addErrback(lambda _: None)  # the channel's end says it to everybody else

        values = (0, queue, consumer_tag, False, no_ack, exclusive, False, arguments)
        return self._call(
            methods.BASIC_CONSUME, values, methods.BASIC_CONSUME_OK, take=take, unwanted=unwanted
        )

    def cancel(self, consumer_tag: str) -> Deferred[None]:
        """``basic.cancel``: end a consumer. Messages on their way still come until the Deferred fires."""

        def take(answer: list[Any]) -> None:
            self._consumers.pop(consumer_tag, None)

        return self._call(methods.BASIC_CANCEL, (consumer_tag, False), methods.BASIC_CANCEL_OK, take=take)

    def get(self, queue: str, *, no_ack: bool) -> Deferred[Delivery | None]:
        """``basic.get``: one message, or None where the queue is empty (AMQP 0-9-1, 1.8.3.10)."""

        def unwanted(message: Delivery | None) -> None:
            if message is not None and not no_ack:
                self.reject(message.delivery_tag)

        return self._call(
            methods.BASIC_GET,
            (0, queue, no_ack),
            methods.BASIC_GET_OK,
            methods.BASIC_GET_EMPTY,
            take=lambda answer: answer if isinstance(answer, Got) else None,
            unwanted=unwanted,
        )

    def ack(self, delivery_tag: int, *, multiple: bool = False) -> None:
        """``basic.ack``. Without effect on a closed channel: the server has taken the message back by then."""
        if self.is_open:
            self._send_method(encode_ack(self.number, delivery_tag, multiple=multiple))

    def nack(self, delivery_tag: int, *, multiple: bool = False, requeue: bool = True) -> None:
        """``basic.nack``, RabbitMQ's extension. Without effect on a closed channel."""
        if self.is_open:
            self._send_method(encode_nack(self.number, delivery_tag, multiple=multiple, requeue=requeue))

    def reject(self, delivery_tag: int, *, requeue: bool = True) -> None:
        """``basic.reject``. Without effect on a closed channel."""
        if self.is_open:
            self._send_method(encode_reject(self.number, delivery_tag, requeue=requeue))

    # -- publishing ----------------------------------------------------------------------------------------------------

    def publish(
        self,
        exchange: str,
        routing_key: str,
        properties: Mapping[str, Any],
        headers: Mapping[str, Any] | None,
        body: bytes,
        *,
        mandatory: bool = False,
        immediate: bool = False,
        token: object = None,
    ) -> None:
        """``basic.publish`` (AMQP 0-9-1, 1.8.3.7). With confirms, ``on_outcomes`` gets the token and the outcome.

        :raises LocalProtocolError: if the message cannot be encoded (it names the key), or the channel is not
            open. Nothing was written then, nothing will be told.
        """
        if not self.is_open:
            raise LocalProtocolError(f"channel {self.number} is not open", url=self.connection.config.url)
        data = encode_publish(
            self.number,
            exchange,
            routing_key,
            properties,
            headers,
            body,
            self._frame_max,
            mandatory=mandatory,
            immediate=immediate,
        )
        confirms = self._confirms
        if confirms is not None:
            if mandatory or immediate:
                confirms.published_mandatory(token, exchange, routing_key, properties)
            else:
                confirms.published(token)
        self._send(data)

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> Deferred[None]:
        """Close the channel; fires when the server has answered, or the connection is gone.

        What is pending fails at once with `ConnectionLost`: it may have happened or may not.
        """
        if self._closing is None:
            if not self.is_open:
                return succeed(None)
            self._closing = []
            self.connection._core.close_channel(self.number)
            self._finish(
                ConnectionLost("the channel was closed by this side", url=self.connection.config.url)
            )
            self._ask()
        done: Deferred[None] = Deferred(self._closing.remove)
        self._closing.append(done)
        return done

    def _shut(self, why: Exception | None) -> None:
        """Take no more work: the connection is about to end."""
        self.is_open = False
        self._why = self._why or why

    def _closed_by_server(self, code: int, text: str) -> None:
        self._ended(Refused(f"{code} {text}", code=code, url=self.connection.config.url))

    def _close_answered(self) -> None:
        while self._closing:
            self._closing.pop(0).callback(None)
        self._closing = None

    def _ended(self, reason: Exception) -> None:
        """Tell everybody that there will be no more answers. Called once, by the connection."""
        if self._closing is not None:
            self._close_answered()
            return
        self._shut(reason)
        # First: whoever is told what has become of a call may make the next, which must not come here.
        if self.on_closed is not None:
            _tell(self.on_closed, reason)
        self._finish(reason)

    def _finish(self, reason: Exception) -> None:
        self.is_open = False
        self._why = reason
        self._consumers.clear()
        self._calls.fail(reason)
        if self._confirms is not None and self._confirms:
            lost = [(token, reason) for token in self._confirms.clear()]
            if self.on_outcomes is not None:
                _tell(self.on_outcomes, lost)

    # -- what the server says ------------------------------------------------------------------------------------------

    def _open(self) -> Deferred[Channel]:
        """Wait for channel.open-ok, which the connection has asked for; ask for confirms without waiting for it."""
        self._ask()
        if self._confirms is None:
            return self._calls.wait(methods.CHANNEL_OPEN, (methods.CHANNEL_OPEN_OK,), self._opened, _close)
        self._calls.expect(methods.CHANNEL_OPEN, methods.CHANNEL_OPEN_OK)
        opened = self._calls.wait(methods.CONFIRM_SELECT, (methods.CONFIRM_SELECT_OK,), self._opened, _close)
        self._send_method(encode_method(self.number, methods.CONFIRM_SELECT, (False,)))
        return opened

    def _opened(self, answer: object) -> Channel:
        self.is_open = True
        return self

    def _call(
        self,
        method: int,
        arguments: tuple[Any, ...],
        *answers: int,
        take: Callable[[Any], _T] = _nothing,  # type: ignore[assignment]  # _T is None then
        unwanted: Callable[[_T], object] | None = None,
    ) -> Deferred[_T]:
        if not self.is_open:
            return fail(
                self._why
                or LocalProtocolError(f"channel {self.number} is not open", url=self.connection.config.url)
            )
        try:
            data = encode_method(self.number, method, arguments)
        except LocalProtocolError as problem:
            return fail(problem)
        self._ask()
        deferred = self._calls.wait(method, answers, take, unwanted)
        self._send_method(data)
        return deferred

    @property
    def _waits(self) -> str:
        """The method whose answer is due next; empty where none is."""
        return "channel.close" if self._closing is not None else self._calls.next

    def _ask(self) -> None:
        """Note that an answer will be due, where none is yet."""
        if not self._calls:
            self._unanswered = 0
            self.connection._asked()

    def _answered(self, method: int, answer: object) -> None:
        self._unanswered = 0
        self._calls.answered(method, answer)

    def _received(self, event: MethodReceived) -> None:
        if event.method != methods.BASIC_CANCEL:
            self._answered(event.method, event.arguments)
            return
        tag, no_wait = event.arguments
        if not no_wait:
            self._send_method(encode_method(self.number, methods.BASIC_CANCEL_OK, (tag,)))
        consumer = self._consumers.pop(tag, None)
        if consumer is not None and consumer.on_cancel is not None:
            _tell(consumer.on_cancel)

    def _delivered(self, message: Delivery) -> None:
        consumer = self._consumers.get(message.consumer_tag)
        if consumer is None:
            raise RemoteProtocolError(f"a message for the unknown consumer {message.consumer_tag!r}")
        _tell(consumer.on_message, message)

    def _returned(self, event: Returned) -> None:
        if self._confirms is not None and not self._confirms.returned(event, self.connection.config.url):
            _log.warn(
                "A message that this side did not publish as mandatory was returned: {code} {text}",
                code=event.code,
                text=event.text,
            )

    def _acked(self, event: Acked) -> None:
        if self._confirms is None:
            raise RemoteProtocolError(f"a confirm on channel {self.number}, which has none")
        settled = self._confirms.settle(event.delivery_tag, multiple=event.multiple)
        if self.on_outcomes is None:
            return
        if not event.positive:
            url = self.connection.config.url
            settled = [
                (token, Refused("the server could not take the message (basic.nack)", url=url))
                for token, _ in settled
            ]
        _tell(self.on_outcomes, settled)


def _first(answer: list[Any]) -> int:
    count: int = answer[0]
    return count


def _close(channel: Channel) -> None:
    channel.close()


def _tell(callback: Callable[..., object], *arguments: object) -> None:
    """Call the program back; a bug there must not keep others from being told, nor cost the connection."""
    try:
        callback(*arguments)
    except RemoteProtocolError:
        raise  # a message whose headers turned out to be nonsense when they were looked at
    except Exception:  # noqa: BLE001  # see above; it is logged
        _log.failure("An error in {callback}", callback=callback)
