"""Attempts to connect to Redis servers, for a `Keeper`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from twisted.internet.defer import Deferred

from .._urls import failover
from .opening import open_connection
from .sentinel import SentinelTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .._urls import Strategy
    from .connection import ConnectionConfig
    from .protocol import RedisProtocol
    from .settings import RedisServer

__all__ = ["RedisTarget", "targets"]

P = TypeVar("P", bound="RedisProtocol[Any]")


class RedisTarget(Generic[P]):
    """One server to try, as often as it takes."""

    __slots__ = ("_make", "_reactor", "server")

    def __init__(self, reactor: Any, server: RedisServer, make: Callable[[ConnectionConfig, Any], P]) -> None:
        self._reactor = reactor
        self._make = make
        self.server = server

    @property
    def url(self) -> str:
        """The server, without password."""
        return self.server.url

    def connect(self) -> Deferred[P]:
        """Connect and greet once; fails with a `ConnectionFailed`. Cancelling leaves nothing behind."""
        return Deferred.fromCoroutine(open_connection(self._reactor, self.server, self._make))


def targets(
    reactor: Any,
    servers: Sequence[RedisServer],
    make: Callable[[ConnectionConfig, Any], P],
    strategy: Strategy | None = None,
) -> Iterator[RedisTarget[P] | SentinelTarget[P]]:
    """Iterate without end over the servers as attempts for a `Keeper`, in the order of `failover`.

    ``make`` is `CommandProtocol` or `SubscriberProtocol`.
    """
    known: dict[int, RedisTarget[P] | SentinelTarget[P]] = {
        id(each.server): (SentinelTarget if each.sentinels else RedisTarget)(reactor, each, make)
        for each in servers
    }
    return (known[id(server)] for server in failover([each.server for each in servers], strategy))
