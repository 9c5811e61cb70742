"""A kombu Producer, Channel and Connection that record instead of sending.

kombu's own `Producer.publish` runs unmodified: serializer, compression, delivery details and properties are
its work. What it would have handed to a channel becomes a `Publish`.
"""

from __future__ import annotations

from contextlib import nullcontext
from inspect import signature
from math import inf
from typing import TYPE_CHECKING, Any, NoReturn

from celery.app.amqp import AMQP
from kombu.connection import Connection
from kombu.entity import Queue
from kombu.messaging import Producer
from kombu.transport.base import to_rabbitmq_queue_arguments

from .._operations import Publish
from ..errors import WouldBlock
from ._entities import Entities
from ._options import amqp_properties
from ._scope import recorder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from typing_extensions import Self

__all__ = ["CaptureConnection", "CaptureProducer"]

_nothing = nullcontext()

#: kombu is typed in parts only.
_Producer: Any = Producer

#: What a retry policy may hold: the keywords of `kombu.Connection.ensure`.
_policy = frozenset(signature(Connection.ensure).parameters) - {"self", "obj", "fun"}

#: Those of them that are numbers, and those that cannot be honoured.
_numbers = ("max_retries", "interval_start", "interval_step", "interval_max")
_unkept = ("errback", "on_revive", "retry_errors")

#: Whether this kombu declares what a message needs with the message's retry; since 5.5 it does.
_retries_declarations = "retry" in signature(Producer._publish).parameters


class CaptureConnection:
    """Stands where a producer's kombu Connection stands: has what pure code asks of it, and no socket."""

    def __init__(
        self, transport_cls: Any, properties: frozenset[str] | None, passing: frozenset[str] = frozenset()
    ) -> None:
        #: Only ``driver_type`` and such class attributes are asked for.
        self.transport = transport_cls
        #: The message properties that the wire format has, or None where it takes any.
        self.properties = properties
        #: Options of Celery's own that it passes on to the message as well; they end here.
        self.passing = passing
        self.transport_options: dict[str, Any] = {}
        self.default_channel = CaptureChannel(self)

    @property
    def client(self) -> CaptureConnection:
        """A channel's ``connection.client`` is the kombu Connection."""
        return self

    @property
    def connection(self) -> CaptureConnection:
        """A pool's ``connections.connection``."""
        return self

    def channel(self) -> CaptureChannel:
        """Return the recording channel."""
        return self.default_channel

    def _reraise_as_library_errors(self, *args: object, **kwargs: object) -> Any:
        return _nothing

    def ensure_connection(self, *args: object, **kwargs: object) -> CaptureConnection:
        """Nothing to connect."""
        return self

    def release(self) -> None:
        """Nothing to release."""

    close = release

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise WouldBlock(
            f"connection.{name} needs the broker and cannot be part of a call that is being recorded"
        )


class CaptureChannel:
    """The channel methods that publishing uses."""

    def __init__(self, connection: CaptureConnection) -> None:
        self.connection = connection

    def prepare_message(
        self,
        body: bytes | str,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
    ) -> Publish:
        """Make the message; `basic_publish` adds where it goes."""
        # kombu has made this dict of its keyword arguments, for this message only.
        given = {} if properties is None else properties
        if not given.keys() <= amqp_properties:
            self._refuse_unknown(given.keys() - amqp_properties - self.connection.passing, headers or {})
            written = self.connection.properties
            if written is not None:
                given = {name: value for name, value in given.items() if name in written}
        given.update(priority=priority, content_type=content_type, content_encoding=content_encoding)
        if None in given.values():
            given = {name: value for name, value in given.items() if value is not None}
        reply_to = given.get("reply_to")
        if type(reply_to) is not str and isinstance(reply_to, Queue):
            given["reply_to"] = reply_to.name
        if isinstance(body, str):
            body = body.encode(content_encoding or "utf-8")
        return Publish("", "", body, given, {} if headers is None else headers)

    def _refuse_unknown(self, names: AbstractSet[str], headers: dict[str, Any]) -> None:
        # Where calls are stamped, canvas leaves behind stamps of a signature that another's replaced, by whatever
        # name; protocol 1 does not tell. There kombu's way has to do: py-amqp leaves out what is no property, others do not look.
        if not names or headers.get("stamped_headers", True):
            return
        raise TypeError(
            f"unknown option {', '.join(map(repr, sorted(names)))}: it is neither an option of apply_async "
            f"nor a message property ({', '.join(sorted(amqp_properties))})"
        )

    def basic_publish(
        self,
        message: Publish,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool | None = None,
        immediate: bool = False,
        timeout: float | None = None,
        **options: object,
    ) -> Publish:
        """Address the message, and hand it back to `CaptureProducer.publish`."""
        message.exchange = exchange or ""
        message.routing_key = routing_key or ""
        message.immediate = bool(immediate)
        if timeout is not None:
            _check_number("timeout", timeout)
        message.timeout = timeout
        return message

    def prepare_queue_arguments(self, arguments: Any, **kwargs: Any) -> Any:
        """Name the arguments as RabbitMQ does, with kombu's own table."""
        return to_rabbitmq_queue_arguments(arguments, **kwargs)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise WouldBlock(
            f"channel.{name} needs an answer from the broker and cannot be part of a call that is being recorded"
        )


