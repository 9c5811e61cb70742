"""A broker and a result source in the hand of a test, and a TwistedCelery on top of them."""

from __future__ import annotations

from math import inf
from typing import Any

from celery import Celery
from twisted.internet.defer import succeed
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery import TwistedCelery, _engine
from twistedcelery._capture import amqp_properties, inert_backend
from twistedcelery._rooms import Rooms
from twistedcelery.errors import ConnectionLost, ServerUnreachable

__all__ = ["EngineTestCase", "FakeBroker", "FakeSource"]


class FakeBroker:
    url = "amqp://broker"

    def __init__(self):
        self.ready = self.connected = False
        self.published = []
        #: Names of messages that have to be declared first, with who is to be told.
        self.undeclared = set()
        self.declaring = []
        #: Publishes until the transport's buffer is full.
        self.room = inf
        self.connects = 0
        self.stopped = None

    def listen(self, listener):
        self.listener = listener

    def connect(self):
        self.connects += 1

    def prepare(self, message, done):
        if message.routing_key in self.undeclared:
            self.declaring.append(done)
            return False
        return True

    def publish(self, message):
        self.published.append(message)
        self.room -= 1
        if not self.room:
            self.ready = False

    def stop(self, timeout):
        self.stopped = timeout
        self.lose()
        return succeed(None)

    # What the test does

    def up(self):
        self.ready = self.connected = True
        self.room = inf
        self.listener.broker_ready()

    def confirm(self, *names):
        for message in [one for one in self.published if not names or one.routing_key in names]:
            self.outcome(message, None)

    def outcome(self, message, error):
        self.published.remove(message)
        self.listener.published(message, error)

    def lose(self):
        self.ready = self.connected = False
        for message in list(self.published):
            self.outcome(message, ConnectionLost("cut"))

    def fail(self, error=None):
        self.listener.broker_unavailable(error or ServerUnreachable("refused"))

    @property
    def names(self):
        return [message.routing_key for message in self.published]


class FakeSource:
    url = "amqp://broker"
    rereadable = False

    def __init__(self):
        self.ready = True
        self.waiting = []
        self.writes = []
        self.watched = set()
        self.forgotten = []
        self.stopped = None

    def listen(self, listener):
        self.listener = listener

    def prepare(self, done):
        if not self.ready:
            self.waiting.append(done)
        return self.ready

    def write(self, write, done):
        self.writes.append((write, done))

    def watch(self, task_id):
        self.watched.add(task_id)

    def unwatch(self, task_id):
        self.watched.remove(task_id)

    def forget(self, task_id):
        self.forgotten.append(task_id)
        return succeed(None)

    def hand_over(self, timeout):
        return succeed(None)

    def stop(self, timeout):
        self.stopped = timeout
        return succeed(None)

    # What the test does

    def bring(self, task_id, status="SUCCESS", result=None, **more):
        meta = {"task_id": task_id, "status": status, "result": result, "traceback": None, **more}
        self.listener.meta_received(meta)


class Reactor(MemoryReactorClock):
    """Runs, as far as whoever asks can see."""

    running = True

    def callWhenRunning(self, callable: Any, *args: Any, **kwargs: Any) -> None:  # noqa: A002  # Twisted's name
        callable(*args, **kwargs)

    def callFromThread(self, callable: Any, *args: Any, **kwargs: Any) -> None:  # noqa: A002  # Twisted's name
        callable(*args, **kwargs)


class EngineTestCase(SynchronousTestCase):
    """Tests with a TwistedCelery, ``self.tx``, whose broker and result source are fakes."""

    settings: dict[str, Any] = {}  # noqa: RUF012  # never changed
    with_source = True
    broker: Any
    source: Any

    def make_app(self) -> Any:
        """Make the app whose TwistedCelery is tested."""
        return Celery("client", broker="amqp://", backend="rpc://" if self.with_source else None)

    def make_tx(self) -> Any:
        """Make that TwistedCelery."""
        return TwistedCelery(self.app, reactor=self.reactor, **self.settings)

    def setUp(self):
        self.reactor: Any = Reactor()
        self.app = self.make_app()
        self.broker, self.source = FakeBroker(), FakeSource()

        def open_rooms(app, reactor, **settings):
            source = self.source if self.with_source else None
            return Rooms(
                self.broker, source, inert_backend(app, lambda write: None), amqp_properties, "replies"
            )

        self.patch(_engine, "open_rooms", open_rooms)
        self.tx: Any = self.make_tx()
        self.engine = self.tx.engine

    def up(self):
        """Have the broker take work."""
        self.broker.up()

    def confirm(self):
        """Confirm all that was published."""
        self.broker.confirm()

    def turn(self, seconds=0.0):
        """Let what is due be done."""
        self.reactor.advance(seconds)
        for _ in range(3):
            self.reactor.advance(0)

    def assert_empty(self):
        """Nothing is in any table, and no timer is left."""
        self.engine._drain()
        self.assertEqual((len(self.engine.waiters), self.source.watched), (0, set()))
        self.assertEqual((self.engine.outbox.count, self.engine._bounded), (0, {}))
        self.turn(2)
        self.assertEqual(self.reactor.getDelayedCalls(), [])
