"""The operations that a call is made of: what capture writes, what a broker and a result source perform.

Declarations are AMQP's methods one to one, because that is what kombu asks of any transport; a Redis broker
gives them the meaning that kombu's own Redis transport gives them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = [
    "BindExchange",
    "BindQueue",
    "Declaration",
    "DeclareExchange",
    "DeclareQueue",
    "Entity",
    "Local",
    "Operation",
    "Publish",
    "Write",
    "freeze",
    "not_sent",
]


def freeze(value: object) -> object:
    """Turn an arguments table into something hashable that is equal for equal tables."""
    if isinstance(value, dict):
        return frozenset((key, freeze(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return (type(value), value)


@dataclass(slots=True)
class DeclareExchange:
    """``exchange.declare`` (AMQP 0-9-1, 1.6.2.1)."""

    exchange: str
    type: str = "direct"
    durable: bool = True
    auto_delete: bool = False
    passive: bool = False
    arguments: Mapping[str, Any] | None = None

    @property
    def key(self) -> object:
        """Equal for equal declarations, hashable."""
        return (
            "exchange", self.exchange, self.type, self.durable, self.auto_delete, self.passive,
            freeze(self.arguments or {}),
        )  # fmt: skip


@dataclass(slots=True)
class DeclareQueue:
    """``queue.declare`` (AMQP 0-9-1, 1.7.2.1)."""

    queue: str
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False
    passive: bool = False
    arguments: Mapping[str, Any] | None = None

    @property
    def key(self) -> object:
        """Equal for equal declarations, hashable."""
        return (
            "queue", self.queue, self.durable, self.exclusive, self.auto_delete, self.passive,
            freeze(self.arguments or {}),
        )  # fmt: skip


@dataclass(slots=True)
class BindQueue:
    """``queue.bind`` (AMQP 0-9-1, 1.7.2.3)."""

    queue: str
    exchange: str
    routing_key: str = ""
    arguments: Mapping[str, Any] | None = None

    @property
    def key(self) -> object:
        """Equal for equal declarations, hashable."""
        return ("bind", self.queue, self.exchange, self.routing_key, freeze(self.arguments or {}))


@dataclass(slots=True)
class BindExchange:
    """``exchange.bind``, RabbitMQ's extension: messages of ``source`` flow to ``destination``."""

    destination: str
    source: str
    routing_key: str = ""
    arguments: Mapping[str, Any] | None = None

    @property
    def key(self) -> object:
        """Equal for equal declarations, hashable."""
        return (
            "bind-exchange", self.destination, self.source, self.routing_key, freeze(self.arguments or {}),
        )  # fmt: skip


Declaration: TypeAlias = DeclareExchange | DeclareQueue | BindQueue | BindExchange


@dataclass(slots=True, eq=False)
class Entity:
    """A kombu Queue or Exchange, as the declarations that make it, in order.

    Compared by identity: capture hands out the same object for an entity that has not changed, so that a
    broker can remember per connection what it has declared without looking inside.
    """

    declarations: tuple[Declaration, ...]
    #: False where it has to be declared for every message: it may vanish by itself (auto-delete, expiring).
    cacheable: bool = True
    #: Its name, for messages.
    name: str = ""
    #: Equal for entities with equal declarations.
    key: object = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Make the key once."""
        self.key = tuple(declaration.key for declaration in self.declarations)


@dataclass(slots=True, eq=False)
class Publish:
    """``basic.publish`` with its content (AMQP 0-9-1, 1.8.3.7), and what has to be declared before it."""

    exchange: str
    routing_key: str
    body: bytes
    #: ``content_type``, ``content_encoding``, ``delivery_mode``, ``priority``, ``correlation_id``,
    #: ``reply_to``, ``expiration`` (milliseconds, a string) ...: AMQP's names, only those that are set.
    properties: dict[str, Any]
    headers: dict[str, Any]
    entities: tuple[Entity, ...] = ()
    #: None: the broker decides by the exchange's type (DESIGN section 4).
    mandatory: bool | None = None
    immediate: bool = False
    #: Seconds that the message may wait to be written; None: as long as the retry policy says.
    timeout: float | None = None
    #: Seconds that the confirm may take once it is written; None: no bound of its own.
    confirm_timeout: float | None = None
    retry: bool = False
    retry_policy: Mapping[str, Any] | None = None
    #: The id of the task that it calls; None for events and control messages.
    task_id: str | None = None
    #: Whether it may be the one that the server has closed a channel for: then it goes on a channel of its own.
    suspect: bool = False
    #: Whether it may be the one that the server has closed the connection for: then nothing else is on its way beside it.
    accused: bool = False
    #: Whether it has found out that what it declares was gone, and leaves once more.
    once_more: bool = False
    #: What follows once the broker has confirmed it: ``after_task_publish``, the ``task-sent`` event.
    after: list[Local | Publish] | None = None
    #: Called instead, with ``exception=``, where that does not come to pass: sends ``task_publish_failed``.
    failed: Callable[..., object] | None = None
    #: The unit of the outbox that it belongs to.
    owner: Any = field(default=None, repr=False)

    @property
    def leaves_again(self) -> bool:
        """Whether it would be sent again where it is given back: it may be retried, and its call waits for that."""
        return self.retry and (self.owner is None or self.owner.is_waiting)

    def fail(self, error: Exception) -> None:
        """Tell, once, that it will not be sent, or that nobody knows whether it was."""
        failed, self.failed, self.after = self.failed, None, None
        if failed is not None:
            failed(exception=error)


@dataclass(slots=True, eq=False)
class Write:
    """Commands for the result backend, performed together; acknowledged before what follows leaves."""

    commands: list[tuple[Any, ...]]
    #: True: all or nothing (MULTI / EXEC).
    transaction: bool = False


@dataclass(slots=True, eq=False)
class Local:
    """Something of Celery's that runs on this side once all that stands before it is done.

    Receivers of ``after_task_publish``, for example: after means after the broker's confirm.
    """

    run: Callable[[], object]


Operation: TypeAlias = Publish | Write


def not_sent(operations: Iterable[Operation], error: Exception) -> None:
    """Tell of each message that it is never sent."""
    for operation in operations:
        if isinstance(operation, Publish):
            operation.fail(error)
