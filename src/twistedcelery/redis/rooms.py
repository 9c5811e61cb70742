"""From an app's settings to the Redis rooms that serve it. Nothing connects."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .broker import RedisBroker
from .protocol import CommandProtocol, SubscriberProtocol
from .reply_list import BLOCK, ReplyList
from .results import RedisResults
from .routing import Routing
from .settings import backend_servers, broker_layout, broker_servers
from .target import targets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .._keeper import Attempt, Keeper
    from .._limits import Limits
    from .settings import RedisServer

__all__ = ["redis_broker", "redis_replies", "redis_results"]


def redis_broker(
    app: Any,
    reactor: Any,
    retry_policy: Callable[[int], float],
    limits: Limits,
    siblings: list[Keeper[Any]],
) -> RedisBroker:
    """Build the broker that ``broker_url`` names."""
    from kombu.transport.redis import Channel  # imports redis-py, 50 ms: where it is needed

    connection = app.connection_for_write()
    servers = _limited(broker_servers(connection), limits)

    def routing(db: int) -> Routing:
        return Routing(
            broker_layout(connection, db),
            known_type=lambda exchange: _known_type(app, exchange),
            expiring=hasattr(Channel, "_maybe_update_queues_expire"),
        )

    routing(servers[0].config.db)  # a setting that cannot be used is refused now
    return RedisBroker(
        clock=reactor,
        attempts=targets(reactor, servers, CommandProtocol, app.conf.broker_failover_strategy),
        routing=routing,
        **_common(servers, retry_policy, siblings),
    )


def redis_results(
    reactor: Any,
    backend: Any,
    retry_policy: Callable[[int], float],
    limits: Limits,
    siblings: list[Keeper[Any]],
    *,
    patience: float,
) -> RedisResults:
    """Build the source of results that ``result_backend`` names; ``backend`` is the app's, without its I/O.

    ``patience``: seconds for which a question is asked of a server that is away.
    """
    servers = _limited(backend_servers(backend), limits)
    return RedisResults(
        clock=reactor,
        commands=targets(reactor, servers, CommandProtocol),
        subscriber=targets(reactor, servers, SubscriberProtocol),
        backend=backend,
        patience=patience,
        inflate_limit=limits.inflate,
        **_common(servers, retry_policy, siblings),
    )


def redis_replies(
    app: Any,
    reactor: Any,
    backend: Any,
    retry_policy: Callable[[int], float],
    limits: Limits,
    siblings: list[Keeper[Any]],
    *,
    broker: RedisBroker,
    queue: str,
    following: Callable[[Iterator[Attempt[CommandProtocol]], int], Iterator[Attempt[CommandProtocol]]],
) -> ReplyList:
    """Build the source of ``rpc`` results over the same servers as the broker.

    ``following`` orders the attempts after the server that ``broker`` is connected to.
    """
    connection = app.connection_for_write()
    servers = [_patient(server) for server in _limited(broker_servers(connection), limits)]
    attempts = targets(reactor, servers, CommandProtocol, app.conf.broker_failover_strategy)
    return ReplyList(
        clock=reactor,
        attempts=following(attempts, len(servers)),
        server=lambda: broker.url,
        queue=queue,
        key_of=lambda db, name: Routing(broker_layout(connection, db)).key_of(name),
        accept=backend.accept,
        meta_from_decoded=backend.meta_from_decoded,
        inflate_limit=limits.inflate,
        **_common(servers, retry_policy, siblings),
    )


def _common(
    servers: Sequence[RedisServer], retry_policy: Callable[[int], float], siblings: list[Keeper[Any]]
) -> dict[str, Any]:
    return {
        "round_size": len(servers),
        "connect_timeout": servers[0].server.connect_timeout,
        "retry_policy": retry_policy,
        "siblings": siblings,
    }


def _limited(servers: Sequence[RedisServer], limits: Limits) -> list[RedisServer]:
    return [
        replace(server, config=replace(server.config, max_array_length=limits.array)) for server in servers
    ]


def _patient(server: RedisServer) -> RedisServer:
    """Allow for the silence of a server that has been asked to wait."""
    config = server.config
    return replace(
        server, config=replace(config, silence_timeout=max(config.silence_timeout, 3.0 * BLOCK))
    )  # fmt: skip


def _known_type(app: Any, exchange: str) -> str | None:
    """Give the type of an exchange that the app's queues tell of; a sender of Celery's declares no Broadcast queue."""
    for queue in app.amqp.queues.values():
        for known in (queue.exchange, *(binding.exchange for binding in queue.bindings or ())):
            if known and known.name == exchange:
                return str(known.type)
    return None
