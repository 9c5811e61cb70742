"""The server that Redis Sentinel calls the master (redis.io, "Sentinel client spec").

The Sentinels are asked in turn; the first that knows the master, and that sees enough others, is
believed so far as to connect there; the greeting then asks the server itself (``ROLE``), because a Sentinel may be
late. If it is none, or cannot be reached, the next Sentinel is asked. The one that was right moves to the front.
The Sentinel's own connection lasts for the one question. Nothing listens for failovers: a master that steps
down closes its connections or answers READONLY, and either makes the keeper connect, so ask, again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectingCancelledError

from ..errors import ConnectionFailed, ConnectionLost, RemoteProtocolError, SendFailed, ServerUnreachable
from .opening import open_connection
from .protocol import CommandProtocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from .connection import ConnectionConfig
    from .protocol import RedisProtocol
    from .settings import RedisServer

__all__ = ["ANSWER_WITHIN", "SentinelTarget"]

#: Seconds that one Sentinel gets, where its settings say nothing: an unreachable one must not use up the attempt.
ANSWER_WITHIN = 1.0

#: Seconds that the master gets which a Sentinel names, where the settings say nothing; otherwise half of the attempt.
MASTER_WITHIN = 5.0

#: What a Sentinel may say of a master that is of no use, as redis-py takes it.
_UNFIT = frozenset({"s_down", "o_down", "slave", "disconnected"})

P = TypeVar("P", bound="RedisProtocol[Any]")


class SentinelTarget(Generic[P]):
    """The master, to be found and tried as often as it takes: an attempt for a `Keeper`."""

    __slots__ = ("_make", "_reactor", "_watchers", "server")

    def __init__(self, reactor: Any, server: RedisServer, make: Callable[[ConnectionConfig, Any], P]) -> None:
        assert server.sentinels is not None
        self._reactor = reactor
        self._make = make
        #: The one that was right last stands first.
        self._watchers = list(server.sentinels.servers)
        self.server = server

    @property
    def url(self) -> str:
        """The master's login at the first Sentinel, without password."""
        return self.server.url

    def connect(self) -> Deferred[P]:
        """Find the master, connect and greet once; fails with a `ConnectionFailed`. Can be cancelled."""
        return Deferred.fromCoroutine(self._connect())

    async def _connect(self) -> P:
        reasons: list[ConnectionFailed] = []
        for watcher in list(self._watchers):
            try:
                protocol = await self._through(watcher)
            except ConnectionFailed as error:
                if isinstance(error.__cause__, CancelledError | ConnectingCancelledError):
                    # It has used up the time of this attempt: the next one begins with another.
                    self._watchers.remove(watcher)
                    self._watchers.append(watcher)
                    raise
                reasons.append(error)
                continue
            self._watchers.remove(watcher)
            self._watchers.insert(0, watcher)
            return protocol
        assert self.server.sentinels is not None
        name = self.server.sentinels.master_name
        told = "; ".join(str(reason) for reason in reasons)
        # A wrong password that every way leads to will not get better; anything else may.
        kinds = {type(reason) for reason in reasons}
        same = kinds.pop() if len(kinds) == 1 else ServerUnreachable
        kind = same if same.permanent else ServerUnreachable
        raise kind(f"no master {name!r}: {told}", url=self.url) from reasons[-1]

    async def _through(self, watcher: RedisServer) -> P:
        """Ask one Sentinel, and connect to the server that it names."""
        timeout = watcher.server.connect_timeout or ANSWER_WITHIN

        def late(_result: object, seconds: float) -> NoReturn:
            raise ServerUnreachable(f"this Sentinel did not answer within {seconds:g} s", url=watcher.url)

        asking = Deferred.fromCoroutine(self._ask(watcher))
        host, port = await asking.addTimeout(timeout, self._reactor, late)
        transport = "rediss" if self.server.server.ssl else "redis"
        where = replace(self.server.server, transport=transport, host=host, port=port, name=host)
        config = replace(self.server.config, url=where.url)
        # A master that is silent must not use up the attempt either: another Sentinel may know better.
        within = (where.connect_timeout or 2 * MASTER_WITHIN) / 2

        def silent(_result: object, seconds: float) -> NoReturn:
            raise ServerUnreachable(f"the master did not answer within {seconds:g} s", url=where.url)

        opening = Deferred.fromCoroutine(
            open_connection(self._reactor, replace(self.server, server=where, config=config), self._make)
        )
        return await opening.addTimeout(within, self._reactor, silent)

    async def _ask(self, watcher: RedisServer) -> tuple[str, int]:
        """Where the master is, as this Sentinel knows it."""
        sentinels = self.server.sentinels
        assert sentinels is not None
        protocol = await open_connection(self._reactor, watcher, CommandProtocol)
        try:
            address = await protocol.command("SENTINEL", "get-master-addr-by-name", sentinels.master_name)
            if not address:
                raise ServerUnreachable("this Sentinel does not know the master", url=watcher.url)
            host, port = address
            answer = await protocol.command("SENTINEL", "master", sentinels.master_name)
            state = dict(zip(answer[::2], answer[1::2], strict=True))
            others = int(state[b"num-other-sentinels"])
            if others < sentinels.min_other_sentinels:
                raise ServerUnreachable(f"this Sentinel sees only {others} others", url=watcher.url)
            flags = _UNFIT.intersection(state.get(b"flags", b"").decode().split(","))
            # During a failover the address is the new master's, and the state still that of the old one.
            if flags and (state.get(b"ip"), state.get(b"port")) == (host, port):
                raise ServerUnreachable(
                    f"this Sentinel says that the master is {', '.join(sorted(flags))}", url=watcher.url
                )
            return host.decode(), int(port)
        except SendFailed as error:
            raise ServerUnreachable(f"this Sentinel answers: {error.message}", url=watcher.url) from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise RemoteProtocolError("this Sentinel's answer cannot be read", url=watcher.url) from error
        finally:
            protocol.abort(ConnectionLost("asked", url=watcher.url))
            await protocol.when_closed()
