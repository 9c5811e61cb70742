"""Two ways in which people call Celery from Twisted today, kept alive by a change of import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def send_task(app: Celery, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> TaskDeferred:
    """Call a task of an app by the task's name.

    ``yield send_task(app, "proj.add", args=(1, 2))`` is the same as ``TwistedCelery(app).send_task(...)``, with one TwistedCelery kept for each app.
    """
    return _twisted(app).send_task(name, args, kwargs, **options)


class DeferrableTask:
    """txCelery's decorator: above ``@app.task``, it makes ``delay`` and ``apply_async`` return Deferreds.

    ::

        @DeferrableTask
        @app.task
        def add(x, y): ...

        result = yield add.delay(1, 2)

    Everything else is the task's own, so that a worker runs it as before.
    """

    def __init__(self, task: Any) -> None:
        self.task = task

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task's function here and now, as Celery does."""
        return self.task(*args, **kwargs)

    def delay(self, *args: Any, **kwargs: Any) -> TaskDeferred:
        """Call the task with these arguments."""
        return self.apply_async(args, kwargs)

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> TaskDeferred:
        """Call the task, with any option of Celery's ``apply_async``."""
        return _twisted(self.task.app).apply_async(self.task, args, kwargs, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def __repr__(self) -> str:
        return f"<DeferrableTask {self.task!r}>"
