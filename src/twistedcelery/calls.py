"""Two ways in which people call Celery from Twisted today, kept alive by a change of import."""

from __future__ import annotations

from functools import update_wrapper
from typing import TYPE_CHECKING, Any

from celery import Task
from celery.local import PromiseProxy, Proxy

from ._reactor_scope import on_reactor_thread
from .app import TwistedCelery

if TYPE_CHECKING:
    from celery import Celery

    from .results import TaskDeferred

__all__ = ["DeferrableTask", "send_task"]


def _twisted(app: Celery) -> TwistedCelery:
    """Return the one TwistedCelery of an app that these two share."""
    own = getattr(type(app), "twisted", None)
    if own is not None:
        found: TwistedCelery = app.twisted
        return found
    # Kept by the app itself, so that both go together.
    kept = vars(app)
    if "_twistedcelery" not in kept:
        kept["_twistedcelery"] = TwistedCelery(app)
    shared: TwistedCelery = kept["_twistedcelery"]
    return shared


def send_task(
    app: Celery, name: str, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any
) -> TaskDeferred:
    """Call a task of an app by the task's name.

    ``yield send_task(app, "proj.add", args=(1, 2))`` is the same as ``TwistedCelery(app).send_task(...)``, with one TwistedCelery kept for each app.
    """
    return _twisted(app).send_task(name, args, kwargs, *rest, **options)


class DeferrableTask:
    """txCelery's decorator: above ``@app.task``, it makes ``delay`` and ``apply_async`` return Deferreds.

    ::

        @DeferrableTask
        @app.task
        def add(x, y): ...

        result = yield add.delay(1, 2)

    Everything else is the task's own, so that a worker runs it as before. Where the reactor does not run (in a worker, in another
    thread) these are the task's own as well.

    :raises TypeError: for what is no task; the order of the decorators matters.
    """

    def __init__(self, task: Task) -> None:
        # Not isinstance, which would make the task now: Celery does when the app is finalized, configured by then.
        if not issubclass(type(task), (Proxy, Task)):
            raise TypeError(f"DeferrableTask takes a task, not {task!r}; write it above @app.task")
        self.task = task
        if type(task) is PromiseProxy:
            task.__then__(self._wrap)
        elif type(task) is not Proxy:
            self._wrap()

    def _wrap(self) -> None:
        update_wrapper(self, self.task, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task's function here and now, as Celery does."""
        return self.task(*args, **kwargs)

    def delay(self, *args: Any, **kwargs: Any) -> Any:
        """Call the task with these arguments."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self, args: Any = None, kwargs: Any = None, task_id: str | None = None, **options: Any
    ) -> Any:
        """Call the task, with any option of Celery's ``apply_async``."""
        if not on_reactor_thread():
            return self.task.apply_async(args, kwargs, task_id, **options)
        return _twisted(self.task.app).apply_async(self.task, args, kwargs, task_id=task_id, **options)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task here and now; the result is a Deferred that has fired."""
        result = self.task.apply(*args, **kwargs)
        if not on_reactor_thread():
            return result
        return _twisted(self.task.app).engine.caller.ran(result)

    def AsyncResult(self, task_id: str) -> Any:  # Celery's name
        """Wait for a task that was called before, by whomever."""
        if not on_reactor_thread():
            return self.task.AsyncResult(task_id)
        return _twisted(self.task.app).engine.caller.waiting_for(task_id)

    def __getattr__(self, name: str) -> Any:
        if name == "task":
            # While it is being copied.
            raise AttributeError(name)
        return getattr(self.task, name)

    def __repr__(self) -> str:
        return f"<DeferrableTask {self.task!r}>"
