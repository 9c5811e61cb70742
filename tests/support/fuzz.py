"""Random runs of the real outbox, brokers and result sources against a server that does what it likes, on a clock of the run's own.

A run has a time of troubles, in which calls are made, waited for and cancelled while the server answers right, wrong, late or never
and connections end, and a time of peace. What holds for every run is in `World.check`: each call ends, and with the truth; each
wait ends; nothing is left behind; and no step goes on for ever.
"""

from __future__ import annotations

import signal
from collections import Counter
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, Any

from twisted.internet import error as internet_error
from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import globalLogPublisher
from twisted.python.failure import Failure

from twistedcelery._operations import Local, Publish, Write
from twistedcelery._outbox import Outbox
from twistedcelery._slices import drained, in_slices
from twistedcelery._unit import Unit
from twistedcelery._waiters import Waiters
from twistedcelery._waits import Wait
from twistedcelery.errors import AuthenticationFailed, NotSent, ResultLost, ServerUnreachable, Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from twisted.internet.interfaces import IDelayedCall

    from twistedcelery._operations import Entity

__all__ = ["Attempt", "Link", "World", "run_many"]

#: Calls that a run may ask its clock for: some hundred times what the busiest good one needs.
_STEPS = 400_000


class Endless(BaseException):
    """A step does not come to its end. No Exception, so that nobody takes it for one of a callback's."""


class BoundedClock(Clock):
    """A clock that says when it is asked for too much."""

    def __init__(self) -> None:
        super().__init__()
        self.left = _STEPS

    def callLater(
        self,
        delay: float,
        callable: Callable[..., object],  # noqa: A002  # Twisted's name
        *args: object,
        **kw: object,
    ) -> IDelayedCall:
        self.left -= 1
        if self.left < 0:
            raise Endless(f"the clock was asked {_STEPS} times")
        return super().callLater(delay, callable, *args, **kw)


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Raise `Endless` where the code takes so many seconds of the processor: it is in a loop that asks nobody for anything."""

    def bark(number: int, frame: object) -> None:
        raise Endless(f"a step takes more than {seconds} s of the processor's time")

    before = signal.signal(signal.SIGVTALRM, bark)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def run_many(kind: Callable[[int], World], seeds: Iterable[int]) -> None:
    """Make many runs; the error of one that goes wrong names the seed that repeats it."""
    bugs: list[Failure] = []

    def take(event: Any) -> None:
        if "log_failure" in event:
            bugs.append(event["log_failure"])

    observe: Any = take
    globalLogPublisher.addObserver(observe)
    try:
        for seed in seeds:
            one = kind(seed)
            try:
                with watchdog(10):
                    one.run()
                assert not bugs, bugs[0].getTraceback()
            except (Exception, Endless) as error:  # the first one ends it
                raise AssertionError(f"{one!r}.run(): {error!r}") from error
    finally:
        globalLogPublisher.removeObserver(observe)


class Transport(StringTransport):
    """Remembers that it is to end; the run ends it."""

    ending: Exception | None = None

    def abortConnection(self) -> None:
        self.ending = self.ending or internet_error.ConnectionAborted()

    def loseConnection(self) -> None:
        self.ending = self.ending or internet_error.ConnectionDone()


class Link:
    """One connection: the protocol under test, and what is on its way to it."""

    def __init__(self, world: World, protocol: Any) -> None:
        self.world = world
        self.protocol = protocol
        self.transport = Transport()
        self.lost = False
        #: What the server has said, and the client has not read.
        self.coming = bytearray()
        #: Whether the server says nothing any more, though the connection stands.
        self.deaf = False
        protocol.makeConnection(self.transport)

    def take(self, data: bytes) -> None:
        """Have the server read this, and answer."""
        raise NotImplementedError

    def move(self, *, everything: bool = True) -> bool:
        """Carry bytes both ways; tell whether there were any."""
        if self.lost:
            return False
        data = self.transport.value()
        self.transport.clear()
        if data and not self.deaf:
            self.take(data)
        coming = self.coming
        moved = bool(data)
        if coming and not self.lost:
            count = len(coming) if everything else self.world.rng.randint(1, len(coming))
            piece = bytes(coming[:count])
            del coming[:count]
            moved = True
            self.protocol.dataReceived(piece)
        if self.transport.ending is not None and not self.transport.value():
            self.lose(self.transport.ending)
        return moved

    def lose(self, why: Exception | None = None) -> None:
        """End the connection."""
        if not self.lost:
            self.lost = True
            self.protocol.connectionLost(Failure(why or internet_error.ConnectionLost()))


class Attempt:
    """One server, for a keeper."""

    def __init__(self, world: World, make: Callable[[], Link], url: str) -> None:
        self.world = world
        self.make = make
        self.url = url

    def connect(self) -> Deferred[Any]:
        world, rng = self.world, self.world.rng
        if world.trouble and rng.random() < world.refusing:
            if rng.random() < 0.3:
                return Deferred()
            kind = AuthenticationFailed if rng.random() < 0.1 else ServerUnreachable
            return fail(kind("refused"))
        link = self.make()
        world.links.append(link)
        opening: Deferred[Any] = Deferred(lambda _: link.lose())
        link.protocol.when_open().chainDeferred(opening)
        return opening


class Call:
    """A call, its owner, and who waits for its result."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.told: list[Exception | None] = []
        self.retry = True
        self.unit: Unit
        self.wait: Wait | None = None
        self.waiting: Deferred[Any] | None = None
        #: What the wait has ended with.
        self.ended: list[Any] = []

    @property
    def is_waiting(self) -> bool:
        """Whether its result is still waited for."""
        return self.waiting is not None and not self.waiting.called

    def _sent(self, error: Exception | None) -> None:
        self.told.append(error)
        if error is not None and self.wait is not None:
            self.wait.fail(error)
        self.world.user_code()

    def cancelled(self, _: object) -> None:
        """As a TaskDeferred has it."""
        withdrawn = self.unit.withdraw()
        assert self.wait is not None
        self.wait.leave()
        if withdrawn:
            self.told.append(NotSent("withdrawn"))


