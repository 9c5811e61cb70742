"""Every error of the package, in one tree.

::

    TwistedCeleryError
    |-- ConnectionFailed            (kombu OperationalError)  no connection to the server, or it broke
    |   |-- ServerUnreachable                 refused, name not found, timed out
    |   |-- AuthenticationFailed              the server refuses user or password
    |   |-- VirtualHostNotFound               the server has no such virtual host or database, or denies it
    |   |-- TLSFailed                         the certificate or the TLS handshake is refused
    |   |-- ConnectionLost                    an open connection ended
    |   `-- ProtocolError                     bytes that the protocol forbids
    |       |-- LocalProtocolError            our side was asked for something impossible
    |       `-- RemoteProtocolError           the peer sent something impossible
    |-- SendFailed                  (kombu OperationalError)  a call did not reach the broker for certain
    |   |-- NotSent                           no byte of the message left, the task will not run
    |   |   `-- OutboxFull                    the outbox is at its bound
    |   |-- OutcomeUnknown                    bytes left, no confirm came: the task may run
    |   |-- Unroutable                        the broker returned the message: no queue takes it
    |   `-- Refused                           the broker refused the message or a declaration
    |-- ResultError
    |   |-- ResultTimeout           (celery TimeoutError)     no result in time
    |   |-- ResultLost                        the result is known to be lost
    |   `-- ResultNotKept                     nobody keeps a result for this call
    |-- WouldBlock                  (RuntimeError)            a blocking habit on the reactor thread
    |-- WrongThread                 (RuntimeError)            called outside the reactor thread
    `-- Stopped                     (RuntimeError)            called after stopService

Errors that a Celery user already catches keep Celery's or kombu's class as a base.
"""

from __future__ import annotations

from celery.exceptions import TimeoutError as CeleryTimeoutError
from kombu.exceptions import OperationalError

__all__ = [
    "AuthenticationFailed",
    "ConnectionFailed",
    "ConnectionLost",
    "LocalProtocolError",
    "NotSent",
    "OutboxFull",
    "OutcomeUnknown",
    "ProtocolError",
    "Refused",
    "RemoteProtocolError",
    "ResultError",
    "ResultLost",
    "ResultNotKept",
    "ResultTimeout",
    "SendFailed",
    "ServerUnreachable",
    "Stopped",
    "TLSFailed",
    "TwistedCeleryError",
    "Unroutable",
    "VirtualHostNotFound",
    "WouldBlock",
    "WrongThread",
]


class TwistedCeleryError(Exception):
    """The base of every error that this package raises itself.

    A task's own exception is not one of these: it reaches the caller as it is.
    """

    #: The id of the task that the failed call would have run, where there is one.
    task_id: str | None
    #: The server concerned, as a URL without its password.
    url: str | None

    def __init__(self, message: str, *, task_id: str | None = None, url: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.task_id = task_id
        self.url = url

    def __str__(self) -> str:
        where = [f"task {self.task_id}"] if self.task_id else []
        if self.url:
            where.append(self.url)
        return f"{self.message} [{', '.join(where)}]" if where else self.message


class ConnectionFailed(TwistedCeleryError, OperationalError):
    """There is no connection to the server, or there is none any more.

    ``permanent`` is true where another attempt with the same settings cannot succeed.
    """

    permanent = False


class ServerUnreachable(ConnectionFailed):
    """No connection could be made: refused, unknown host name, no answer in time."""


class AuthenticationFailed(ConnectionFailed):
    """The server does not accept the user name, the password or the login method."""

    permanent = True


class VirtualHostNotFound(ConnectionFailed):
    """The server has no such virtual host (AMQP) or database (Redis), or denies this user access to it."""

    permanent = True


class TLSFailed(ConnectionFailed):
    """The TLS handshake failed, for example because the server's certificate could not be verified."""

    permanent = True


class ConnectionLost(ConnectionFailed):
    """A connection that was open has ended: closed by the server, cut, or silent for too long."""

    #: AMQP reply code with which the server has closed it (320 CONNECTION_FORCED, 541 INTERNAL_ERROR ...), or 0.
    code = 0


class ProtocolError(ConnectionFailed):
    """Something that the wire protocol forbids."""


class LocalProtocolError(ProtocolError):
    """This side was asked to send something that the protocol forbids in the present state."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol forbids; the connection is dropped."""


class SendFailed(TwistedCeleryError, OperationalError):
    """The broker is not known to have the task's message."""

    #: Whether somebody has been told; the drop-in has several results for one call.
    seen = False


class NotSent(SendFailed):
    """No byte of the message left in time: the task will not run because of this call."""


class OutboxFull(NotSent):
    """The outbox holds as many calls or bytes as it may; nothing was queued."""


class OutcomeUnknown(SendFailed):
    """The message left, but no confirm came: the task may run or may not."""


class Unroutable(SendFailed):
    """The broker returned the message, because no queue is bound that would take it."""

    def __init__(
        self,
        message: str,
        *,
        code: int = 312,
        exchange: str = "",
        routing_key: str = "",
        task_id: str | None = None,
        url: str | None = None,
    ) -> None:
        super().__init__(message, task_id=task_id, url=url)
        #: AMQP reply code, 312 (NO_ROUTE) or 313 (NO_CONSUMERS).
        self.code = code
        self.exchange = exchange
        self.routing_key = routing_key


class Refused(SendFailed):
    """The broker refused the message, or a declaration that the message needs, and said why."""

    def __init__(
        self, message: str, *, code: int = 0, task_id: str | None = None, url: str | None = None
    ) -> None:
        super().__init__(message, task_id=task_id, url=url)
        #: AMQP reply code (404 NOT_FOUND, 406 PRECONDITION_FAILED ...), or 0 for a plain refusal.
        self.code = code


class ResultError(TwistedCeleryError):
    """The call was sent, but its result cannot be given."""


class ResultTimeout(ResultError, CeleryTimeoutError):  # type: ignore[misc]  # untyped base
    """No result came in time. The task may still be running."""


class ResultLost(ResultError):
    """The result is known to be lost, for example with the reply queue that held it."""


class ResultNotKept(ResultError):
    """Nobody keeps a result for this call: ``ignore_result``, or an app without a result backend."""


class WouldBlock(TwistedCeleryError, RuntimeError):
    """A call that waits for the network, made where waiting would stop the reactor."""


class WrongThread(TwistedCeleryError, RuntimeError):
    """The API belongs to the reactor thread; use ``reactor.callFromThread`` or ``blockingCallFromThread``."""


class Stopped(TwistedCeleryError, RuntimeError):
    """The service has been stopped and takes no more calls."""
