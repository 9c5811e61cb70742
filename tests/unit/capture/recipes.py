"""Random apps and random calls, as plain data, so that two equal ones can be built from the same draw."""

from __future__ import annotations

import importlib.util
from datetime import datetime, timedelta, timezone
from typing import Any

from celery import VERSION, chain, chord, group
from celery.canvas import StampingVisitor
from hypothesis import strategies as st
from kombu.entity import Exchange, Queue, binding

__all__ = ["apps", "build", "calls", "configure", "perform"]

_now = datetime(2031, 5, 6, 7, 8, 9, tzinfo=timezone.utc)

serializers = ["json", "pickle"] + (["yaml"] if importlib.util.find_spec("yaml") else [])
compressions = ["zlib", "bzip2"]
backends = ["redis://127.0.0.1:1/0", "rpc", "redis://127.0.0.1:1/0", "disabled"]
exchange_types = ["direct", "topic", "fanout"]
queue_names = ["celery", "high", "bound", "short", "wide", "made-up"]


def some(optional, required=None):
    """Make a dict of some of these keys."""
    return st.fixed_dictionaries(required or {}, optional=optional)


# Apps

queues = st.lists(
    st.sampled_from(
        [
            ("celery", "celery", "direct", "celery", {}),
            ("high", "tasks", "topic", "high.#", {"max_priority": 9}),
            ("short", "tasks", "direct", "short", {"expires": 30.5, "message_ttl": 5, "durable": False}),
            ("wide", "wide", "fanout", "", {"queue_arguments": {"x-queue-type": "quorum"}}),
            (
                "bound",
                None,
                "direct",
                "",
                {"bindings": [("other", "topic", "a.*")], "max_length": 10, "auto_delete": True},
            ),
            ("made-up", "lost", "headers", "x", {"binding_arguments": {"x-match": "any"}}),
        ]
    ),
    unique_by=lambda queue: queue[0],
    min_size=1,
    max_size=4,
)

routes = st.sampled_from(
    [
        {"add": "high"},
        {"add": {"queue": "celery", "routing_key": "elsewhere", "priority": 4}},
        {"*": {"exchange": "tasks", "exchange_type": "topic", "routing_key": "a.b"}},
        [[("tsum", {"queue": "missing-one"}), ("mul", "wide")], {"t*": {"priority": 8}}],
    ]
)

apps = some(
    {
        "task_protocol": st.sampled_from([1, 2]),
        "task_serializer": st.sampled_from(serializers),
        "task_compression": st.sampled_from(compressions),
        "task_default_queue": st.sampled_from(["celery", "main"]),
        "task_default_queue_type": st.sampled_from(["classic", "quorum"]),
        "task_default_exchange": st.sampled_from(["main", "tasks"]),
        "task_default_exchange_type": st.sampled_from(exchange_types),
        "task_default_routing_key": st.sampled_from(["main", "a.b"]),
        "task_default_delivery_mode": st.sampled_from([1, 2, "transient", "persistent"]),
        "task_default_priority": st.integers(0, 9),
        "task_queue_max_priority": st.integers(1, 9),
        "task_create_missing_queues": st.sampled_from([True, True, True, False]),
        "task_create_missing_queue_type": st.sampled_from(["classic", "quorum"]),
        "task_queues": queues,
        "task_routes": routes,
        "task_send_sent_event": st.booleans(),
        "task_publish_retry": st.booleans(),
        "task_publish_retry_policy": st.just({"max_retries": 7}),
        "task_ignore_result": st.booleans(),
        "task_store_eager_result": st.booleans(),
        "task_allow_error_cb_on_chord_header": st.booleans(),
        "result_backend": st.sampled_from(backends),
        "result_expires": st.sampled_from([None, 60, timedelta(hours=2)]),
        "result_serializer": st.sampled_from(serializers),
        "event_exchange": st.just("news"),
        "event_serializer": st.sampled_from(["json", "pickle"]),
        "enable_utc": st.booleans(),
        "timezone": st.sampled_from(["UTC", "Europe/Berlin"]),
        "result_backend_transport_options": st.just({"global_keyprefix": "mine"}),
    }
)


def configure(drawn):
    """Turn a drawn configuration into one that Celery takes."""
    conf = dict(drawn)
    if "task_queues" in conf:
        conf["task_queues"] = [make_queue(*queue) for queue in conf["task_queues"]]
    return conf


def make_queue(name, exchange, kind, routing_key, options):
    options = dict(options)
    if "bindings" in options:
        options["bindings"] = [
            binding(Exchange(ex, type=t), routing_key=key) for ex, t, key in options["bindings"]
        ]
    exchange = Exchange(exchange, type=kind) if exchange else ""
    return Queue(name, exchange=exchange, routing_key=routing_key, **options)


