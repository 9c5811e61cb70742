"""The app of ``tasks.py``, for workers that also take what is broadcast to "everybody"."""

from __future__ import annotations

from kombu.common import Broadcast
from kombu.entity import Queue

from tests.support.tasks import app

__all__ = ["app"]

app.conf.task_queues = [Queue("celery"), Broadcast("everybody")]
