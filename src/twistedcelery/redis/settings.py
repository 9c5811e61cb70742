"""From Celery's and kombu's Redis settings to what a connection needs.

URLs are parsed by kombu (broker: `servers`) and by Celery's own backend class (results: its
``connparams``), whose constructor does no I/O. What comes out of both are the keyword arguments of redis-py's
connections, so that is what is read here. An argument that means nothing to a client with two connections
is left alone; one that is not known, or cannot be honoured, is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from dataclasses import replace as _replace
from typing import TYPE_CHECKING, Any

from celery.exceptions import ImproperlyConfigured
from kombu.utils import symbol_by_name

from .._urls import Server, servers
from .connection import PING_INTERVAL, SILENCE_TIMEOUT, ConnectionConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["Layout", "RedisServer", "Sentinels", "backend_servers", "broker_layout", "broker_servers"]

#: Arguments of redis-py about its pool of blocking sockets, its replies and its own retries: no effect here.
_WITHOUT_EFFECT = frozenset({
    "connection_class", "connection_pool", "decode_responses", "driver_info", "encoding", "encoding_errors",
    "legacy_responses", "lib_name", "lib_version", "max_connections", "parser_class", "protocol", "retry",
    "retry_on_error", "retry_on_timeout", "socket_read_size", "timeout",
})  # fmt: skip

#: Those that are read below.
_READ = frozenset({
    "client_name", "credential_provider", "db", "health_check_interval", "password", "socket_connect_timeout",
    "socket_keepalive", "socket_keepalive_options", "socket_timeout", "ssl", "username",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RedisServer:
    """A server, or what Sentinels call one, and how to log in there."""

    #: Where it is; with Sentinels, its host and port are the first Sentinel's.
    server: Server
    #: Without credentials: those are asked for anew at each attempt.
    config: ConnectionConfig
    username: str | None = None
    password: str | Callable[[], str] | None = field(default=None, repr=False)
    #: A ``redis.CredentialProvider``, which may take its time: asked in a thread.
    credential_provider: Any = field(default=None, repr=False)
    sentinels: Sentinels | None = None

    @property
    def url(self) -> str:
        """The server for messages, without password."""
        return self.config.url


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sentinels:
    """Who is asked where the master is (``sentinel://``)."""

    servers: Sequence[RedisServer]
    master_name: str
    #: A Sentinel that sees fewer others is not believed.
    min_other_sentinels: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How kombu's Redis transport lays out a broker: keys, channels and priorities.

    Attributes are those of ``kombu.transport.redis.Channel``, set by ``broker_transport_options``.
    """

    global_keyprefix: str
    sep: str
    priority_steps: Sequence[int]
    #: What the channel of a fanout exchange begins with, its database number filled in.
    fanout_prefix: str
    #: The same as kombu before 5.4 had it under Sentinel, where it is to be served too, or None.
    legacy_fanout_prefix: str | None
    #: Whether the routing key is a part of the channel.
    fanout_patterns: bool
    body_encoding: str | None
    #: Where a message to a direct exchange goes that no queue is bound for, or None.
    deadletter_queue: str | None = None


def broker_servers(connection: Any) -> list[RedisServer]:
    """Read a ``kombu.Connection`` (of ``redis://``, ``rediss://``, ``sentinel://``), never to be connected.

    :raises ImproperlyConfigured: a setting that cannot be used.
    """
    found = servers(connection)
    from kombu.transport.redis import Channel  # imports redis-py, 50 ms: where it is needed

    options = connection.transport_options or {}
    arguments = {key: options[key] for key in _READ if key in options}
    arguments.setdefault("health_check_interval", Channel.health_check_interval)
    made = [
        _read(
            server,
            {
                **arguments,
                **server.query,
                "db": _database(server.virtual_host),
                "username": server.userid,
                "password": server.password,
                "credential_provider": server.credential_provider,
            },
            "broker_transport_options",
        )
        for server in found
    ]
    return [_with_sentinels(made[0], found, options)] if found[0].transport == "sentinel" else made


def broker_layout(connection: Any, db: int) -> Layout:
    """Read where a broker keeps what, for the database ``db``."""
    from kombu.transport.redis import Channel  # as above

    options = connection.transport_options or {}

    def option(name: str, default: Any = None) -> Any:
        return options.get(name, getattr(Channel, name, default))

    given = option("fanout_prefix")
    unformatted = (given if isinstance(given, str) else Channel.keyprefix_fanout) if given else ""
    prefix = unformatted.format(db=db)
    legacy = option("sentinel_fanout_compat", default=False) and prefix != unformatted
    body_encoding = option("body_encoding")
    if body_encoding and body_encoding != "base64" and body_encoding.lower() != "utf-8":
        raise ImproperlyConfigured(
            f"broker_transport_options: body_encoding is base64, utf-8 or None, not {body_encoding!r}"
        )
    steps = tuple(option("priority_steps"))
    if not steps:
        raise ImproperlyConfigured(
            "broker_transport_options: priority_steps is empty; it needs one step at least"
        )
    return Layout(
        global_keyprefix=option("global_keyprefix") or "",
        sep=option("sep"),
        priority_steps=steps,
        fanout_prefix=prefix,
        legacy_fanout_prefix=unformatted if legacy else None,
        fanout_patterns=bool(option("fanout_patterns")),
        body_encoding=body_encoding,
        deadletter_queue=option("deadletter_queue"),
    )


def backend_servers(backend: Any) -> list[RedisServer]:
    """Read a ``celery.backends.redis.RedisBackend`` or ``SentinelBackend``, never to be connected.

    :raises ImproperlyConfigured: a setting that cannot be used.
    """
    arguments = dict(backend.connparams)
    hosts = arguments.pop("hosts", None)
    first = hosts[0] if hosts else arguments
    host, port, path = (first.get(key) for key in ("host", "port", "path"))
    for key in ("host", "port", "path"):
        arguments.pop(key, None)
    connection_class = arguments.get("connection_class")
    tls = any(base.__name__ == "SSLConnection" for base in getattr(connection_class, "__mro__", ()))
    server = Server(
        transport="sentinel" if hosts else "rediss" if tls else "redis",
        host="" if path else host or "localhost",
        port=0 if path else int(port or 6379),
        path=path,
        userid=arguments.get("username"),
        ssl=(_tls_of(arguments) or True) if tls else False,
    )
    arguments = {key: value for key, value in arguments.items() if not key.startswith("ssl_")}
    made = _read(server, arguments, "the result backend's settings")
    if not hosts:
        return [made]
    asked = [Server(transport="sentinel", host=each["host"], port=int(each["port"])) for each in hosts]
    return [_with_sentinels(made, asked, {"sentinel_kwargs": {}, **backend._transport_options})]


def _database(virtual_host: str) -> int:
    """Read the database's number as kombu does (``Channel._prepare_virtual_host``)."""
    text = virtual_host.strip("/") or "0"
    if not text.isdigit():
        raise ImproperlyConfigured(f"a Redis database is a number, not {text!r}")
    return int(text)


def _tls_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key.startswith("ssl_")}


def _read(server: Server, arguments: Mapping[str, Any], where: str) -> RedisServer:
    """Read redis-py's keyword arguments for a connection to ``server``."""
    if unknown := sorted(set(arguments) - _READ - _WITHOUT_EFFECT):
        known = ", ".join(sorted(_READ))
        raise ImproperlyConfigured(f"{where}: {unknown[0]!r} is not known for Redis; known are {known}")
    get = arguments.get
    name = get("client_name")
    if name and not all("!" <= character <= "~" for character in name):
        raise ImproperlyConfigured(
            f"{where}: client_name={name!r}: Redis takes printable ASCII without spaces"
        )
    timeout, interval = (
        _seconds(get(key), key, where) for key in ("socket_timeout", "health_check_interval")
    )
    db = int(get("db") or 0)
    server = _replace(server, virtual_host=str(db))
    given = _seconds(get("socket_connect_timeout"), "socket_connect_timeout", where)
    return RedisServer(
        server=_replace(server, connect_timeout=given or timeout or server.connect_timeout),
        config=ConnectionConfig(
            url=server.url,
            db=db,
            client_name=name or None,
            keepalive=bool(get("socket_keepalive")) and server.path is None,
            keepalive_options=_keepalive_options(get("socket_keepalive_options"), where),
            silence_timeout=timeout or SILENCE_TIMEOUT,
            ping_interval=PING_INTERVAL if interval is None else interval,
        ),
        username=get("username"),
        password=get("password"),
        credential_provider=_provider(get("credential_provider"), where),
    )


def _seconds(given: Any, name: str, where: str) -> float | None:
    """Read a span of time."""
    try:
        seconds = None if given is None else float(given)
    except (TypeError, ValueError):
        seconds = -1.0
    if seconds is not None and seconds < 0:
        raise ImproperlyConfigured(f"{where}: {name}={given!r} is not a number of seconds")
    return seconds


def _keepalive_options(given: Any, where: str) -> dict[int, int]:
    """Read ``{socket.TCP_KEEPIDLE: 60, ...}``."""
    options = dict(given or {})
    for pair in options.items():
        if not all(isinstance(one, int) for one in pair):
            raise ImproperlyConfigured(
                f"{where}: socket_keepalive_options: {pair[0]!r}: {pair[1]!r} are not an option of a socket and its value"
            )
    return options


def _provider(given: Any, where: str) -> Any:
    """Make the credential provider where it is given by name."""
    provider = given
    if isinstance(given, str) and given:
        provider = symbol_by_name(given)()  # type: ignore[no-untyped-call]  # kombu's
    if provider and not callable(getattr(provider, "get_credentials", None)):
        raise ImproperlyConfigured(f"{where}: credential_provider has to be a redis.CredentialProvider")
    return provider or None


def _with_sentinels(master: RedisServer, asked: Sequence[Server], options: Mapping[str, Any]) -> RedisServer:
    """Say whom to ask for the master; ``sentinel_kwargs`` are redis-py's arguments for connections to them."""
    name = options.get("master_name")
    if not name:
        raise ImproperlyConfigured("sentinel:// needs the transport option 'master_name'")
    given = options.get("sentinel_kwargs")
    if given is None:  # redis-py's rule: the sockets are treated alike
        given = {key: value for key, value in options.items() if key.startswith("socket_")}
    arguments = {key: value for key, value in given.items() if not key.startswith("ssl_")}
    ssl = (_tls_of(given) or True) if given.get("ssl") else False
    watchers = [
        _read(
            Server(transport="sentinel", host=each.host, port=each.port or 26379, ssl=ssl),
            arguments,
            "sentinel_kwargs",
        )
        for each in asked
    ]
    return _replace(
        master,
        config=_replace(master.config, master_only=True),
        sentinels=Sentinels(
            servers=watchers,
            master_name=name,
            min_other_sentinels=int(options.get("min_other_sentinels") or 0),
        ),
    )
