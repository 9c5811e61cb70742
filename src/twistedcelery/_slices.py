"""Long work cut into slices, so that the reactor goes on ticking between them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import Deferred, succeed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from twisted.internet.interfaces import IDelayedCall, IReactorTime
    from twisted.python.failure import Failure

__all__ = ["SLICE", "drained", "gather_in_slices", "in_slices"]

#: Seconds that one slice may take (DESIGN section 6).
SLICE = 0.002

T = TypeVar("T")
R = TypeVar("R")


def drained(items: Iterable[T]) -> Iterator[T]:
    """Yield items of which nothing else need be left at the end: so they do not all go at once."""
    rest = deque(items)
    del items
    while rest:
        yield rest.popleft()


def in_slices(
    clock: IReactorTime, items: Iterable[T], work: Callable[[T], object], budget: float = SLICE
) -> Deferred[None]:
    """Call ``work`` for each item, at most ``budget`` seconds at a time; fires with None after the last.

    The first slice is done before this returns. ``items`` must not change meanwhile; ``work`` must not raise.
    Cancelling stops before the next slice.
    """
    iterator = iter(items)
    waiting: list[IDelayedCall] = []

    def stop(_: object) -> None:
        for call in waiting:
            call.cancel()

    finished: Deferred[None] = Deferred(stop)

    def run() -> None:
        waiting.clear()
        end = clock.seconds() + budget
        for item in iterator:
            work(item)
            if finished.called:
                # Cancelled by the work itself.
                return
            if clock.seconds() > end:
                waiting.append(clock.callLater(0, run))
                return
        finished.callback(None)

    run()
    return finished


def gather_in_slices(
    clock: IReactorTime, items: Iterable[T], ask: Callable[[T], Deferred[R]]
) -> Deferred[list[R]]:
    """Ask something of each item, in slices; fires with the answers in order, or fails with the first failure.

    Cancelling, and a failure, cancel what is still being asked.
    """
    asked: list[Deferred[Any]] = []
    answers: list[Any] = []
    left = 1

    def stop(_: object = None) -> None:
        asking.cancel()
        for one in asked:
            one.cancel()

    finished: Deferred[list[R]] = Deferred(stop)

    def answer(value: R, place: int) -> None:
        answers[place] = value
        done()

    def failed(failure: Failure) -> None:
        if not finished.called:
            finished.errback(failure)
            stop()

    def begin(item: T) -> None:
        nonlocal left
        if finished.called:
            return
        left += 1
        answers.append(None)
        asked.append(ask(item).addCallback(answer, len(asked)).addErrback(failed))

    def done(_: object = None) -> None:
        nonlocal left
        left -= 1
        if not left and not finished.called:
            finished.callback(answers)

    asking: Deferred[None] = succeed(None)
    asking = in_slices(clock, items, begin)
    asking.addCallbacks(done, lambda _: None)
    return finished
