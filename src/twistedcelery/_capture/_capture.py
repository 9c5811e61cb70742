"""`Capture`: run one of Celery's calls and return its operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery import _state
from kombu.common import oid_from

from .._operations import not_sent
from ._options import celery_options
from ._producer import CaptureConnection, CaptureProducer
from ._scope import Pauses, Recorder, reset_recorder, set_recorder
from ._seam import Seam

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._operations import Operation

__all__ = ["Capture", "Captured"]

_missing = object()


@dataclass(slots=True, eq=False)
class Captured:
    """What a call would have sent, and what Celery returned for it."""

    operations: list[Operation]
    #: Celery's AsyncResult, GroupResult or EagerResult, to be read for its structure only.
    result: Any
    #: The ids of its tasks that answer nothing (``ignore_result``).
    ignored: set[str | None]


class Capture:
    """Captures calls of one app.

    ``backend`` is the inert backend (`inert_backend`); ``reply_to`` the queue that rpc replies go to, or None
    where results come another way; ``properties`` the message properties of the broker's wire format, or None
    where it takes any.
    """

    def __init__(
        self,
        app: Any,
        *,
        backend: Any,
        reply_to: str | None = None,
        properties: frozenset[str] | None = None,
    ) -> None:
        self.app = app
        self.backend = backend
        self.reply_to = reply_to
        # Of this thread, which is the reactor's: signatures may have been frozen in it.
        thread_oid: Any = oid_from
        self._redirect = None if reply_to is None else (thread_oid(app, threads=True), reply_to)
        transport_cls = app.connection_for_write().get_transport_cls()
        #: kombu's producer, recording.
        connection = CaptureConnection(transport_cls, properties, celery_options())
        self.producer = CaptureProducer.make(app, connection)
        self._seam = Seam.of(app)

    def run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Captured:
        """Call ``call(*args, **kwargs)`` and take down what it would send.

        Whatever it raises is raised here, and nothing of it is sent. May be called in any thread, and within another capture. Each task's
        message has a context of its own, a copy of the caller's.
        """
        return self._run(None, call, args, kwargs)

    def run_beside(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Captured:
        """As `run`, in a thread beside the reactor's: pauses now and then, so that the reactor goes on ticking."""
        return self._run(Pauses(), call, args, kwargs)

    def _run(self, pause: Pauses | None, call: Callable[..., Any], args: Any, kwargs: Any) -> Captured:
        self._seam.install(self.backend)
        taking = Recorder(self.app, self.producer, self.backend, pause)
        taking.redirect = self._redirect
        try:
            result = self._record(taking, call, args, kwargs)
        except Exception as error:
            not_sent(taking.operations, error)
            raise
        return Captured(taking.operations, result, taking.ignored)

    def _record(self, taking: Recorder, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        token = set_recorder(taking)
        tls = _state._tls
        local = vars(self.app._local)
        backend, oid, current = local.get("backend", _missing), local.get("oid", _missing), tls.current_app
        local["backend"] = self.backend
        if self.reply_to is not None:
            local["oid"] = self.reply_to
        tls.current_app = self.app
        try:
            return call(*args, **kwargs)
        finally:
            tls.current_app = current
            _restore(local, "backend", backend)
            if self.reply_to is not None:
                _restore(local, "oid", oid)
            reset_recorder(token)
            taking.close()


def _restore(where: dict[str, Any], name: str, value: object) -> None:
    if value is _missing:
        del where[name]
    else:
        where[name] = value
