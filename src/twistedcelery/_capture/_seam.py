"""The seams: the attributes of one app through which its calls are recorded, in scope, and go their stock way else.

They are replaced once per app by objects that ask on each use whether this is inside a capture: ``amqp._producer_pool``,
``_pool``, ``producer_or_acquire`` and ``amqp.send_task_message``; ``_backend_cache`` too, where the app shares one backend between threads
(``result_backend_thread_safe``). What Celery keeps per thread (the backend, the thread's oid, the current app) is
exchanged for the moment of the capture and put back.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from celery import Celery, signals
from celery.app.amqp import AMQP
from celery.exceptions import ImproperlyConfigured
from celery.local import Proxy

from .._operations import Local
from ._backend import own_backend, quieten
from ._conf import quicken
from ._embedded import embedded, redirect
from ._scope import recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Seam"]


class _Pool:
    """A pool that lends a recorder's producer or connection in scope, and is the stock pool else."""

    __slots__ = ("_app", "_lend", "_make_stock", "_stock")

    def __init__(self, app: Any, lend: Callable[[Any], Any], make_stock: Callable[[], Any]) -> None:
        self._app = app
        self._lend = lend
        self._make_stock = make_stock
        self._stock: Any = None

    @property
    def stock(self) -> Any:
        """The pool that Celery itself would use, made when first asked for."""
        if self._stock is None:
            self._stock = self._make_stock()
        return self._stock

    def acquire(self, block: bool = False, timeout: float | None = None) -> Any:
        """Lend."""
        taking = recorder(self._app)
        if taking is not None:
            return self._lend(taking)
        return self.stock.acquire(block=block, timeout=timeout)

    @property
    def connections(self) -> Any:
        """The connection pool behind a producer pool."""
        return self if recorder(self._app) is not None else self.stock.connections

    @property
    def connection(self) -> Any:
        """A connection, to ask for the transport's driver type."""
        taking = recorder(self._app)
        return taking.producer.connection if taking is not None else self.stock.connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in _Pool.__slots__:
            object.__setattr__(self, name, value)
        else:
            setattr(self.stock, name, value)


