"""From the app's settings to AMQP connections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.exceptions import ImproperlyConfigured

from .config import ConnectionConfig
from .protocol import AMQPProtocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from twisted.internet.interfaces import IReactorTime

    from .._urls import Server

__all__ = ["connection_config", "protocol_builder"]

#: Keys of ``broker_transport_options`` that reach a py-amqp connection or steer kombu, and what becomes of them here.
_MEANT_FOR_BLOCKING = frozenset(
    {
        # Confirms are always asked for; the rest bounds blocking socket calls, of which there are none.
        "confirm_publish", "read_timeout", "write_timeout", "drain_events_timeout",
        # kombu's retry of the connection: the keeper's back-off and the outbox's patience stand for it.
        "max_retries", "interval_start", "interval_step", "interval_max", "connect_retries_timeout", "errback",
        "callback", "failover_strategy",
        # Read from the connection by _urls.servers.
        "userid", "password", "login_method", "virtual_host", "ssl", "connect_timeout", "heartbeat",
        # Of other transports, or of workers; one configuration may serve several.
        "visibility_timeout", "queue_order_strategy", "polling_interval", "global_keyprefix",
        "native_delayed_delivery_queue_type", "queue_declare_retry_delay",
    }
)  # fmt: skip
_USED = frozenset({"login_response", "frame_max", "channel_max", "client_properties", "max_body_size"})


def connection_config(
    server: Server, heartbeat: float | None, declare_timeout: float = 30.0
) -> ConnectionConfig:
    """Return the log-in and the limits for a server.

    ``heartbeat`` is the app's ``broker_heartbeat`` in seconds, for servers whose URL gives none; ``declare_timeout`` is
    `ConnectionConfig`'s. Settings in
    ``broker_transport_options`` that make no sense here are refused.
    """
    options: Mapping[str, Any] = server.transport_options
    unknown = options.keys() - _USED - _MEANT_FOR_BLOCKING - {"socket_settings"}
    if unknown:
        raise ImproperlyConfigured(
            f"broker_transport_options: {', '.join(sorted(map(repr, unknown)))} is not an option of the AMQP transport; "
            f"it takes {', '.join(sorted(_USED))}"
        )
    if options.get("socket_settings"):
        raise ImproperlyConfigured(
            "broker_transport_options: 'socket_settings' cannot be honoured, Twisted's transports own the socket; remove it"
        )
    given = {name: options[name] for name in _USED if options.get(name) is not None}
    given["declare_timeout"] = declare_timeout
    seconds = server.heartbeat if server.heartbeat is not None else heartbeat
    try:
        return _config(server, seconds or 0, given)
    except (TypeError, ValueError) as error:
        raise ImproperlyConfigured(f"broker settings: {error}") from error


def _config(server: Server, heartbeat: float, given: Mapping[str, Any]) -> ConnectionConfig:
    return ConnectionConfig(
        username=server.userid or "guest",
        password=server.password if server.password is not None else "guest",
        virtual_host=server.virtual_host or "/",
        login_method=server.login_method,
        heartbeat=heartbeat,
        url=server.url,
        **given,
    )


def protocol_builder(
    clock: IReactorTime,
    heartbeat: float | None,
    servers: Iterable[Server] = (),
    *,
    declare_timeout: float = 30.0,
) -> Callable[[Server], AMQPProtocol]:
    """Return what makes a protocol for a server; see `connection_config`.

    Raises ImproperlyConfigured where that would for one of ``servers``.
    """
    for server in servers:
        connection_config(server, heartbeat, declare_timeout)
    return lambda server: AMQPProtocol(connection_config(server, heartbeat, declare_timeout), clock)
