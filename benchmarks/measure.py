"""What every client of the benchmarks measures with, and how it is told what to do."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import Celery

from tests.support.case import Ticker

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "ARGUMENTS",
    "TASK",
    "Order",
    "Ticks",
    "all_in_flight",
    "best_of",
    "make_app",
    "report",
    "resident",
]

TASK = "benchmarks.add"
ARGUMENTS = (1, 2)

#: Seconds of a collection from which on a tick that comes after it counts as held up by it.
LONG_COLLECTION = 0.001


@dataclass(frozen=True)
class Order:
    """What a client shall do; it travels as JSON on the client's command line.

    Attributes:
        broker, backend: the URLs.
        answered: the queue that the responder answers; ``unanswered`` one that nobody reads.
        responder: the process id of the responder.
        calls: how many are in flight at once; ``rounds`` how often, of which the best counts.
        pending: how many results stay pending.
        size: bytes of a big argument.
        profile: whether to print where the time of a round trip goes.

    """

    broker: str
    backend: str
    answered: str
    unanswered: str
    responder: int
    calls: int
    rounds: int = 3
    pending: int = 0
    size: int = 0
    profile: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls) -> Order:
        return cls(**json.loads(sys.argv[1]))


def make_app(order: Order, queue: str, **settings: Any) -> Celery:
    """Make an app whose tasks go to this queue."""
    app = Celery("benchmarks", broker=order.broker, backend=order.backend)
    app.conf.update(task_default_queue=queue, **settings)
    return app


def report(**numbers: float | None) -> None:
    """Say the results: the last line of what a client prints."""
    print(json.dumps(numbers), flush=True)


@contextmanager
def all_in_flight(order: Order) -> Iterator[None]:
    """Let the responder sleep: what is called meanwhile is answered afterwards, all at once."""
    os.kill(order.responder, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(order.responder, signal.SIGCONT)


def best_of(rounds: list[float], calls: int) -> float:
    """Microseconds per call, from the seconds of each round. The machine's other work only ever adds."""
    return min(rounds) / calls * 1e6


def resident() -> int:
    """Bytes of memory that this process occupies."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Ticks(Ticker):
    """A ticker that also knows what made its ticks late.

    Attributes:
        worst_own: as ``worst``, where a tick is no later than the CPU time that this process has used since the tick
            before: the rest is the fault of other processes on the machine.
        worst_alone: as ``worst_own``, without the ticks that a collection of a millisecond or more had held up.

    """

    def __init__(self, reactor: Any) -> None:
        super().__init__(reactor)
        self.worst_own = self.worst_alone = 0.0
        self._held_up = self._collects = False
        self._used = 0.0

    def start(self) -> Ticks:
        self.worst_own = self.worst_alone = 0.0
        super().start()
        return self

    def _next(self) -> None:
        self._held_up = False
        self._used = time.process_time()
        super()._next()

    def _tick(self) -> None:
        own = min(self._reactor.seconds() - self._due, time.process_time() - self._used)
        self.worst_own = max(self.worst_own, own)
        # A collection in another thread: its end may not have been told yet.
        if not self._held_up and not self._collects:
            self.worst_alone = max(self.worst_alone, own)
        super()._tick()

    def _collecting(self, phase: str, info: dict[str, int]) -> None:
        self._collects = phase == "start"
        super()._collecting(phase, info)
        if phase == "stop" and self._reactor.seconds() - self._began >= LONG_COLLECTION:
            self._held_up = True

    def seen(self, what: str) -> dict[str, float]:
        """All of it by name, for `report`."""
        return {
            f"{what}_tick": self.worst,
            f"{what}_own": self.worst_own,
            f"{what}_alone": self.worst_alone,
            f"{what}_collection": self.worst_collection,
        }