def register(app):
    """Give an app its tasks."""

    @app.task(name="add", shared=False, typing=False)
    def add(x, y):
        return x + y

    @app.task(
        name="mul",
        typing=False,
        shared=False,
        priority=3,
        time_limit=50,
        ignore_result=True,
        serializer="json",
        compression="zlib",
    )
    def mul(x, y):
        return x * y

    @app.task(name="tsum", shared=False, queue="high", expires=300, delivery_mode=1, bind=True, typing=False)
    def tsum(self, numbers):
        return sum(numbers)


# Values that each app builds for itself


class Made(tuple[Any, ...]):
    """A value that is made anew for each app: a Queue or an Exchange."""

    __slots__ = ()

    def make(self):
        what, *rest = self
        return Exchange(rest[0], type=rest[1]) if what == "exchange" else make_queue(*rest)


made_queues = st.sampled_from(
    [
        Made(("queue", "mine", "tasks", "topic", "mine.x", {"max_priority": 5})),
        Made(("queue", "gone", "tasks", "direct", "gone", {"auto_delete": True})),
        Made(("queue", "old", "", "direct", "", {"expires": 5})),
    ]
)
made_exchanges = st.builds(lambda kind: Made(("exchange", "made", kind)), st.sampled_from(exchange_types))


def make(value):
    if isinstance(value, Made):
        return value.make()
    if isinstance(value, dict):
        return {key: make(item) for key, item in value.items()}
    if isinstance(value, list):
        return [make(item) for item in value]
    return value


# Calls

words = st.text("ab'\"\\é☃\n", max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**33), 2**33) | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
arguments = st.lists(values, max_size=3)
pairs = st.tuples(values, values).map(list)
keywords = st.dictionaries(st.sampled_from("xyz"), values, max_size=2)
tasks = st.sampled_from(["add", "mul", "tsum", "elsewhere"])
moments = st.sampled_from([5, 90.5, _now + timedelta(hours=1), _now - timedelta(seconds=3), _now.isoformat()])

#: What may be serialised into another message.
plain_options = {
    "queue": st.sampled_from(queue_names),
    "routing_key": st.sampled_from(["a.b", "celery"]),
    "exchange": st.sampled_from(["", "tasks"]),
    "exchange_type": st.sampled_from(exchange_types),
    "priority": st.none() | st.integers(0, 9),
    "countdown": st.sampled_from([0, 3, 20.5, -1]),
    "headers": st.dictionaries(st.sampled_from(["h", "task", "lang"]), values, max_size=2),
    "serializer": st.sampled_from(serializers),
    "compression": st.sampled_from(compressions),
    "shadow": words,
    "time_limit": st.sampled_from([None, 10, 40.5]),
    "soft_time_limit": st.sampled_from([None, 5, 12]),
    "ignore_result": st.none() | st.booleans(),
    "reply_to": st.just("elsewhere"),
    "retry": st.booleans(),
    "retry_policy": st.sampled_from([{}, {"max_retries": 1, "interval_start": 0.5}]),
    "delivery_mode": st.sampled_from([None, 1, 2, "transient"]),
    "mandatory": st.booleans(),
    "correlation_id": st.just("correlated"),
    "message_id": st.just("message"),
    "app_id": st.just("app"),
    "type": st.just("kind"),
    "timestamp": st.just(1_900_000_000),
    "argsrepr": words,
    "kwargsrepr": words,
    "origin": st.just("here"),
    "root_id": st.just("root"),
    "parent_id": st.just("parent"),
    "timeout": st.sampled_from([None, 2.5]),
    "retries": st.integers(0, 3),
    "replaced_task_nesting": st.integers(0, 2),
    "add_to_parent": st.booleans(),
    "stamped_headers": st.just(["stamp"]),
    # A chord's, which it passes on to its body where its header is empty.
    "interval": st.just(1.5),
    "max_retries": st.just(3),
}
if VERSION >= (5, 5):
    plain_options["confirm_timeout"] = st.sampled_from([None, 1.5])

direct_options = {
    **plain_options,
    "queue": plain_options["queue"] | made_queues,
    "exchange": plain_options["exchange"] | made_exchanges,
    "eta": moments.filter(lambda value: not isinstance(value, (int, float))),
    "expires": moments,
    "task_id": st.just("given-id"),
    "group_id": st.just("given-group"),
    "declare": st.lists(made_queues | made_exchanges, max_size=2),
    "immediate": st.just(True),
}


def with_stamp(options):
    if "stamped_headers" in options:
        return {**options, "stamp": "value"}
    return options


def few(optional):
    """Make a dict of few of these options: all at once would fail each other."""
    return (
        st.lists(st.sampled_from(sorted(optional)), max_size=4, unique=True)
        .flatmap(lambda names: st.fixed_dictionaries({name: optional[name] for name in names}))
        .map(with_stamp)
    )


