"""Methods of a channel that wait for their answers. A server answers in the order in which it was asked."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import Deferred

from ..errors import RemoteProtocolError
from .methods import name_of

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Calls"]

_T = TypeVar("_T")


class _Call:
    """One of them. Without a Deferred it is a tombstone: the answer is still to come, but nobody wants it."""

    __slots__ = ("answers", "deferred", "method", "take", "unwanted")

    def __init__(
        self,
        method: int,
        answers: tuple[int, ...],
        take: Callable[[Any], Any],
        unwanted: Callable[[Any], object] | None,
    ) -> None:
        self.method = method
        self.answers = answers
        self.take = take
        self.unwanted = unwanted
        self.deferred: Deferred[Any] | None = None


class Calls:
    """A queue of calls, oldest first."""

    __slots__ = ("_calls",)

    def __init__(self) -> None:
        self._calls: deque[_Call] = deque()

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def next(self) -> str:
        """The method that is to be answered next; empty where none is."""
        return name_of(self._calls[0].method) if self._calls else ""

    def wait(
        self,
        method: int,
        answers: tuple[int, ...],
        take: Callable[[Any], _T],
        unwanted: Callable[[_T], object] | None = None,
    ) -> Deferred[_T]:
        """Wait for one of the answers to a method that was sent; fires with what ``take`` makes of it.

        ``unwanted`` gets that instead, if the Deferred has been cancelled by then.
        """
        call = _Call(method, answers, take, unwanted)

        def bury(cancelled: Deferred[_T]) -> None:
            call.deferred = None

        deferred: Deferred[_T] = Deferred(bury)
        call.deferred = deferred
        self._calls.append(call)
        return deferred

    def expect(self, method: int, answer: int) -> None:
        """Note that there will be an answer to a method which nobody waits for."""
        self._calls.append(_Call(method, (answer,), lambda _: None, None))

    def answered(self, method: int, answer: object) -> None:
        """Give an answer to whom it belongs.

        :raises RemoteProtocolError: if it is not the one to come next.
        """
        if not self._calls or method not in self._calls[0].answers:
            raise RemoteProtocolError(f"{name_of(method)}, which nothing waits for")
        call = self._calls.popleft()
        result = call.take(answer)
        deferred, call.deferred = call.deferred, None
        if deferred is not None:
            deferred.callback(result)
        elif call.unwanted is not None:
            call.unwanted(result)

    def refuse(self, method: int, reason: Exception) -> None:
        """The server ends the connection because of this method: where it is the one to be answered next, fail it."""
        if self._calls and self._calls[0].method == method:
            deferred, self._calls[0].deferred = self._calls[0].deferred, None
            if deferred is not None:
                deferred.errback(reason)

    def fail(self, reason: Exception) -> None:
        """There will be no more answers."""
        calls, self._calls = self._calls, deque()
        for call in calls:
            deferred, call.deferred = call.deferred, None
            if deferred is not None:
                deferred.errback(reason)
