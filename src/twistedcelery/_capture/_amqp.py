"""An app's AMQP object, in scope: messages are made and sent by the app's own code and Celery's, and recorded.

The app may have a class of its own (``Celery(amqp=...)``), may have put a wrapper around ``send_task_message`` or
``create_task_message``, and may do so at any time. So nothing is put there: the object's class is exchanged for a subclass
that is asked first, and outside a capture gives what the object has.
"""

from __future__ import annotations

from contextvars import copy_context
from functools import partial
from inspect import getattr_static
from typing import TYPE_CHECKING, Any

from celery.app.amqp import AMQP
from celery.exceptions import ImproperlyConfigured
from kombu.messaging import Producer

from ._embedded import embedded, redirect
from ._producer import CaptureProducer
from ._scope import TaskMessage, recorder
from ._signals import failing

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

__all__ = ["recording_amqp"]


def recording_amqp(app: Any, amqp: Any, elsewhere: AbstractSet[str]) -> None:
    """Have an app's AMQP object record in scope. ``elsewhere``: tasks whose results go elsewhere than this app's results."""
    stock = type(amqp)
    events = _Events(app, stock)
    attributes = {
        "send_task_message": _Attribute(app, stock, _Sending(app, elsewhere)),
        "create_task_message": _Attribute(app, stock, _Making(app)),
        "_event_dispatcher": events,
    }
    names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    metaclass: Any = type(stock)
    asked_first = metaclass(stock.__name__, (stock,), {**names, **attributes, "__slots__": ()})
    object.__setattr__(amqp, "__class__", asked_first)
    if "_event_dispatcher" in vars(amqp):
        events.found(vars(amqp)["_event_dispatcher"])


class _Attribute:
    """An attribute of one object as its own class has it; in scope, what ``within(it)`` makes of it."""

    def __init__(self, app: Any, stock: type, within: Callable[[Any], Any]) -> None:
        self._app = app
        self._stock = stock
        self._within = within

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner = owner
        self._name = name

    def __get__(self, amqp: Any, owner: type) -> Any:
        name = self._name
        if amqp is None:
            return getattr(self._stock, name)
        own = vars(amqp)
        stock = own[name] if name in own else getattr(super(self._owner, amqp), name)
        return stock if recorder(self._app) is None else self._within(stock)

    def __set__(self, amqp: Any, value: object) -> None:
        stock = getattr_static(self._stock, self._name)
        if hasattr(stock, "__set__"):
            stock.__set__(amqp, value)
        else:
            vars(amqp)[self._name] = value

    def __delete__(self, amqp: Any) -> None:
        stock = getattr_static(self._stock, self._name)
        if hasattr(stock, "__delete__"):
            stock.__delete__(amqp)
        elif vars(amqp).pop(self._name, self) is self:
            raise AttributeError(self._name)


class _Events(_Attribute):
    """The dispatcher of ``task-sent`` events. Celery's sender keeps it, so it is asked first itself."""

    def __init__(self, app: Any, stock: type) -> None:
        super().__init__(app, stock, lambda events: events)
        self._found: Any = None

    def __get__(self, amqp: Any, owner: type) -> Any:
        events = super().__get__(amqp, owner)
        if amqp is not None and events is not self._found:
            self.found(events)
        return events

    def found(self, events: Any) -> None:
        """Have a dispatcher's ``publish`` leave it, in scope, to one of our own: it holds a lock while it publishes."""
        self._found = events
        app, stock = self._app, events.publish
        recording: Callable[..., Any] | None = None

        def publish(*args: Any, **kwargs: Any) -> Any:
            nonlocal recording
            if recorder(app) is None:
                return stock(*args, **kwargs)
            if recording is None:
                recording = app.events.Dispatcher(enabled=False, buffer_while_offline=False).publish
            return recording(*args, **kwargs)

        vars(events)["publish"] = publish


class _Sending:
    """``send_task_message`` in scope."""

    def __init__(self, app: Any, elsewhere: AbstractSet[str]) -> None:
        self._app = app
        self._elsewhere = elsewhere

    def __call__(self, send: Callable[..., Any]) -> Callable[..., Any]:
        return partial(self._send, send)

    def _send(
        self,
        send: Callable[..., Any],
        producer: Any,
        name: str,
        message: Any,
        **options: Any,
    ) -> Any:
        """Have a message recorded by the app's own sender, in a context of the message's own."""
        taking = recorder(self._app)
        if taking is None:
            # A wrapper that was made in scope has kept this.
            return send(producer, name, message, **options)
        if isinstance(producer, Producer) and not isinstance(producer, CaptureProducer):
            # An own ``producer_or_acquire``, or ``producer_pool``, lends what it likes.
            raise TypeError(
                f"{producer!r} is kombu's and blocks; in calls from Twisted the app's producer_or_acquire() has to lend what "
                "app.amqp.producer_pool lends"
            )
        headers, properties, body, _ = message
        silent = headers.get("ignore_result")
        if name in self._elsewhere and not silent:
            raise ImproperlyConfigured(
                f"task {name} has a backend= of its own, its result would not come to this app's result backend; "
                "call it with ignore_result=True"
            )
        aside = taking.redirect
        if aside is not None:
            redirect(properties, *aside)
        for signature in embedded(body):
            its_options = signature.get("options") or {}
            if aside is not None:
                redirect(its_options, *aside)
            if _answers_nothing(self._app, signature["task"], its_options):
                taking.ignored.add(its_options.get("task_id"))
        making = TaskMessage(properties, copy_context())
        if silent:
            taking.ignored.add(making.task_id)
        outer, taking.task_message = taking.task_message, making
        try:
            return making.context.run(send, producer, name, message, **options)
        except Exception as error:
            if making.reached and making.sent is None:
                failed = failing(self._app, name, body, headers, making)
                if failed is not None:
                    failed(exception=error)
            raise
        finally:
            taking.task_message = outer
            if making.sent is not None:
                making.sent.failed = failing(self._app, name, body, headers, making)


class _Making:
    """``create_task_message`` in scope: Celery's is told how it would represent empty keyword arguments.

    Celery's ``saferepr`` takes longer for them than the whole message takes to be encoded.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._known: dict[object, str] = {}
        #: Whether the levels of representations are a setting: since Celery 5.7.
        self._levels = "task_repr_maxlevels" in app.conf

    def __call__(self, make: Callable[..., Any]) -> Callable[..., Any]:
        if getattr(make, "__func__", None) is AMQP.as_task_v2:
            return partial(self._make, make)
        return make

    def _make(
        self,
        make: Any,
        task_id: str,
        name: str,
        args: Any = None,
        kwargs: Any = None,
        *rest: Any,
        **options: Any,
    ) -> Any:
        if not kwargs and "kwargsrepr" not in options:
            # All that it depends on.
            key = (
                make.__self__.kwargsrepr_maxsize,
                self._app.conf.task_repr_maxlevels if self._levels else None,
            )
            known = self._known.get(key)
            if known is None:
                known = self._known[key] = make(task_id, name).headers["kwargsrepr"]
            options["kwargsrepr"] = known
        return make(task_id, name, args, kwargs, *rest, **options)


def _answers_nothing(app: Any, name: str, options: dict[str, Any]) -> bool:
    """Whether a task that is called by a signature has ``ignore_result``, as far as this side knows it."""
    asked = options.get("ignore_result")
    if asked is not None:
        return bool(asked)
    task = app._tasks.get(name)
    return task is not None and bool(task.ignore_result)
