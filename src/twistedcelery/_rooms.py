"""Which room serves which URL: the one table of brokers and result sources."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from celery.app.backends import by_url
from celery.backends.base import DisabledBackend
from celery.backends.rpc import RPCBackend
from celery.exceptions import ImproperlyConfigured
from twisted.internet.defer import Deferred, succeed

from ._capture import amqp_properties, inert_backend
from ._endpoints import targets
from ._keeper import Keepable
from ._unit import patience_of
from ._urls import UnreadableURL, check_urls, servers
from .amqp.broker import AMQPBroker
from .amqp.results import ReplyQueue
from .amqp.settings import protocol_builder
from .errors import ConnectionFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ._keeper import Attempt, Keeper
    from ._limits import Limits
    from ._operations import Publish, Write
    from .interfaces import Broker, BrokerListener, Done, ResultSource

__all__ = ["Rooms", "backend_patience", "open_rooms"]

#: kombu's names of transports that speak AMQP 0-9-1 to a server.
_AMQP = frozenset({"amqp", "amqps", "pyamqp", "librabbitmq"})
#: kombu's names of transports that make a broker of Redis.
_REDIS = frozenset({"redis", "rediss", "sentinel"})
#: Celery's backends that store in Redis and push; their module imports redis-py, which need not be there.
_REDIS_BACKENDS = frozenset({"RedisBackend", "SentinelBackend"})

P = TypeVar("P", bound=Keepable)


@dataclass(slots=True)
class Rooms:
    """What serves one app."""

    broker: Broker
    #: None where the app keeps no results.
    source: ResultSource | None
    #: The inert backend that calls are captured with.
    backend: Any
    #: The message properties that the broker's wire format has; None: any.
    properties: frozenset[str] | None
    #: The queue that replies go to; None where results come another way.
    reply_to: str | None


def open_rooms(
    app: Any,
    reactor: Any,
    *,
    retry_policy: Callable[[int], float],
    reply_queue_expires: float | None,
    declare_timeout: float,
    limits: Limits,
    outside: Callable[[Write], object],
) -> Rooms:
    """Choose and build the rooms for an app, from its settings. Does no I/O.

    ``declare_timeout`` and ``limits`` are TwistedCelery's; ``outside`` gets the backend writes that Celery makes between captures (the drop-in's canvas).

    Raises celery.exceptions.ImproperlyConfigured for a broker or a backend that there is no room for; except with
    ``task_always_eager``, where tasks run in the caller's process and tests name any broker.
    """
    check_urls("broker_url", app.conf.broker_write_url)
    check_urls("result_backend", app.backend_cls or app.conf.result_backend)
    try:
        return _open_rooms(app, reactor, retry_policy, reply_queue_expires, declare_timeout, limits, outside)
    except ImproperlyConfigured as error:
        # Celery itself parses the URL of the broker for an eager call.
        if not app.conf.task_always_eager or isinstance(error, UnreadableURL):
            raise
        return Rooms(_Nowhere(error), None, app._get_backend(), None, None)


class _Nowhere:
    """A broker that there is no room for; see `twistedcelery.interfaces.Broker`."""

    ready = connected = False
    url = ""

    def __init__(self, reason: ImproperlyConfigured) -> None:
        self._reason = reason

    def listen(self, listener: BrokerListener) -> None:
        """Say whom to tell."""
        self._listener = listener

    def connect(self) -> None:
        """Say that there is no use."""
        refusal = ConnectionFailed(str(self._reason))
        refusal.permanent = True
        refusal.__cause__ = self._reason
        self._listener.broker_unavailable(refusal)

    def prepare(self, message: Publish, done: Done) -> bool:
        """Never called, as it is never ready."""
        raise AssertionError("there is no broker")

    publish: Callable[[Publish], None] = prepare  # type: ignore[assignment]  # as above

    def stop(self, timeout: float) -> Deferred[None]:
        """There is nothing to close."""
        return succeed(None)


def _open_rooms(
    app: Any,
    reactor: Any,
    retry_policy: Callable[[int], float],
    reply_queue_expires: float | None,
    declare_timeout: float,
    limits: Limits,
    outside: Callable[[Write], object],
) -> Rooms:
    try:
        # kombu imports here what a transport needs; below, Celery what a backend needs.
        connection = _connection(app)
    except (ImportError, AttributeError, KeyError) as error:
        raise _unusable("broker_url", app.conf.broker_write_url, error) from error
    found = servers(connection)
    transport = found[0].transport
    kept_by = app.backend_cls or app.conf.result_backend
    try:
        backend_class, _ = by_url(kept_by, app.loader)
    except (ImportError, AttributeError) as error:
        raise _unusable("result_backend", kept_by, error) from error
    siblings: list[Keeper[Any]] = []
    if transport in _REDIS:
        return _over_redis(app, reactor, backend_class, retry_policy, limits, outside, siblings)
    if transport not in _AMQP:
        raise ImproperlyConfigured(
            f"broker_url: there is no way yet to carry {transport!r} over Twisted; use amqp://, redis:// "
            "or one of their relatives"
        )
    common = {
        "clock": reactor,
        "round_size": len(found),
        "connect_timeout": found[0].connect_timeout,
        "retry_policy": retry_policy,
        "siblings": siblings,
    }
    build = protocol_builder(reactor, app.conf.broker_heartbeat, found, declare_timeout=declare_timeout)
    strategy = app.conf.broker_failover_strategy
    broker = AMQPBroker(attempts=targets(reactor, found, build, strategy), **common)
    if issubclass(backend_class, RPCBackend):
        backend = inert_backend(app, outside)
        reply_to = _reply_queue()
        expires = reply_queue_expires or backend.expires or 86400.0
        source = ReplyQueue(
            attempts=_following(broker, targets(reactor, found, build, strategy), len(found)),
            server=lambda: broker.url,
            publisher=lambda: broker.connection,
            queue=reply_to,
            expires=float(getattr(expires, "total_seconds", lambda: expires)()),
            accept=backend.accept,
            meta_from_decoded=backend.meta_from_decoded,
            inflate_limit=limits.inflate,
            **common,
        )
        return Rooms(broker, source, backend, amqp_properties, reply_to)
    if issubclass(backend_class, DisabledBackend):
        return Rooms(broker, None, inert_backend(app, outside), amqp_properties, None)
    return Rooms(
        broker,
        *_kept_results(app, reactor, backend_class, retry_policy, limits, outside, siblings),
        amqp_properties,
        None,
    )


def _connection(app: Any) -> Any:
    """Make kombu's connection, which is never connected, for what it has parsed."""
    with suppress(ValueError):
        return app.connection_for_write()
    # Not from kombu's error, which quotes what it cannot read, password and all.
    urls = app.conf.broker_write_url
    raise UnreadableURL("broker_url", str(urls[0] if isinstance(urls, list | tuple) else urls))