class _Without:
    """An object as it is, save one attribute: Celery's own properties make their stock value with it."""

    def __init__(self, whole: Any, name: str) -> None:
        self._whole = whole
        setattr(self, name, None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


class Seam:
    """One app's seams, shared by all who capture its calls.

    Making it changes nothing; `install` does, and may be called again at any time.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._amqp: Any = None
        self._producers = _Pool(app, _producer_of, self._stock_producers)
        self._connections = _Pool(app, _connection_of, self._stock_connections)
        self._shared: Any = Proxy(self._backend_here)
        self._stock_backend: Any = None
        self._lock = Lock()
        self._conf: Any = None
        self._tasks_seen = 0
        #: Tasks whose results go elsewhere than this app's results.
        self._elsewhere: set[str] = set()

    @classmethod
    def of(cls, app: Any) -> Seam:
        """Return the app's one seam."""
        seam: Seam = vars(app).setdefault("_twistedcelery_seam", cls(app))
        return seam

    def install(self, backend: Any) -> None:
        """Put the dispatching attributes in place; a fork or ``app.close()`` takes them away again."""
        app = self._app
        amqp = vars(app).get("amqp")
        if amqp is None or amqp is not self._amqp:
            amqp = self._install_once()
        if amqp._producer_pool is not self._producers:
            self._producers._stock, amqp._producer_pool = amqp._producer_pool, self._producers
        if app._pool is not self._connections:
            self._connections._stock, app._pool = app._pool, self._connections
        shared = app._backend_cache
        if shared is not self._shared and (shared is not None or backend.thread_safe):
            self._stock_backend, app._backend_cache = shared, self._shared
        if app._conf is not self._conf:
            self._conf = app.conf
            quicken(self._conf)
        if len(app._tasks) != self._tasks_seen:
            self._look_at_tasks(backend)

    def _install_once(self) -> Any:
        app = self._app
        if self._amqp is None:
            vars(app)["producer_or_acquire"] = self._dispatching_producer(app.producer_or_acquire)
        amqp = app.amqp
        vars(amqp)["send_task_message"] = self._dispatching_sender(amqp)
        if type(amqp).as_task_v2 is AMQP.as_task_v2:
            vars(amqp)["create_task_message"] = self._quick_maker(amqp)
        self._amqp = amqp
        return amqp

    # What is stock

    def _stock_connections(self) -> Any:
        return Celery.pool.fget(_Without(self._app, "_pool"))

    def _stock_producers(self) -> Any:
        return AMQP.producer_pool.fget(_Without(self._app.amqp, "_producer_pool"))

    def _backend_here(self) -> Any:
        taking = recorder(self._app)
        if taking is not None:
            return taking.backend
        if self._stock_backend is None:
            with self._lock:
                if self._stock_backend is None:
                    self._stock_backend = self._app._get_backend()
        return self._stock_backend

    def _look_at_tasks(self, backend: Any) -> None:
        """Find the tasks with a backend of their own: within a capture those must be silent too."""
        tasks = dict(self._app._tasks)
        self._tasks_seen = len(tasks)
        for name, task in tasks.items():
            own = own_backend(task)
            if own is None:
                continue
            quieten(self._app, own)
            same = type(own) is type(backend) and own.app is self._app and own.url == backend.url
            if not same:
                self._elsewhere.add(name)

    # What dispatches

    def _dispatching_producer(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        app = self._app

        def producer_or_acquire(producer: Any = None, *args: Any, **kwargs: Any) -> Any:
            taking = recorder(app)
            if taking is None:
                return stock(producer, *args, **kwargs)
            lent = taking.producer
            if producer is not None and producer is not lent:
                raise TypeError(
                    "connection=, producer= and publisher= are kombu's and block; leave them out of calls from Twisted"
                )
            return lent

        return producer_or_acquire

    def _quick_maker(self, amqp: Any) -> Callable[..., Any]:
        """Return Celery's maker of messages, told how it would represent empty keyword arguments.

        Celery's ``saferepr`` takes longer for them than the whole message takes to be encoded.
        """
        app = self._app
        stock: Callable[..., Any] | None = vars(amqp).pop("create_task_message", None)
        quick = levels = False
        known: dict[object, str] = {}

        def create_task_message(
            task_id: str, name: str, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any
        ) -> Any:
            nonlocal stock
            nonlocal quick, levels
            if stock is None:
                stock = AMQP.create_task_message.func(amqp)
                quick = stock == amqp.as_task_v2
                levels = "task_repr_maxlevels" in app.conf
            if quick and not kwargs and "kwargsrepr" not in options:
                # All that it depends on; the levels are a setting since Celery 5.7.
                key = amqp.kwargsrepr_maxsize, app.conf.task_repr_maxlevels if levels else None
                if key not in known:
                    known[key] = stock(task_id, name).headers["kwargsrepr"]
                options["kwargsrepr"] = known[key]
            return stock(task_id, name, args, kwargs, *rest, **options)

        return create_task_message

    def _dispatching_sender(self, amqp: Any) -> Callable[..., Any]:
        app = self._app
        elsewhere = self._elsewhere
        # Celery builds its closure, which needs the default queue, when the first task is sent; so do we.
        stock: Callable[..., Any] | None = vars(amqp).pop("send_task_message", None)
        recording: Callable[..., Any] | None = None

        def send_task_message(producer: Any, name: str, message: Any, **options: Any) -> Any:
            nonlocal stock, recording
            taking = recorder(app)
            if taking is None:
                if stock is None:
                    stock = amqp._create_task_sender()
                return stock(producer, name, message, **options)
            if recording is None:
                recording = _recording_sender(amqp)
            if name in elsewhere and not message.headers.get("ignore_result"):
                raise ImproperlyConfigured(
                    f"task {name} has a backend= of its own, its result would not come to this app's result backend; "
                    "call it with ignore_result=True"
                )
            aside = taking.redirect
            if aside is not None:
                redirect(message.properties, *aside)
            for signature in embedded(message):
                its_options = signature.get("options") or {}
                if aside is not None:
                    redirect(its_options, *aside)
                if _answers_nothing(app, signature["task"], its_options):
                    taking.ignored.add(its_options.get("task_id"))
            # Both protocols set it; headers and body may be changed by receivers of before_task_publish.
            task_id = message.properties.get("correlation_id")
            if message.headers.get("ignore_result"):
                taking.ignored.add(task_id)
            outer = taking.headers, taking.sent
            taking.headers, taking.sent = message.headers, None
            try:
                recording(producer, name, message, **options)
                sent = taking.sent
                assert sent is not None
                sent.task_id = task_id
            finally:
                taking.headers, taking.sent = outer
            return None

        return send_task_message


def _answers_nothing(app: Any, name: str, options: dict[str, Any]) -> bool:
    """Whether a task that is called by a signature has ``ignore_result``, as far as this side knows it."""
    asked = options.get("ignore_result")
    if asked is not None:
        return bool(asked)
    task = app._tasks.get(name)
    return task is not None and bool(task.ignore_result)


def _producer_of(taking: Any) -> Any:
    return taking.producer


def _connection_of(taking: Any) -> Any:
    return taking.producer.connection


def _recording_sender(amqp: Any) -> Callable[..., Any]:
    """Build Celery's own sender closure, with signals that wait for the confirm and a dispatcher of its own.

    The closure binds the signals' ``send`` when it is built, so they are shadowed for that moment only; the
    shared event dispatcher holds a lock while it publishes, so a second one is put in its place likewise.
    """
    app = amqp.app
    events = app.events.Dispatcher(enabled=False, buffer_while_offline=False)
    with (
        _shadowed(signals.after_task_publish, "send", _after_confirm(app, signals.after_task_publish)),
        _shadowed(signals.task_sent, "send", _after_confirm(app, signals.task_sent)),
        _shadowed(amqp, "_event_dispatcher", events),
    ):
        sender: Callable[..., Any] = amqp._create_task_sender()
        return sender


def _after_confirm(app: Any, signal: Any) -> Callable[..., None]:
    send = signal.send

    def record(sender: Any, **named: Any) -> None:
        taking = recorder(app)
        if taking is None:
            # Another thread publishes in the moment in which the closure is being built.
            send(sender, **named)
        elif signal.receivers:
            taking.follow(Local(partial(send, sender, **named)))

    return record


@contextmanager
def _shadowed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object an attribute of its own for a moment."""
    missing = object()
    before = vars(owner).get(name, missing)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if before is missing:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before
