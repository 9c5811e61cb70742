"""What Twisted, OpenSSL and the resolver say about a failed connection, as one of this package's errors."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from twisted.internet import defer, error
from twisted.python.failure import Failure

from .errors import ConnectionFailed, ConnectionLost, ServerUnreachable, TLSFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["explain", "text_of"]

#: What OpenSSL says when the peer answers, but not in TLS.
_NOT_TLS = ("wrong version number", "http request", "packet length too long", "record layer failure")

#: What OpenSSL says when the peer is gone or in trouble of its own, or bytes were damaged on their way: not the fault of a
#: certificate. Names of alerts are OpenSSL's, which writes "cancelled" where RFC 8446 has "canceled".
_PASSING = (
    "internal error",
    "user cancelled",
    "user canceled",
    "decode error",
    "bad record mac",
    "decryption failed",
    "record overflow",
    "unexpected message",
    "shutdown",
)


class _Trouble(NamedTuple):
    text: str
    #: Whether the same settings will fail again.
    permanent: bool


def explain(failed: Failure | BaseException, url: str | None) -> ConnectionFailed:
    """Tell why an attempt to connect to ``url`` failed; ``__cause__`` is the original exception.

    An error of this package stays as it is, except that a `ConnectionLost` whose cause is a refused TLS
    handshake becomes `TLSFailed`: a protocol learns of the handshake only through its ``connectionLost``.
    """
    cause = failed.value if isinstance(failed, Failure) else failed
    assert cause is not None
    if isinstance(cause, ConnectionFailed):
        trouble = None
        if type(cause) in (ConnectionFailed, ConnectionLost) and cause.__cause__ is not None:
            trouble = _tls_trouble(cause.__cause__)
        if trouble is None:
            cause.url = cause.url or url
            return cause
        cause = cause.__cause__
        assert cause is not None
    else:
        trouble = _tls_trouble(cause)
    explained: ConnectionFailed
    if trouble is not None:
        explained = TLSFailed(trouble.text, url=url)
        explained.permanent = trouble.permanent
    elif isinstance(cause, defer.CancelledError | error.ConnectingCancelledError):
        explained = ServerUnreachable("the attempt to connect was given up", url=url)
    elif isinstance(cause, error.ConnectionClosed) or type(cause).__module__ == "OpenSSL.SSL":
        explained = ConnectionLost(f"the connection was closed: {text_of(cause)}", url=url)
    elif isinstance(cause, error.ConnectError | OSError):
        explained = ServerUnreachable(f"cannot connect: {text_of(cause)}", url=url)
    else:
        explained = ConnectionFailed(f"cannot connect: {text_of(cause)}", url=url)
    explained.__cause__ = cause
    return explained


def text_of(cause: BaseException) -> str:
    """Give what an exception says in words: pyOpenSSL's errors hold tuples."""
    text = "; ".join(_reasons(cause)) if type(cause).__module__ == "OpenSSL.SSL" else str(cause)
    return text.strip().rstrip(".") or type(cause).__name__


def _tls_trouble(cause: BaseException) -> _Trouble | None:
    """Say what is wrong with TLS, or None where the error is not TLS's.

    Whoever can raise these errors has imported their modules; nothing is imported here.
    """
    identity = sys.modules.get("service_identity")
    if identity is not None and isinstance(cause, identity.CertificateError):
        return _Trouble(f"the server's certificate cannot be checked for its name: {cause}", permanent=True)
    if identity is not None and isinstance(cause, identity.VerificationError):
        names = ", ".join(_mismatches(cause)) or "this server"
        return _Trouble(
            f"the server's certificate is not valid for {names}; if it carries another name on purpose, "
            "say which in the TLS settings (server_hostname)",
            permanent=True,
        )
    openssl = sys.modules.get("OpenSSL.SSL")
    if openssl is None or not isinstance(cause, openssl.Error):
        return None
    if isinstance(cause, openssl.SysCallError | openssl.ZeroReturnError):
        return None
    reasons = list(_reasons(cause))
    text = "; ".join(reasons) or "the TLS handshake failed"
    if "unexpected eof" in text:
        return None
    if "certificate verify failed" in text:
        return _Trouble(f"the server's certificate is not trusted: {text}", permanent=True)
    if any(reason in text for reason in _NOT_TLS):
        return _Trouble(f"the server does not speak TLS on this port: {text}", permanent=True)
    passing = any(reason in text for reason in _PASSING)
    return _Trouble(f"the TLS handshake failed: {text}", permanent=not passing)


def _reasons(cause: BaseException) -> Iterator[str]:
    """Pick the readable part out of pyOpenSSL's list of (library, function, reason), or of an error number and its name."""
    for entries in cause.args:
        for entry in entries if isinstance(entries, list) else [entries]:
            reason = entry[-1] if isinstance(entry, tuple) else entry
            if reason and isinstance(reason, str):
                yield reason


def _mismatches(cause: BaseException) -> Iterator[str]:
    """Name the identities that service_identity looked for in vain."""
    for mismatch in getattr(cause, "errors", ()):
        wanted = getattr(mismatch, "mismatched_id", None)
        name = getattr(wanted, "hostname", None) or getattr(wanted, "ip", None)
        yield name.decode("ascii", "replace") if isinstance(name, bytes) else str(name)