def _unusable(setting: str, urls: Any, error: Exception) -> ImproperlyConfigured:
    """Say why there is no room for what a setting names, whose own module cannot even be imported."""
    url = urls[0] if isinstance(urls, list | tuple) and urls else urls
    scheme = str(url).partition("://")[0].partition("+")[0]
    if scheme in _REDIS:
        return _redis_is_missing(error)
    return ImproperlyConfigured(
        f"{setting}: there is no way yet to carry {scheme!r} over Twisted; use amqp:// or redis:// for the broker, rpc://, redis:// or none "
        f"for the results ({error})"
    )


def _redis_is_missing(error: Exception) -> ImproperlyConfigured:
    return ImproperlyConfigured(
        f"Redis needs redis-py and hiredis: pip install twistedcelery[redis] ({error})"
    )


@contextmanager
def _importing_redis() -> Iterator[None]:
    """Import what Redis needs, where it is needed: redis-py takes 50 ms, and need not be there."""
    try:
        import redis  # noqa: F401  # Celery's own modules take it where it is, and say in many ways that it is not

        yield
    except ImportError as error:
        raise _redis_is_missing(error) from error


def _kept_results(
    app: Any,
    reactor: Any,
    backend_class: type,
    retry_policy: Callable[[int], float],
    limits: Limits,
    outside: Callable[[Write], object],
    siblings: list[Keeper[Any]],
) -> tuple[ResultSource, Any]:
    """Build the source and the inert backend of a result backend that keeps results, whatever the broker."""
    if backend_class.__name__ in _REDIS_BACKENDS:
        with _importing_redis():
            from .redis.rooms import redis_results
        try:
            backend = inert_backend(app, outside)
        except ValueError as error:
            raise ImproperlyConfigured(f"result_backend: {error}") from error  # a database that is no number
        patience = backend_patience(backend)
        return redis_results(reactor, backend, retry_policy, limits, siblings, patience=patience), backend
    raise ImproperlyConfigured(
        f"result_backend: there is no way yet to receive results of {backend_class.__name__} over Twisted; "
        "use rpc://, redis://, or none"
    )