class CaptureProducer(_Producer):  # type: ignore[misc]  # typed as Any
    """kombu's Producer, recording. It holds no state of a call: any number of captures share one."""

    _app: Any
    _connection: CaptureConnection
    _entities: tuple[Entities, Entities]

    @classmethod
    def make(cls, app: Any, connection: CaptureConnection) -> CaptureProducer:
        """Make an app's one; where the app's own pool lends producers of a class of their own, that class's code runs, too."""
        own = _own_producer(app)
        namespace = {
            "_app": app,
            "_connection": connection,
            "_entities": (Entities(retry=False), Entities(retry=_retries_declarations)),
        }
        bases = (cls,) if issubclass(cls, own) else (own, cls)
        producer: CaptureProducer = type(cls.__name__, bases, namespace)(
            connection.default_channel, auto_declare=False
        )
        return producer

    @property
    def connection(self) -> CaptureConnection:
        """The recording connection."""
        return self._connection

    def publish(
        self,
        body: Any,
        routing_key: str | None = None,
        delivery_mode: int | str | None = None,
        mandatory: bool | None = None,
        *,
        retry: bool = False,
        retry_policy: Mapping[str, Any] | None = None,
        declare: Any = None,
        confirm_timeout: float | None = None,
        **options: Any,
    ) -> None:
        """Record; the retry, the declarations, ``mandatory`` and the confirm are the outbox's part."""
        found = recorder(self._app)
        if found is None:
            raise WouldBlock(
                "a recording producer was used outside the call that it was made for; ask the app for a producer"
            )
        task_message = found.reached(options.get("correlation_id"))
        if retry_policy and retry:
            _check(retry_policy)
        if confirm_timeout is not None:
            _check_number("confirm_timeout", confirm_timeout)
        message: Publish = super().publish(body, routing_key, delivery_mode, **options)
        if declare:
            known = self._entities[bool(retry)]
            message.entities = tuple([known.of(entity) for entity in declare])
        message.mandatory = mandatory
        message.retry = bool(retry)
        message.retry_policy = retry_policy
        message.confirm_timeout = confirm_timeout
        found.published(message, task_message)

    def maybe_declare(self, entity: Any, retry: bool = False, **retry_policy: Any) -> NoReturn:
        """Refuse a declaration that belongs to no message."""
        raise WouldBlock(
            "producer.maybe_declare() waits for the broker's answer; give the message declare=[...] instead"
        )


def _own_producer(app: Any) -> Any:
    """Return the class of the producers that an app's pool lends."""
    amqp = app.amqp
    if type(amqp).producer_pool is AMQP.producer_pool and amqp._producer_pool is None:
        # Celery's, which is not made in vain.
        return Producer
    own = getattr(amqp.producer_pool, "Producer", None)
    return own if isinstance(own, type) else Producer


def _check_number(name: str, value: Any) -> None:
    """Raise TypeError or ValueError for what is no number of seconds, or of retries."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; it has to be a number, or None")
    if not 0 <= value < inf:
        raise ValueError(f"{name} is {value!r}; it has to be a number from 0 on, or None")


def _check(policy: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for a retry policy that cannot be honoured."""
    if not policy.keys() <= _policy:
        unknown = ", ".join(map(repr, sorted(policy.keys() - _policy)))
        raise TypeError(f"retry_policy: unknown {unknown}; it may hold {', '.join(sorted(_policy))}")
    for name in _numbers:
        if policy.get(name) is not None:
            _check_number(f"retry_policy: {name!r}", policy[name])
    for name in _unkept:
        if policy.get(name):
            raise TypeError(
                f"retry_policy: {name!r} cannot be honoured, leave it out; whatever a connection fails with is tried again, and "
                "how a call ended is told by its Deferred"
            )
