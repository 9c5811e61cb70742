"""How much a connection reads and writes at once, so that the reactor goes on ticking."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["READ", "WRITE", "Writer", "read_in_slices", "slices"]

#: Bytes that a connection reads at once: some four hundred confirms, or 25 small results, are 3 ms of work at most. Twisted's own
#: 64 KiB are eight times that.
READ = 8 * 1024

#: Bytes that are handed to a transport at once.
WRITE = 256 * 1024


def read_in_slices(transport: Any) -> None:
    """Let a transport read less at once, so that a flood of small messages leaves the reactor its turns."""
    # Under TLS the transport that reads is the one below.
    layers: tuple[Any, Any] = (transport, getattr(transport, "transport", None))
    for layer in layers:
        if hasattr(layer, "bufferSize"):
            layer.bufferSize = READ


def slices(data: bytes, size: int = WRITE) -> Iterator[memoryview]:
    """Yield pieces of at most so many bytes."""
    view = memoryview(data)
    return (view[start : start + size] for start in range(0, len(data), size))


class Writer:
    """Writes to a transport, in order, at the pace at which it takes bytes.

    What is larger than `WRITE`, or comes in pieces, is handed over piece by piece, each when the transport has room: so a body of
    50 MB is neither copied at once, nor encrypted at once by TLS. Its owner is the transport's push producer, and passes on
    when that has enough, and when it has room again.
    """

    __slots__ = ("_backlog", "paused", "transport")

    def __init__(self) -> None:
        self.transport: Any = None
        #: Whether the transport has enough for now.
        self.paused = False
        self._backlog: deque[Iterator[bytes]] = deque()

    def write(self, data: bytes | Iterable[bytes]) -> None:
        """Write bytes, or pieces that are made when it is their turn; making them must not raise."""
        if not isinstance(data, bytes):
            self._backlog.append(iter(data))
        elif len(data) > WRITE:
            self._backlog.append(map(bytes, slices(data)))
        elif self._backlog:
            self._backlog.append(iter((data,)))
        else:
            self.transport.write(data)
            return
        self._pump()

    def pause(self) -> None:
        """The transport has enough."""
        self.paused = True

    def resume(self) -> None:
        """The transport has room again; after this, ``paused`` tells whether for more than what had waited."""
        self.paused = False
        self._pump()

    def _pump(self) -> None:
        backlog = self._backlog
        while backlog and not self.paused:
            piece = next(backlog[0], None)
            if piece is None:
                backlog.popleft()
            else:
                self.transport.write(piece)

    def clear(self) -> None:
        """Forget what waits: the connection is over."""
        self._backlog.clear()
