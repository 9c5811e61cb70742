"""A unit of the outbox: the operations of one call, who is told how they end, and how long they may take."""

from __future__ import annotations

from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

from kombu.utils.functional import fxrange

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from twisted.internet.interfaces import IDelayedCall

    from ._operations import Operation, Publish
    from ._outbox import Outbox

__all__ = ["Owner", "Unit", "patience_of"]

#: Retries after which the wait between two of them grows no more.
_SERIES = 1000


class Owner(Protocol):
    """Whoever is told when a unit has ended."""

    def _sent(self, error: Exception | None) -> None:
        """Every message is confirmed, or the unit has failed."""


def patience_of(policy: Mapping[str, Any] | None) -> float:
    """Return the seconds for which a kombu retry policy goes on trying (``task_publish_retry_policy``).

    ``max_retries`` None means for ever.
    """
    if not policy:
        return 0.0
    retries = policy.get("max_retries", 3)
    if retries is None:
        return inf
    start, step, most = (
        policy.get("interval_start", 0) or 0,
        policy.get("interval_step", 0.2) or 0,
        policy.get("interval_max", 0.2) or 0,
    )
    # kombu's own series; its last interval repeats, and none is longer than interval_max (kombu before 5.7 adds interval_start).
    series = fxrange(start, most + start, step, repeatlast=True)  # type: ignore[no-untyped-call]
    waits = [min(wait, most) for wait in islice(series, min(int(retries), _SERIES))]
    last = waits[-1] if waits else 0.0
    return float(sum(waits)) + last * (int(retries) - len(waits))


class Unit:
    """The operations of one call, on their way."""

    __slots__ = (
        "again", "captured", "done", "expects_result", "expires", "failed_at", "inflight", "label", "late", "left", "number",
        "operations", "outbox", "owner", "patience", "position", "prepared", "retry", "since", "size", "task_id", "timers",
    )  # fmt: skip

    #: What it is called while its operations are not known.
    label: str
    # Set when it is submitted:
    outbox: Outbox
    #: Its place in the order of calls.
    number: int
    #: The first task that it calls.
    task_id: str | None
    #: Messages, and bytes of their bodies.
    size: tuple[int, int]
    #: When it was submitted, and when its first connection was lost under it or else the same; seconds of the clock.
    since: float
    failed_at: float
    retry: bool
    patience: float
    #: When its patience is over.
    expires: float

    def __init__(
        self,
        operations: Sequence[Operation],
        owner: Owner,
        *,
        expects_result: bool = True,
    ) -> None:
        #: None stands for a message that was handed to the broker, and is not the first.
        self.operations: list[Operation | None] = list(operations)
        self.owner: Owner | None = owner
        #: The message must not leave before the result source is ready for its result.
        self.expects_result = expects_result
        #: The next operation.
        self.position = 0
        #: Messages that were handed to the broker and have no outcome yet.
        self.inflight = 0
        #: Messages whose connection was lost under them, to be sent again.
        self.again: list[Publish] | None = None
        self.done = False
        #: None: its operations were there from the start; else whether they have come from the thread.
        self.captured: bool | None = None
        #: Whether a message has been confirmed, or was lost without a confirm.
        self.left = False
        self.timers: list[IDelayedCall] | None = None
        #: Whether its ``timeout`` is over.
        self.late = False
        self.prepared = False

    @property
    def complete(self) -> bool:
        """Whether everything has been handed out and has its outcome, and the owner has not been told."""
        return (
            not (self.inflight or self.done) and self.again is None and self.position == len(self.operations)
        )

    @property
    def is_waiting(self) -> bool:
        """Whether it has not ended, nor is its ``timeout`` over."""
        return not (self.done or self.late)

    @property
    def has_left(self) -> bool:
        """Whether a byte of a message may have left."""
        return self.left or self.inflight > 0

    @property
    def unsent(self) -> list[Operation | None]:
        """What has no outcome, and is not the broker's; with the one message of a call that has no other."""
        operations = self.operations
        alone = self.inflight and len(operations) == 1
        return [*(self.again or ()), *(operations if alone else operations[self.position :])]

    @property
    def never_left(self) -> bool:
        """Whether it has ended, and no byte of it has left."""
        return self.done and not self.has_left

    @property
    def withdrawable(self) -> bool:
        """Whether no byte of it has left, so that it can be taken back."""
        return not (self.done or self.has_left or self.position)

    def withdraw(self) -> bool:
        """Take the call back where no byte of it has left; tell whether that was so."""
        if not self.withdrawable:
            return False
        self.outbox.withdraw(self)
        return True

    def settle(self) -> None:
        """Its task has run: the message has arrived, whatever becomes of its confirm.

        Where nothing has left yet, it was another call with the same id.
        """
        if not self.done and self.has_left and self.size[0] == len(self.operations) == 1:
            self.outbox.settled(self)