def backend_patience(backend: Any) -> float:
    """Read the retry policy of a result backend as one span of time, in seconds.

    It is ``retry_policy`` in ``result_backend_transport_options``; what that leaves out is the backend's own, 19 s in all.
    Raises ImproperlyConfigured where a number of it is none.
    """
    where = "result_backend_transport_options: retry_policy"
    try:
        policy: Mapping[str, Any] = backend.retry_policy
    except (TypeError, ValueError) as error:
        raise ImproperlyConfigured(f"{where} has to be a dictionary: {error}") from error
    for name in ("max_retries", "interval_start", "interval_step", "interval_max"):
        value = policy.get(name)
        if value is not None and not (isinstance(value, int | float) and 0 <= value < inf):
            raise ImproperlyConfigured(
                f"{where}: {name!r} is {value!r}; it has to be a number from 0 on, or None"
            )
    return patience_of(policy)


def _over_redis(
    app: Any,
    reactor: Any,
    backend_class: type,
    retry_policy: Callable[[int], float],
    limits: Limits,
    outside: Callable[[Write], object],
    siblings: list[Keeper[Any]],
) -> Rooms:
    """Build the rooms for a Redis broker; its messages may have any property."""
    with _importing_redis():
        from .redis.rooms import redis_broker, redis_replies
    broker = redis_broker(app, reactor, retry_policy, limits, siblings)
    if issubclass(backend_class, DisabledBackend):
        return Rooms(broker, None, inert_backend(app, outside), None, None)
    if issubclass(backend_class, RPCBackend):
        backend = inert_backend(app, outside)
        reply_to = _reply_queue()
        source = redis_replies(
            app,
            reactor,
            backend,
            retry_policy,
            limits,
            siblings,
            broker=broker,
            queue=reply_to,
            following=lambda attempts, count: _following(broker, attempts, count),
        )
        return Rooms(broker, source, backend, None, reply_to)
    kept = _kept_results(app, reactor, backend_class, retry_policy, limits, outside, siblings)
    return Rooms(broker, *kept, None, None)


def _reply_queue() -> str:
    """Make a name that nobody else has."""
    return f"twistedcelery.{socket.gethostname()}.{os.getpid()}.{uuid4().hex}"


def _following(broker: Broker, attempts: Iterator[Attempt[P]], count: int) -> Iterator[Attempt[P]]:
    """Attempt the server that the broker publishes to, while it is connected; else each in turn."""
    known: dict[str, Attempt[P]] = {}
    while True:
        for _ in range(count + 1):
            target = next(attempts)
            known[target.url] = target
            if not broker.connected or target.url == broker.url:
                break
        yield known.get(broker.url, target) if broker.connected else target
