"""Real servers and workers for the tests: RabbitMQ, Redis, Redis Sentinel and ``celery worker``.

Each has its own directory and ports and is ended with this process (``processes.py``). ``start``, ``stop``, ``kill`` and
``restart`` block and may be called from any thread, so that a test can hand them to ``deferToThread``.

`rabbitmq`, `redis` and `worker` give those that the whole run shares, `vhost` and `database` a part of them that has a name.
Whoever kills a server starts one of their own.
"""

from __future__ import annotations

import threading
import time
from functools import cache
from typing import TYPE_CHECKING

from .rabbitmq import RabbitMQ
from .redis import Redis, Sentinel
from .server import Server
from .worker import PROJECT, Worker

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = [
    "PROJECT",
    "RabbitMQ",
    "Redis",
    "Sentinel",
    "Server",
    "Worker",
    "database",
    "rabbitmq",
    "redis",
    "vhost",
    "wait_for_file",
    "worker",
]

_shared_lock = threading.RLock()
_rabbitmq: list[RabbitMQ] = []
_redis: list[Redis] = []
_workers: dict[tuple[str, tuple[str, ...]], Worker] = {}


def rabbitmq() -> RabbitMQ:
    """The RabbitMQ that the run shares, with TLS; started by the first call, about 6 s."""
    with _shared_lock:
        if not _rabbitmq:
            server = RabbitMQ(tls=True)
            server.start()
            _rabbitmq.append(server)
        return _rabbitmq[0]


def redis() -> Redis:
    """The Redis that the run shares, with TLS; started by the first call."""
    with _shared_lock:
        if not _redis:
            server = Redis(tls=True)
            server.start()
            _redis.append(server)
        return _redis[0]


@cache
def vhost(name: str) -> str:
    """The URL of the virtual host of this name of the shared RabbitMQ; made by the first call."""
    return rabbitmq().add_vhost(name)


@cache
def database(name: str) -> str:
    """The URL of the database of this name of the shared Redis: the same for the same name, else another."""
    return redis().add_database()


def worker(broker: str, backend: str, *, queues: Sequence[str] = ("celery",)) -> Worker:
    """The worker that the run shares for these queues of this broker; started by the first call, about 1 s.

    Two workers with different backends must not take from the same queue: give one of them a virtual host
    (`vhost`), a database (`database`) or a queue of its own.
    """
    with _shared_lock:
        key = (broker, tuple(sorted(queues)))
        for (other, names), there in _workers.items():
            if other == broker and (names, there.backend) != (key[1], backend) and set(names) & set(queues):
                raise ValueError(f"{names} of this broker are already served for {there.backend}")
        if key not in _workers:
            new = Worker(broker, backend, queues=queues)
            new.start()
            _workers[key] = new
        return _workers[key]


def wait_for_file(path: Path, lines: int, timeout: float = 30.0) -> list[str]:
    """Wait until a file that ``tests.record`` appends to has so many lines; returns what it has then."""
    deadline = time.monotonic() + timeout
    while True:
        found = path.read_text().splitlines() if path.exists() else []
        if len(found) >= lines or time.monotonic() > deadline:
            return found
        time.sleep(0.02)
