"""An inert instance of the app's own backend class: pure code runs, I/O is recorded or refused.

It never subscribes and never keeps a result object; key names, encodings, chord and group layouts are
those of the Celery that is installed.
"""

from __future__ import annotations

from inspect import getattr_static
from typing import TYPE_CHECKING, Any, NoReturn

from celery.backends.base import DisabledBackend

from .._operations import Write
from ..errors import ResultNotKept, WouldBlock
from ._scope import recorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

__all__ = ["inert_backend", "own_backend", "quieten"]

#: Methods of a backend that read or wait.
_READS = (
    "wait_for",
    "wait_for_pending",
    "iter_native",
    "get_many",
    "get_task_meta",
    "get_group_meta",
    "restore_group",
    "get_state",
    "get_result",
    "get_traceback",
    "get_children",
    "reload_task_result",
    "reload_group_result",
)


class _InertConsumer:
    """Stands where a result consumer stands: nothing is consumed, so there is nothing to start or cancel."""

    buckets: dict[Any, Any] = {}  # noqa: RUF012  # always empty

    def nothing(self, *args: object, **kwargs: object) -> None:
        """Do nothing."""

    start = stop = consume_from = cancel_for = on_after_fork = _after_fork = nothing


class _RecordingRedis:
    """The redis-py methods that Celery's Redis backend writes with, recorded as commands."""

    def __init__(
        self,
        app: Any,
        outside: Callable[[Write], object],
        transaction: list[tuple[Any, ...]] | None = None,
    ) -> None:
        self._app = app
        self._outside = outside
        self._transaction = transaction

    def _write(self, *command: object) -> None:
        if self._transaction is not None:
            self._transaction.append(command)
        else:
            self._record(Write([command]))

    def _record(self, write: Write) -> None:
        found = recorder(self._app)
        if found is None:
            self._outside(write)
        else:
            found.operations.append(write)

    def set(self, name: str, value: object, ex: int | None = None, **kwargs: object) -> None:
        if kwargs:
            raise WouldBlock(f"SET with {', '.join(kwargs)} cannot be recorded")
        expiry = ("EX", int(ex)) if ex else ()
        self._write("SET", name, value, *expiry)

    def setex(self, name: str, time: int, value: object) -> None:
        self._write("SETEX", name, int(time), value)

    def delete(self, *names: str) -> None:
        self._write("DEL", *names)

    def incr(self, name: str, amount: int = 1) -> None:
        self._write("INCRBY", name, amount)

    def expire(self, name: str, time: int) -> None:
        self._write("EXPIRE", name, int(time))

    def publish(self, channel: str, message: object) -> None:
        self._write("PUBLISH", channel, message)

    def pipeline(self, transaction: bool = True, **kwargs: object) -> _RecordingPipeline:
        return _RecordingPipeline(self._app, self._outside, transaction)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise WouldBlock(
            f"the result backend would have to run {name.upper()} and wait for its answer; read results through the "
            "Deferreds of twistedcelery's AsyncResult"
        )


class _RecordingPipeline(_RecordingRedis):
    """Commands that are performed together."""

    def __init__(self, app: Any, outside: Callable[[Write], object], transaction: bool) -> None:
        super().__init__(app, outside, [])
        self._atomic = transaction

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def execute(self) -> list[object]:
        commands, self._transaction = self._transaction or [], []
        if commands:
            self._record(Write(commands, transaction=self._atomic))
        return [None] * len(commands)


def _refuse_outside(write: Write) -> NoReturn:
    raise WouldBlock("a recording result backend was used outside the call that it was made for")


def _refusal(method: str) -> Callable[..., NoReturn]:
    instead = "wait for the Deferred that the call returned, or use TwistedCelery.AsyncResult(task_id)"
    if "group" in method:
        instead = "use TwistedCelery.restore_group(group_id), which returns a Deferred"

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise WouldBlock(
            f"{method}() of Celery's backend waits for the network and would stop the reactor; {instead}"
        )

    return refuse


def _refuse_unkept(*args: object, **kwargs: object) -> NoReturn:
    raise ResultNotKept("this app has no result backend, its results go nowhere; set result_backend")


def _silence(app: Any) -> dict[str, Any]:
    """What takes the place of a backend's methods that subscribe and keep result objects."""

    def pending(result: Any, *args: object, **kwargs: object) -> Any:
        taking = recorder(app)
        if taking is not None and taking.pause is not None:
            taking.pause()
        return result

    return {
        "on_task_call": lambda producer, task_id: {},
        "add_pending_result": pending,
        "add_pending_results": lambda results, *args, **kwargs: [pending(result) for result in results],
        "remove_pending_result": pending,
        "on_result_fulfilled": lambda result: None,
    }


def inert_backend(app: Any, outside: Callable[[Write], object] = _refuse_outside) -> Any:
    """Make the app's own backend, and take its I/O away.

    ``outside`` gets what is written while nothing is being captured.

    Only for backends whose constructor does no I/O: rpc, redis, disabled and their relatives.
    """
    backend = app._get_backend()
    shadows = {**_silence(app), "result_consumer": _InertConsumer()}
    unkept = isinstance(backend, DisabledBackend)
    for name in _READS:
        if hasattr(type(backend), name):
            shadows[name] = _refuse_unkept if unkept else _refusal(name)
    if hasattr(type(backend), "client"):
        shadows["client"] = _RecordingRedis(app, outside)
    vars(backend).update(shadows)
    return backend


def own_backend(task: Any) -> Any:
    """Return the backend that a task was given (``@app.task(backend=...)``), or None for the app's."""
    given = getattr_static(type(task), "backend", None)
    return task._backend if given is None or isinstance(given, property) else given


def quieten(app: Any, backend: Any) -> None:
    """Keep a task's own backend, which stays stock, from I/O within a capture of the app's calls."""
    mine = vars(backend)
    if "_twistedcelery_quiet" in mine:
        return
    mine["_twistedcelery_quiet"] = True
    silences = {**_silence(app), **{name: _refusal(name) for name in _READS}}
    for name, silence in silences.items():
        stock = getattr(backend, name, None)
        if stock is not None:
            mine[name] = _in_scope(app, silence, stock)


def _in_scope(app: Any, silence: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        return (stock if recorder(app) is None else silence)(*args, **kwargs)

    return dispatch
