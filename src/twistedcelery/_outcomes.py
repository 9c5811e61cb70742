"""How messages ended, told one by one and in order; many of them in slices, so that the reactor goes on ticking."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from ._slices import SLICE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twisted.internet.interfaces import IDelayedCall, IReactorTime

    from ._operations import Publish
    from .interfaces import BrokerListener

__all__ = ["Outcome", "Outcomes"]

log = Logger()

#: A message, and why it failed, or None.
Outcome = tuple["Publish", "Exception | None"]

#: Outcomes that take less than a slice for certain.
_FEW = 50


class Outcomes:
    """Tells a broker's listener the outcomes of its messages.

    ``all_told`` is called when what had to wait for its turn has been told. Until then the broker should take no work: what
    was lost leaves again before what is called after it.
    """

    def __init__(self, clock: IReactorTime, all_told: Callable[[], object]) -> None:
        self._clock = clock
        self._all_told = all_told
        self._untold: deque[Outcome] = deque()
        self._call: IDelayedCall | None = None
        self._waiting: list[Deferred[None]] = []
        self.listener: BrokerListener

    @property
    def untold(self) -> bool:
        """Whether some outcomes wait for their turn."""
        return bool(self._untold)

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Tell these, now if they are few and none waits."""
        if len(outcomes) <= _FEW and not self._untold:
            for message, error in outcomes:
                self._tell_one(message, error)
        else:
            self._untold.extend(outcomes)
            if self._call is None:
                self._tell_on()

    def tell_later(self, message: Publish, error: Exception | None) -> None:
        """Tell this one, of many that come one by one."""
        self._untold.append((message, error))
        if self._call is None:
            self._call = self._clock.callLater(0, self._tell_on)

    def _tell_on(self) -> None:
        self._call = None
        end = self._clock.seconds() + SLICE
        untold = self._untold
        while untold:
            # The listener may make the next call, whose outcome comes here.
            self._tell_one(*untold.popleft())
            if self._clock.seconds() > end:
                self._call = self._clock.callLater(0, self._tell_on)
                return
        self._all_told()
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(None)

    def _tell_one(self, message: Publish, error: Exception | None) -> None:
        try:
            self.listener.published(message, error)
        except Exception:  # noqa: BLE001  # a bug there must not keep others from being told
            log.failure("bug in what follows the outcome of a message")

    def when_told(self) -> Deferred[None]:
        """Fire with None once nothing waits for its turn."""
        if not self._untold:
            return succeed(None)
        waiter: Deferred[None] = Deferred()
        self._waiting.append(waiter)
        return waiter
