"""One connection to one Redis server: credentials, endpoint and greeting."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from celery.exceptions import ImproperlyConfigured
from twisted.internet.defer import CancelledError
from twisted.internet.threads import deferToThreadPool

from .._endpoints import dial, endpoint
from ..errors import AuthenticationFailed, TLSFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from .connection import ConnectionConfig
    from .protocol import RedisProtocol
    from .settings import RedisServer

__all__ = ["open_connection"]

P = TypeVar("P", bound="RedisProtocol[Any]")


async def open_connection(reactor: Any, server: RedisServer, make: Callable[[ConnectionConfig, Any], P]) -> P:
    """Connect to ``server`` itself, log in, and give the protocol; raises a `ConnectionFailed`.

    ``make`` is `CommandProtocol` or `SubscriberProtocol`.
    """
    config = replace(server.config, credentials=await _credentials(reactor, server))
    try:
        where = endpoint(reactor, server.server, timeout=server.server.connect_timeout)
    except ImproperlyConfigured as error:
        raise TLSFailed(str(error), url=server.url) from error
    return await dial(where, lambda: make(config, reactor), server.url)


async def _credentials(reactor: Any, server: RedisServer) -> tuple[str, ...]:
    """Give the arguments of AUTH. Callables are asked anew, in a thread: they may fetch a token."""
    provider, password = server.credential_provider, server.password
    if provider is None and not callable(password):
        given: Any = password
    else:
        ask: Any = password if provider is None else provider.get_credentials
        try:
            given = await deferToThreadPool(reactor, reactor.getThreadPool(), ask)
        except CancelledError:
            raise
        except Exception as error:  # whatever a provider raises, it is why nobody can log in
            refused = AuthenticationFailed(f"no credentials: {error}", url=server.url)
            refused.permanent = False  # the next token may be had again
            raise refused from error
        if provider is not None:
            return tuple(given)
    if server.username:
        # A user who has no password logs in all the same, as with redis-py.
        return (server.username, given or "")
    return (given,) if given else ()
