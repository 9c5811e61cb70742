"""Login mechanisms (AMQP 0-9-1, 1.4.2.2 ``mechanisms`` and ``response``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import AuthenticationFailed
from .tables import encode_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from .config import ConnectionConfig

__all__ = ["choose_login"]


def _plain(username: str, password: str) -> bytes:
    """RFC 4616."""
    return b"\x00" + username.encode() + b"\x00" + password.encode()


def _amqplain(username: str, password: str) -> bytes:
    """A table without its length: AMQP 0-8's own mechanism, kept by RabbitMQ."""
    return encode_table({"LOGIN": username, "PASSWORD": password})[4:]


_MECHANISMS: Final[dict[str, Callable[[str, str], bytes]]] = {"PLAIN": _plain, "AMQPLAIN": _amqplain}
_ORDER: Final = ("PLAIN", "AMQPLAIN", "EXTERNAL")


def choose_login(config: ConnectionConfig, offered: list[str]) -> tuple[str, bytes]:
    """Choose a mechanism that the server offers; return its name and the response to send.

    :raises AuthenticationFailed: if there is none, or the password cannot be had.
    """
    wanted = (config.login_method,) if config.login_method else _ORDER
    mechanism = next((name for name in wanted if name in offered), None)
    if mechanism is None:
        raise AuthenticationFailed(
            f"no common login method: the server offers {', '.join(offered) or 'none'}, "
            f"this side {', '.join(wanted)}",
            url=config.url,
        )
    if config.login_response is not None:
        return mechanism, config.login_response
    if mechanism == "EXTERNAL":
        return mechanism, b""  # the server takes the user from the TLS certificate
    if mechanism not in _MECHANISMS:
        raise AuthenticationFailed(
            f"the login method {mechanism} is not supported without a login_response", url=config.url
        )
    password = config.password
    if callable(password):
        try:
            password = password()
        except Exception as problem:  # the program's own code: whatever it raises, the attempt has failed
            raise AuthenticationFailed(
                f"the password could not be had: {type(problem).__name__}: {problem}", url=config.url
            ) from problem
    return mechanism, _MECHANISMS[mechanism](config.username, password)
