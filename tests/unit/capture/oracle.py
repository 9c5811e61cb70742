"""The oracle: what stock Celery and kombu hand to a broker and to redis-py, taken down in order.

`stock` runs a call on an app whose broker is a kombu transport that records; `captured` runs the equal call on an equal app in
a `Capture`. Both give the same kind of list, so that they can be compared.
"""

from __future__ import annotations

import itertools
import uuid as uuid_module
from contextlib import contextmanager
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any
from unittest import mock

import amqp
import kombu.pidbox
from celery import Celery
from celery.events.event import Event
from kombu import pools
from kombu.connection import Connection
from kombu.messaging import Producer
from kombu.transport import pyamqp
from kombu.transport.base import StdChannel, to_rabbitmq_queue_arguments
from kombu.utils.uuid import uuid as make_uuid

from twistedcelery._capture import Capture, amqp_properties, inert_backend
from twistedcelery._operations import (
    BindExchange,
    BindQueue,
    DeclareExchange,
    DeclareQueue,
    Local,
    Publish,
    Write,
)

#: The name of both apps' reply queue, and of their threads.
OID = "reply-queue"

#: What stock Celery did, in order.
LOG: list[Any] = []


class Never(set[Any]):
    """A cache of declarations that forgets: each message shows all that it asks for."""

    def add(self, item):
        pass


def table(arguments):
    return dict(arguments or {})


def declare_exchange(
    exchange,
    type="direct",  # noqa: A002  # kombu's keyword
    durable=False,
    auto_delete=False,
    arguments=None,
    passive=False,
):
    return ("exchange", exchange, type, bool(durable), bool(auto_delete), bool(passive), table(arguments))


def declare_queue(queue, durable=False, exclusive=False, auto_delete=False, arguments=None, passive=False):
    return (
        "queue", queue, bool(durable), bool(exclusive), bool(auto_delete), bool(passive), table(arguments),
    )  # fmt: skip


class RecordingChannel(StdChannel):
    """The methods of a py-amqp channel, taken down."""

    def __init__(self, connection):
        self.connection = connection
        self.events: dict[str, set[Any]] = {"basic_return": set()}

    def prepare_message(self, *args, **kwargs):
        prepare: Any = pyamqp.Channel.prepare_message
        return prepare(self, *args, **kwargs)

    def prepare_queue_arguments(self, arguments, **kwargs):
        return to_rabbitmq_queue_arguments(arguments, **kwargs)

    def exchange_declare(self, exchange, nowait=False, **options):
        LOG.append(declare_exchange(exchange, **options))

    def queue_declare(self, queue, nowait=False, **options):
        LOG.append(declare_queue(queue, **options))
        return queue, 0, 0

    def queue_bind(self, queue, exchange="", routing_key="", arguments=None, nowait=False):
        LOG.append(("bind", queue, exchange, routing_key or "", table(arguments)))

    def exchange_bind(self, destination, source="", routing_key="", arguments=None, nowait=False):
        LOG.append(("bind-exchange", destination, source, routing_key or "", table(arguments)))

    def basic_publish(
        self,
        message,
        exchange="",
        routing_key="",
        mandatory=False,
        immediate=False,
        timeout=None,
        confirm_timeout=None,
    ):
        properties = dict(message.properties)
        headers = properties.pop("application_headers", None) or {}
        body = message.body
        if isinstance(body, str):
            body = body.encode(properties.get("content_encoding") or "utf-8")
        LOG.append(
            publish(
                exchange,
                routing_key,
                body,
                # What py-amqp writes of them.
                {
                    name: value
                    for name, value in properties.items()
                    if name in dict(amqp.Message.PROPERTIES) and value is not None
                },
                headers,
                mandatory,
                immediate,
                timeout,
                confirm_timeout,
            )
        )

    # The consumer of the rpc backend.

    def basic_consume(self, *args, **kwargs):
        return "tag"

    def basic_qos(self, *args, **kwargs):
        pass

    def basic_cancel(self, *args, **kwargs):
        pass

    def close(self):
        pass


def publish(exchange, routing_key, body, properties, headers, mandatory, immediate, timeout, confirm_timeout):
    return (
        "publish", exchange or "", routing_key or "", body, dict(properties), dict(headers),
        bool(mandatory), bool(immediate), timeout, confirm_timeout,
    )  # fmt: skip


class RecordingTransport(pyamqp.Transport):
    """A transport like py-amqp's that takes down what it is asked."""

    def establish_connection(self):
        client: Any = self.client
        client.declared_entities = Never()
        connection = SimpleNamespace(client=client, connected=True)
        connection.channel = lambda: RecordingChannel(connection)
        return connection

    def create_channel(self, connection):
        return connection.channel()

    def verify_connection(self, connection):
        return True

    def close_connection(self, connection):
        pass

    def close_channel(self, channel):
        pass


