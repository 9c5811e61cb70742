"""The seams: the attributes of one app through which its calls are recorded, in scope, and go their stock way else.

They are replaced once per app by objects that ask on each use whether this is inside a capture: ``amqp._producer_pool``,
``_pool`` and ``producer_or_acquire``; ``_backend_cache`` too, where the app shares one backend between threads
(``result_backend_thread_safe``). ``amqp`` itself, with what the app has put into it, stays what it is, see `_amqp`. What Celery keeps per
thread (the backend, the thread's oid, the current app) is exchanged for the moment of the capture and put back.
"""

from __future__ import annotations

from threading import Lock, RLock
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.app.amqp import AMQP
from celery.local import Proxy

from ._amqp import recording_amqp
from ._backend import own_backend, quieten
from ._conf import quicken
from ._scope import recorder
from ._signals import postpone_signals

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Seam"]

#: Whose ``producer_or_acquire`` lends what the pool lends: Celery's, and the drop-in's.
_LENDERS = {"celery.app.base", f"{__package__.partition('.')[0]}.dropin"}


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
        self._installing = RLock()
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
        if (
            amqp is None
            or amqp is not self._amqp
            or amqp._producer_pool is not self._producers
            or app._pool is not self._connections
        ):
            with self._installing:
                self._install()
        shared = app._backend_cache
        if shared is not self._shared and (shared is not None or backend.thread_safe):
            self._stock_backend, app._backend_cache = shared, self._shared
        if app._conf is not self._conf:
            self._conf = app.conf
            quicken(self._conf)
        if len(app._tasks) != self._tasks_seen:
            self._look_at_tasks(backend)

    def _install(self) -> None:
        """Put in place what is not; another thread may just have done so."""
        app = self._app
        if self._amqp is None:
            vars(app)["producer_or_acquire"] = self._dispatching_producer(app.producer_or_acquire)
            postpone_signals()
        amqp = app.amqp
        if amqp is not self._amqp:
            recording_amqp(app, amqp, self._elsewhere)
            self._amqp = amqp
        if amqp._producer_pool is not self._producers:
            self._producers._stock, amqp._producer_pool = amqp._producer_pool, self._producers
        if app._pool is not self._connections:
            self._connections._stock, app._pool = app._pool, self._connections

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
        # An app's own code is asked in scope too, and has the pool to ask.
        own = "producer_or_acquire" in vars(app) or _origin(app, "producer_or_acquire") not in _LENDERS

        def producer_or_acquire(producer: Any = None, *args: Any, **kwargs: Any) -> Any:
            taking = recorder(app)
            if taking is None:
                return stock(producer, *args, **kwargs)
            if own:
                return stock(producer, *args, **kwargs)
            lent = taking.producer
            if producer is not None and producer is not lent:
                raise TypeError(
                    "connection=, producer= and publisher= are kombu's and block; leave them out of calls from Twisted"
                )
            return lent

        return producer_or_acquire


def _origin(thing: Any, name: str) -> str:
    """Return the module of the class that an object has an attribute from."""
    return next(one.__module__ for one in type(thing).__mro__ if name in vars(one))


def _producer_of(taking: Any) -> Any:
    return taking.producer


def _connection_of(taking: Any) -> Any:
    return taking.producer.connection
