"""A Celery worker for the tests."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .server import Server

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["PROJECT", "Worker"]

#: The directory that ``tests.support.tasks`` can be imported from.
PROJECT = Path(__file__).resolve().parents[2]


class Worker(Server):
    """A real ``celery worker`` of ``tests/support/tasks.py``.

    Args:
        broker: the URL of its broker.
        backend: the URL of its result backend (``rpc://`` or a Redis URL).
        pool: ``threads``, ``solo`` or ``prefork`` (which alone can terminate a running task).
        concurrency: how many tasks it runs at a time.
        queues: the queues that it takes tasks from.
        settings: Celery settings, as JSON can hold them.
        arguments: more of the command line, ``--task-events`` for example.
        module: which app it runs.

    """

    def __init__(
        self,
        broker: str,
        backend: str,
        *,
        pool: str = "threads",
        concurrency: int = 8,
        queues: Sequence[str] = ("celery",),
        settings: Mapping[str, Any] | None = None,
        arguments: Sequence[str] = (),
        module: str = "tests.support.tasks",
    ) -> None:
        super().__init__()
        self.broker = broker
        self.backend = backend
        self.pool = pool
        self.concurrency = concurrency
        self.queues = tuple(queues)
        self.settings = dict(settings or {})
        self.arguments = list(arguments)
        self.module = module
        self.hostname = f"{self.path.name}@{os.getpid()}"
        self._ready = self.path / "ready"

    def _command(self) -> tuple[list[str], dict[str, str]]:
        self._ready.unlink(missing_ok=True)
        env = {
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "BROKER": self.broker,
            "BACKEND": self.backend,
            "SETTINGS": json.dumps(self.settings),
            "READY": str(self._ready),
            "C_FORCE_ROOT": "1",  # pickle is accepted in some tests, and a container runs as root
        }
        command = [sys.executable, "-m", "celery", "-A", self.module, "worker"]
        command += ["--pool", self.pool, "--concurrency", str(self.concurrency), "--hostname", self.hostname]
        command += ["--queues", ",".join(self.queues), "--loglevel", "WARNING"]
        command += ["--without-gossip", "--without-mingle", *self.arguments]
        return command, env

    def _is_ready(self) -> bool:
        return self._ready.exists()
