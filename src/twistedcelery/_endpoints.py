"""From a server's description to a connection with its handshake done.

Endpoints are Twisted's (`HostnameEndpoint`, `UNIXClientEndpoint`, TLS around them as ``wrapClientTLS`` does); `dial` adds what a keeper needs
of an attempt: one Deferred for TCP, TLS and log-in together, which can be cancelled at any moment and leaves no
connection behind when it fails.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from celery.exceptions import ImproperlyConfigured
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.defer import Deferred, fail
from twisted.internet.endpoints import (
    HostnameEndpoint,
    TCP4ClientEndpoint,
    TCP6ClientEndpoint,
    UNIXClientEndpoint,
)
from twisted.internet.interfaces import IProtocolFactory, IStreamClientEndpoint
from zope.interface import implementer

from ._explain import explain
from ._keeper import Keepable
from ._tls import client_tls
from ._urls import failover
from .errors import TLSFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from twisted.internet.interfaces import IOpenSSLClientConnectionCreator, IProtocol

    from ._urls import Server, Strategy

__all__ = ["Handshaking", "Target", "dial", "endpoint", "targets"]


class Handshaking(Keepable, Protocol):
    """What `dial` asks of a protocol, beside what a keeper does."""

    def when_open(self) -> Deferred[Any]:
        """Fire once the handshake is done; fail with the reason why it will not be. Fresh per call."""


#: Labels of letters, digits, hyphens and underscores.
_PLAIN_HOST = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")

P = TypeVar("P", bound=Handshaking)


class _AnyHostEndpoint(HostnameEndpoint):
    """A `HostnameEndpoint` that leaves it to the resolver what a host name is.

    With the idna package installed, Twisted refuses names that resolve well in practice, such as the
    ``my_broker`` of a container network.
    """

    @staticmethod
    def _hostAsBytesAndText(host: bytes | str) -> tuple[bool, bytes, str]:
        invalid, encoded, text = HostnameEndpoint._hostAsBytesAndText(host)
        plain = host.decode("ascii", "replace") if isinstance(host, bytes) else host
        if invalid and _PLAIN_HOST.fullmatch(plain):
            return False, plain.encode("ascii"), plain
        return invalid, encoded, text


@implementer(IStreamClientEndpoint)
class _TLSEndpoint:
    """``wrapClientTLS``, with a clock of its own: before Twisted 24 that one takes the global reactor's."""

    def __init__(
        self, clock: Any, plain: IStreamClientEndpoint, creator: IOpenSSLClientConnectionCreator
    ) -> None:
        self._clock = clock
        self._plain = plain
        self._creator = creator

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect; TLS begins at once, and the protocol is given before its handshake is done."""
        from twisted.protocols.tls import TLSMemoryBIOFactory  # optional

        wrapping: Any = TLSMemoryBIOFactory(self._creator, True, protocolFactory, clock=self._clock)
        connecting: Deferred[Any] = self._plain.connect(wrapping)
        return connecting.addCallback(_unwrapped)


def _unwrapped(wrapper: Any) -> Any:
    return wrapper.wrappedProtocol


def endpoint(reactor: Any, server: Server, *, timeout: float | None) -> IStreamClientEndpoint:
    """Make the endpoint of a server: TCP or UNIX socket, with TLS around it where the server asks for it.

    :param timeout: seconds for the TCP connection; None for no bound.
    :raises ImproperlyConfigured: TLS settings that cannot be used (see `client_tls`). Reads the files they name.
    """
    plain: IStreamClientEndpoint
    if server.path is not None:
        plain = UNIXClientEndpoint(reactor, server.path, timeout=timeout)  # type: ignore[no-untyped-call]
    else:
        plain = _tcp(reactor, server.host, server.port, timeout)
    if not server.ssl:
        return plain
    return _TLSEndpoint(reactor, plain, client_tls(server.name or server.host, server.ssl))


def _tcp(reactor: Any, host: str, port: int, timeout: float | None) -> IStreamClientEndpoint:
    # A timeout of None goes down to connectTCP, where it means none.
    within: Any = timeout
    if isIPAddress(host):
        # Nothing to resolve, for which a thread of the reactor's pool would have to be free.
        return TCP4ClientEndpoint(reactor, host, port, within)
    if isIPv6Address(bare := host.strip("[]")):
        return TCP6ClientEndpoint(reactor, bare, port, within)  # type: ignore[no-untyped-call]
    return _AnyHostEndpoint(reactor, host, port, timeout=within)


@implementer(IProtocolFactory)
class _Factory:
    """The least that an endpoint needs; `twisted.internet.protocol.Factory` would log each use."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = build

    def doStart(self) -> None:
        """Nothing to prepare."""

    def doStop(self) -> None:
        """Nothing to clean up."""

    def buildProtocol(self, addr: object) -> IProtocol:
        """Make the one protocol."""
        protocol: IProtocol = self._build()
        return protocol


def dial(endpoint: IStreamClientEndpoint, build: Callable[[], P], url: str) -> Deferred[P]:
    """Connect, let the protocol shake hands, and give the protocol.

    Fails with a `ConnectionFailed`, at the earliest once the connection is gone. Cancelling aborts.

    :param build: makes the protocol, once the TCP connection is there.
    """
    return Deferred.fromCoroutine(_dial(endpoint, build, url))


async def _dial(endpoint: IStreamClientEndpoint, build: Callable[[], P], url: str) -> P:
    try:
        protocol: P = await endpoint.connect(_Factory(build))  # type: ignore[assignment]  # what build makes
    except Exception as error:  # noqa: BLE001  # whatever it is, it is why there is no connection
        explained = explain(error, url)
        raise explained from explained.__cause__
    try:
        await protocol.when_open()
    except Exception as error:  # noqa: BLE001  # as above
        explained = explain(error, url)
        protocol.abort(explained)
        await protocol.when_closed()
        raise explained from explained.__cause__
    return protocol


class Target(Generic[P]):
    """One server to try, as often as it takes. The endpoint is made once, at the first attempt."""

    __slots__ = ("_build", "_endpoint", "_reactor", "server")

    def __init__(self, reactor: Any, server: Server, build: Callable[[Server], P]) -> None:
        self._reactor = reactor
        self._build = build
        self._endpoint: IStreamClientEndpoint | None = None
        self.server = server

    @property
    def url(self) -> str:
        """The server, without password."""
        return self.server.url

    def connect(self) -> Deferred[P]:
        """Connect and shake hands once; see `dial`. TLS settings that cannot be used are a `TLSFailed`."""
        if self._endpoint is None:
            try:
                self._endpoint = endpoint(self._reactor, self.server, timeout=self.server.connect_timeout)
            except ImproperlyConfigured as error:
                refused = TLSFailed(str(error), url=self.url)
                refused.__cause__ = error
                return fail(refused)
        return dial(self._endpoint, lambda: self._build(self.server), self.url)


def targets(
    reactor: Any,
    servers: Sequence[Server],
    build: Callable[[Server], P],
    strategy: Strategy | None = None,
) -> Iterator[Target[P]]:
    """Iterate without end over the servers as attempts for a `Keeper`, in the order of `failover`.

    :param build: makes the protocol for a server, once per connection.
    """
    known = {id(server): Target(reactor, server, build) for server in servers}
    return (known[id(server)] for server in failover(servers, strategy))