class RecordingRedis:
    """redis-py's client where it hands commands to a connection."""

    def __new__(cls):
        import redis

        class Pipeline(redis.client.Pipeline):
            def execute(self, raise_on_error=True):
                commands = [list(map(flat, args)) for args, _ in self.command_stack]
                self.command_stack = []
                if commands:
                    LOG.append(("redis", self.transaction, commands))
                return [None] * len(commands)

        class Client(redis.Redis):
            def execute_command(self, *args, **options):
                LOG.append(("redis", False, [list(map(flat, args))]))

            def pipeline(self, transaction=True, shard_hint=None):
                return Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)

            def pubsub(self, **kwargs):
                return mock.MagicMock()

        return Client()


def flat(value):
    return value if isinstance(value, bytes) else str(value)


def make_app(conf, setup=lambda app: None):
    """Make an app of this configuration, connected to nothing."""
    app = Celery("proj", set_as_current=False)
    app.conf.update(
        {
            "broker_url": "amqp://guest:guest@127.0.0.1:1//",
            "broker_transport": RecordingTransport,
            "result_backend": "rpc",
            **conf,
        }
    )
    setup(app)
    app._local.oid = OID
    app.now = lambda: datetime(2031, 5, 6, 7, 8, 9, tzinfo=timezone.utc)
    return app


@contextmanager
def deterministic():
    """Make ids count from zero, and time stand still."""
    counter = itertools.count(1)
    with (
        mock.patch.object(make_uuid, "__defaults__", (lambda: uuid_module.UUID(int=next(counter)),)),
        mock.patch.object(Event, "__defaults__", (None, dict, lambda: 1e9)),
        mock.patch.object(kombu.pidbox, "time", return_value=1e9),
    ):
        yield


def ensure(connection, obj, fun, **policy):
    """Retry as kombu does: the policy is taken down, and the first attempt succeeds."""
    if isinstance(obj, Producer):
        LOG.append(("retry", policy))
    return fun


def stock(app, call):
    """Run ``call(app)`` as stock Celery does; return what it did and the error that ended it."""
    del LOG[:]
    error = result = None
    is_redis = app.conf.result_backend.startswith("redis")
    if is_redis:
        vars(app.backend)["client"] = RecordingRedis()
    with deterministic(), mock.patch.object(Connection, "ensure", ensure):
        try:
            result = call(app)
        except Exception as found:  # noqa: BLE001  # compared
            error = found
    log = [entry for entry in LOG if entry[:2] != ("queue", OID)]
    shape = structure(result)
    # Results unsubscribe as they go.
    del result
    pools.reset()
    del LOG[:]
    return log, error, shape


def captured(app, call):
    """Run ``call(app)`` in a capture; return the same as `stock`."""
    capture = capture_of(app)
    with deterministic():
        try:
            found = capture.run(call, app)
        except Exception as error:  # noqa: BLE001  # compared
            return None, error, None
    return list(flatten(found.operations)), None, structure(found.result)


def capture_of(app):
    """Make a Capture as the engine does for AMQP."""
    return Capture(app, backend=inert_backend(app), reply_to=OID, properties=amqp_properties)


def structure(result):
    """Return the ids of a result, its parents and its members."""
    if result is None or not hasattr(result, "as_tuple"):
        return result if isinstance(result, (str, int, list, type(None))) else repr(type(result))
    return result.as_tuple(), getattr(result, "ignored", None)


def flatten(operations):
    """List operations as what a channel and redis-py would be asked for, in order."""
    for operation in operations:
        if isinstance(operation, Write):
            yield "redis", operation.transaction, [list(map(flat, command)) for command in operation.commands]
        elif isinstance(operation, Local):
            operation.run()
        else:
            yield from flatten_publish(operation)


def flatten_publish(operation: Publish):
    if operation.retry:
        yield "retry", dict(operation.retry_policy or {})
    for entity in operation.entities:
        for declaration in entity.declarations:
            yield flatten_declaration(declaration)
    yield publish(
        operation.exchange,
        operation.routing_key,
        operation.body,
        operation.properties,
        operation.headers,
        operation.mandatory,
        operation.immediate,
        operation.timeout,
        operation.confirm_timeout,
    )
    yield from flatten(operation.after or ())


def flatten_declaration(declaration):
    match declaration:
        case DeclareExchange():
            return declare_exchange(
                declaration.exchange,
                declaration.type,
                declaration.durable,
                declaration.auto_delete,
                declaration.arguments,
                declaration.passive,
            )
        case DeclareQueue():
            return declare_queue(
                declaration.queue,
                declaration.durable,
                declaration.exclusive,
                declaration.auto_delete,
                declaration.arguments,
                declaration.passive,
            )
        case BindQueue():
            return (
                "bind", declaration.queue, declaration.exchange, declaration.routing_key,
                table(declaration.arguments),
            )  # fmt: skip
        case BindExchange():
            return (
                "bind-exchange", declaration.destination, declaration.source, declaration.routing_key,
                table(declaration.arguments),
            )  # fmt: skip
    raise AssertionError(declaration)
