"""What kombu's queues and exchanges declare, taken down from their own ``declare``."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from kombu.common import maybe_declare
from kombu.transport.base import to_rabbitmq_queue_arguments

from .._operations import BindExchange, BindQueue, Declaration, DeclareExchange, DeclareQueue, Entity

__all__ = ["Entities"]

#: kombu is typed in parts only.
_maybe_declare: Any = maybe_declare


class _DeclaringChannel:
    """The methods of a channel that one entity's ``declare`` calls."""

    #: kombu's cache of declarations, which asks for this; it forgets with the channel.
    declared_entities: Any

    def __init__(self) -> None:
        self.declarations: list[Declaration] = []
        self.declared_entities = set()

    @property
    def connection(self) -> _DeclaringChannel:
        """Its connection, and that one's ``client``: whatever is asked of them is here."""
        return self

    client = connection

    def ensure(self, entity: Any, declare: Any, **policy: Any) -> Any:
        """Recording needs no second attempt."""
        return declare

    def prepare_queue_arguments(self, arguments: Any, **kwargs: Any) -> Any:
        """Name the arguments as RabbitMQ does, with kombu's own table."""
        return to_rabbitmq_queue_arguments(arguments, **kwargs)

    def exchange_declare(
        self,
        exchange: str,
        type: str = "direct",  # noqa: A002  # kombu's keyword
        durable: bool = False,
        auto_delete: bool = False,
        arguments: Any = None,
        nowait: bool = False,
        passive: bool = False,
    ) -> None:
        self.declarations.append(
            DeclareExchange(
                exchange, type, bool(durable), bool(auto_delete), bool(passive), deepcopy(arguments) or None
            )
        )

    def queue_declare(
        self,
        queue: str = "",
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = False,
        arguments: Any = None,
        nowait: bool = False,
    ) -> tuple[str, int, int]:
        if not queue:
            raise ValueError(
                "a task's queue needs a name: a name made by the server is not known to any worker"
            )
        self.declarations.append(
            DeclareQueue(
                queue,
                bool(durable),
                bool(exclusive),
                bool(auto_delete),
                bool(passive),
                deepcopy(arguments) or None,
            )
        )
        return queue, 0, 0

    def queue_bind(
        self,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        arguments: Any = None,
        nowait: bool = False,
    ) -> None:
        self.declarations.append(BindQueue(queue, exchange, routing_key or "", deepcopy(arguments) or None))

    def exchange_bind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Any = None,
    ) -> None:
        self.declarations.append(
            BindExchange(destination, source, routing_key or "", deepcopy(arguments) or None)
        )


class Entities:
    """What each of kombu's entities declares, recorded anew only when the entity has changed.

    Recording one costs more than the rest of a small message; a queue hardly ever changes.

    ``retry``: as kombu declares them for a message that is retried. It makes a difference: such a queue is copied, and a copied queue with
    ``bindings`` has lost its exchange.
    """

    #: Entities remembered; dynamic queue names must not fill the memory.
    limit = 1000

    def __init__(self, *, retry: bool) -> None:
        self._retry = retry
        #: By ``id``: the entity, pairs of a live ``__dict__`` and how it was when recorded, the record.
        self._known: dict[int, tuple[Any, list[tuple[dict[str, Any], dict[str, Any]]], Entity]] = {}

    def of(self, entity: Any) -> Entity:
        """Return the declarations of a kombu Queue or Exchange."""
        known = self._known.get(id(entity))
        if known is not None and known[0] is entity:
            for live, before in known[1]:
                if live != before:
                    break
            else:
                return known[2]
        return self._record(entity)

    def _record(self, entity: Any) -> Entity:
        channel = _DeclaringChannel()
        # A twin: kombu binds entities to channels as it goes.
        twin = object.__new__(type(entity))
        vars(twin).update(vars(entity))
        # It would be told numbers that nobody knows yet.
        twin.on_declared = None
        _maybe_declare(twin, channel, self._retry)
        arguments = getattr(entity, "queue_arguments", None) or {}
        recorded = Entity(
            tuple(channel.declarations),
            # kombu looks at queue_arguments only; a queue with the attribute ``expires`` may vanish as well.
            cacheable=bool(
                entity.can_cache_declaration
                and not getattr(entity, "expires", None)
                and "x-expires" not in arguments
            ),
            name=entity.name,
        )
        if len(self._known) >= self.limit:
            self._known.clear()
        watched = [(vars(part), _snapshot(part)) for part in _parts(entity)]
        self._known[id(entity)] = (entity, watched, recorded)
        return recorded


def _parts(entity: Any) -> list[Any]:
    """The entity and what it refers to: its exchange, its bindings, their exchanges."""
    parts = [entity]
    for binding in getattr(entity, "bindings", None) or ():
        parts += _parts(binding)
    exchange = getattr(entity, "exchange", None)
    if exchange is not None and not isinstance(exchange, str):
        parts.append(exchange)
    return parts


def _snapshot(part: Any) -> dict[str, Any]:
    """Copy what may be changed in place; the parts themselves are watched one by one."""
    return {
        name: deepcopy(value) if isinstance(value, dict) else set(value) if isinstance(value, set) else value
        for name, value in vars(part).items()
    }