class World:
    """One run. Its server is a subclass's; so are ``broker`` and ``source``."""

    #: Exchanges and queues that messages are sent by: entities, exchange, routing key.
    routes: list[tuple[tuple[Entity, ...], str, str]]
    #: Whether the source takes writes.
    writes = False

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = rng = Random(seed)
        self.clock = BoundedClock()
        self.trouble = True
        self.links: list[Link] = []
        #: How likely the server is to refuse a connection, and to do something wrong when it is asked something.
        self.refusing = rng.choice((0, 0.1, 0.5))
        self.wrong = rng.choice((0, 0.02, 0.1, 0.4))
        #: How many users' callbacks make another call.
        self.eager_users = rng.choice((0, 0, 0.2))
        #: Whether the server has given answers that were none.
        self.has_lied = False
        #: Message id -> how often the server has taken it.
        self.taken: Counter[str] = Counter()
        self.calls: dict[str, Call] = {}
        self.questions: list[Deferred[Any]] = []
        self.numbers = 0
        self.bugs: list[Any] = []
        self.broker, self.source = self.rooms()
        watch, unwatch = (
            (self.source.watch, self.source.unwatch) if self.source is not None else (_ignore, _ignore)
        )
        self.waiters = Waiters(watch, unwatch)
        if self.source is not None:
            self.source.listen(self)
        self.outbox = Outbox(
            self.clock,
            self.broker,
            self.source,
            connect=self.broker.connect,
            limit=200,
            limit_bytes=100_000,
            outage_wait=rng.choice((0, 0, 3)),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.seed})"

    # What a subclass gives

    def rooms(self) -> tuple[Any, Any]:
        """Make the broker and the source of results."""
        raise NotImplementedError

    def finish(self, task_id: str) -> None:
        """Have a worker send a task's result."""
        raise NotImplementedError

    def misbehave(self) -> None:
        """Have the server do something that nobody has asked for."""

    def pass_time(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.advance(seconds)

    # As the engine has it

    def meta_received(self, meta: Any, size: int = 0) -> None:
        self.waiters.meta_received(meta, size)

    def result_failed(self, task_id: str, error: Exception) -> None:
        self.waiters.fail(task_id, error)

    def results_lost(self, error: Exception) -> Deferred[None]:
        return in_slices(
            self.clock, drained(self.waiters.waiting()), lambda waiter: waiter.lose(ResultLost(str(error)))
        )

    # Users

    def user_code(self) -> None:
        """What a user's callback does."""
        if self.trouble and self.rng.random() < self.eager_users:
            self.rng.choice((self.call, self.cancel, self.ask))()

    def call(self) -> None:
        rng = self.rng
        self.numbers += 1
        call = Call(self, f"t{self.numbers}")
        self.calls[call.name] = call
        call.retry = rng.random() < 0.8
        operations: list[Any] = [
            self.message(call, rng.randrange(3)) for _ in range(rng.choice((1, 1, 1, 3)))
        ]
        if self.writes and rng.random() < 0.2:
            operations.insert(rng.randint(0, 1), Write([("SET", "chord", "5")]))
        waits = self.source is not None and rng.random() < 0.8
        call.unit = Unit(operations, call, expects_result=waits)
        if waits:
            self.wait_for(call)
            call.waiting._unit = call.unit  # type: ignore[union-attr]  # as a TaskDeferred has it
        self.outbox.submit(call.unit)

    def wait_for(self, call: Call) -> None:
        waiting: Deferred[Any] = Deferred(call.cancelled)
        call.waiting = waiting
        call.wait = Wait(self.waiters, call.name)
        call.wait.start(waiting)
        waiting.addBoth(self.ended, call)

    def wait_for_many(self) -> None:
        """Wait for tasks that others have called."""
        if self.source is None:
            return
        for _ in range(self.rng.randint(1, 60)):
            self.numbers += 1
            call = self.calls[f"t{self.numbers}"] = Call(self, f"t{self.numbers}")
            call.told.append(None)
            call.unit = Unit([], call)
            call.unit.done = True
            self.wait_for(call)

    def ended(self, value: Any, call: Call) -> None:
        call.ended.append(value)
        self.user_code()

    def message(self, call: Call, number: int) -> Publish:
        rng = self.rng
        entities, exchange, routing_key = rng.choice(self.routes)
        policy = {
            "max_retries": rng.choice((None, 3)),
            "interval_start": 1,
            "interval_step": 0,
            "interval_max": 1,
        }
        message = Publish(
            exchange,
            routing_key,
            b"x",
            {"correlation_id": call.name},
            {},
            entities,
            task_id=call.name,
            retry=call.retry,
            retry_policy=policy if call.retry else None,
        )
        if rng.random() < 0.1:
            message.timeout = rng.uniform(0, 5)
        if rng.random() < 0.1:
            message.confirm_timeout = rng.uniform(0, 5)
        if rng.random() < 0.3:
            message.after = [Local(self.user_code)]
        return message

    def cancel(self) -> None:
        waiting = [call.waiting for call in self.calls.values() if call.is_waiting]
        if waiting:
            self.rng.choice(waiting).cancel()  # type: ignore[union-attr]  # see is_waiting

    def ask(self) -> None:
        """Ask for a state."""
        if self.source is not None:
            question = self.rng.choice((self.source.fetch, self.source.forget))
            self.questions.append(question(self.any_name()).addErrback(_ignore))

    def any_name(self) -> str:
        return self.rng.choice(list(self.calls) or ["t0"])

    # The run

    def run(self, steps: int = 100) -> None:
        """Go through the time of troubles and the time of peace, and check what has to be so after it."""
        rng = self.rng
        kinds = (
            (self.call, 6), (self.cancel, 1), (self.ask, 1), (self.finish_one, 3), (self.misbehave, 1),
            (self.move_one, 8), (self.move_all, 4), (self.wait_a_little, 4), (self.wait_long, 1), (self.cut, 1),
            (self.press, 1), (self.wait_for_many, 1),
        )  # fmt: skip
        actions, weights = zip(*kinds, strict=True)
        for action in rng.choices(actions, weights, k=steps):
            action()
        if rng.random() < 0.2:
            self.stop()
            return
        self.calm()
        for _ in range(1000):
            self.move_all()
            if not self.unfinished():
                break
            for call in self.calls.values():
                if call.is_waiting:
                    self.finish(call.name)
            self.pass_time(2.5)
        self.check()
        self.stop()

    def calm(self) -> None:
        """The troubles are over."""
        self.trouble = False
        for link in self.links:
            link.deaf = False
            link.protocol.resumeProducing()

    def finish_one(self) -> None:
        self.finish(self.any_name())

    def move_one(self) -> None:
        if self.links:
            self.rng.choice(self.links[-3:]).move(everything=self.rng.random() < 0.7)
        self.clock.advance(0)

    def move_all(self) -> None:
        """Carry everything to its end, as far as it has one."""
        for _ in range(50):
            self.clock.advance(0)
            if not sum([link.move() for link in list(self.links)]):
                break
        self.links = [link for link in self.links if not link.lost]

    def wait_a_little(self) -> None:
        self.pass_time(self.rng.uniform(0, 0.5))

    def wait_long(self) -> None:
        self.pass_time(self.rng.uniform(1, 40))

    def cut(self) -> None:
        if self.links:
            self.rng.choice(self.links[-3:]).lose()

    def press(self) -> None:
        """Have a transport ask for less, or for more."""
        if self.links:
            link = self.rng.choice(self.links[-3:])
            if not link.lost:
                self.rng.choice((link.protocol.pauseProducing, link.protocol.resumeProducing))()

    # What has to be so

    def unfinished(self) -> list[str]:
        """What has not ended yet."""
        found = []
        for call in self.calls.values():
            if not call.told:
                found.append(f"{call.name} has no outcome")
            if call.is_waiting:
                found.append(f"{call.name} is waited for")
        found += [f"question {number}" for number, one in enumerate(self.questions) if not one.called]
        return found

    def check(self) -> None:
        """Each call has ended, once and with the truth; each wait has; nothing is left in any table."""
        assert not self.unfinished(), self.unfinished()
        for call in self.calls.values():
            assert len(call.told) == 1, (call.name, call.told)
            (error,) = call.told
            taken = self.taken[call.name]
            count = sum(isinstance(one, Publish) for one in call.unit.operations)
            if type(error) is NotSent and not self.has_lied:
                assert not taken, (call.name, error, taken)
            if not call.retry:
                assert taken <= max(3, count), (call.name, taken)
        outbox = self.outbox
        assert (outbox.count, outbox.bytes) == (0, 0), (outbox.count, outbox.bytes)
        assert not outbox._queue
        assert not outbox._inflight
        assert not outbox._writing
        assert not len(self.waiters), list(self.waiters)

    def stop(self) -> None:
        """An orderly stop, at any moment, ends everything, and leaves no timer."""
        self.calm()
        self.until_fired([self.outbox.flush(5)], 6)
        self.outbox.close()
        stopping = [self.broker.stop(5)]
        if self.source is not None:
            stopping.append(self.source.stop(5))
        for waiter in self.waiters.waiting():
            waiter.fail(Stopped("stopped"))
        self.until_fired(stopping, 12)
        self.move_all()
        assert not self.unfinished(), self.unfinished()
        left = [str(call) for call in self.clock.getDelayedCalls()]
        assert not left, left

    def until_fired(self, deferreds: list[Deferred[Any]], seconds: int) -> None:
        fired: list[object] = []
        for one in deferreds:
            one.addBoth(fired.append)
        for _ in range(seconds * 4):
            self.move_all()
            if len(fired) == len(deferreds):
                break
            self.pass_time(0.25)
        assert len(fired) == len(deferreds), f"{len(deferreds) - len(fired)} have not stopped"
        for outcome in fired:
            if isinstance(outcome, Failure):
                outcome.raiseException()


def _ignore(_: object) -> None:
    """Do nothing."""