single = st.tuples(
    st.just("task"),
    st.sampled_from(["add", "mul", "tsum"]),
    arguments,
    keywords,
    few(plain_options),
    st.booleans(),
)


def canvases(inner):
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.tuples(st.just("group"), st.lists(inner, max_size=3)),
        st.tuples(st.just("chain"), several),
        st.tuples(st.just("chord"), several, inner),
        st.tuples(st.just("chord"), st.just([]), inner),
        st.tuples(st.just("pipe"), inner, inner),
        st.tuples(st.just("chunks"), st.lists(pairs, max_size=4), st.integers(1, 3)),
        st.tuples(st.sampled_from(["map", "starmap"]), st.lists(pairs, max_size=3)),
        st.tuples(st.just("linked"), inner, single, st.sampled_from(["link", "link_error"])),
        st.tuples(st.just("stamped"), inner),
        st.tuples(st.just("set"), inner, few(plain_options)),
        st.tuples(st.just("as dict"), inner),
    )


signatures = st.recursive(single, canvases, max_leaves=6)


class _Stamps(StampingVisitor):
    def on_signature(self, actual_sig, **headers):
        return {"mark": f"of {actual_sig.task}", "stamped_headers": ["mark"]}


def build(app, recipe):
    """Build the signature that a recipe tells."""
    kind, *rest = recipe
    match kind:
        case "task":
            name, args, kwargs, options, immutable = rest
            return app.tasks[name].signature(list(args), dict(kwargs), immutable=immutable, **make(options))
        case "group":
            return group([build(app, member) for member in rest[0]], app=app)
        case "chain":
            return chain(*[build(app, member) for member in rest[0]], app=app)
        case "chord":
            return chord([build(app, member) for member in rest[0]], build(app, rest[1]), app=app)
        case "pipe":
            return build(app, rest[0]) | build(app, rest[1])
        case "chunks":
            return app.tasks["add"].chunks(list(rest[0]), rest[1])
        case "map" | "starmap":
            return getattr(app.tasks["add"], kind)(list(rest[0]))
        case "linked":
            found = build(app, rest[0])
            getattr(found, rest[2])(build(app, rest[1]))
            return found
        case "stamped":
            found = build(app, rest[0])
            found.stamp(visitor=_Stamps())
            return found
        case "set":
            return build(app, rest[0]).set(**make(rest[1]))
        case "as dict":
            return app.signature(dict(build(app, rest[0])))
    raise AssertionError(kind)


linked_options = st.builds(
    lambda options, links: {**options, **links},
    few(direct_options),
    some({"link": st.lists(single, max_size=2), "link_error": single}),
)

calls = st.one_of(
    st.tuples(st.just("send_task"), tasks, arguments, keywords, linked_options),
    st.tuples(
        st.just("apply_async"), st.sampled_from(["add", "mul", "tsum"]), arguments, keywords, linked_options
    ),
    st.tuples(st.just("delay"), st.sampled_from(["add", "mul", "tsum"]), arguments, keywords),
    st.tuples(st.just("signature"), canvases(signatures), arguments, keywords, few(direct_options)),
    st.tuples(st.just("signature"), signatures, arguments, keywords, few(direct_options)),
    st.tuples(st.just("signature"), signatures, st.just([]), st.just({}), st.just({})),
    st.tuples(st.just("signature delay"), signatures, arguments, keywords),
    st.tuples(st.just("control"), st.sampled_from(["revoke", "broadcast", "rate_limit"])),
)


def perform(app, call):
    """Make a call."""
    kind, *rest = call
    match kind:
        case "send_task":
            name, args, kwargs, options = rest
            return app.send_task(name, list(args), dict(kwargs), **_options(app, options))
        case "apply_async":
            name, args, kwargs, options = rest
            return app.tasks[name].apply_async(list(args), dict(kwargs), **_options(app, options))
        case "delay":
            name, args, kwargs = rest
            return app.tasks[name].delay(*args, **kwargs)
        case "signature":
            recipe, args, kwargs, options = rest
            return build(app, recipe).apply_async(tuple(args), dict(kwargs), **_options(app, options))
        case "signature delay":
            recipe, args, kwargs = rest
            return build(app, recipe).delay(*args, **kwargs)
        case "control":
            if rest[0] == "revoke":
                return app.control.revoke(["a", "b"], terminate=True, signal="SIGKILL")
            if rest[0] == "rate_limit":
                return app.control.rate_limit("add", "10/m", destination=["one@host"])
            return app.control.broadcast("shutdown", arguments={"x": 1}, pattern="*", matcher="glob")
    raise AssertionError(kind)


def _options(app, options):
    options = make(options)
    if "link" in options:
        options["link"] = [build(app, recipe) for recipe in options["link"]]
    if "link_error" in options:
        options["link_error"] = build(app, options["link_error"])
    return options
