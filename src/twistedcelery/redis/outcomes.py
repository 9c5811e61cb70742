"""What the answer to a command means for whoever waits for its outcome, in the words of `interfaces.Done`."""

from __future__ import annotations

from ..errors import AuthenticationFailed, ConnectionFailed, ConnectionLost, NotSent
from .replies import NotMaster, NotNow, OutOfRoom

__all__ = ["outcome_of", "passing"]


def passing(error: Exception) -> bool:
    """Whether the server itself says that it cannot do it now and may later."""
    return isinstance(error, NotNow | NotMaster | OutOfRoom)


def outcome_of(error: Exception) -> Exception:
    """Give the error for `interfaces.Done`: what may be sent again is `NotSent` or `ConnectionLost`."""
    if isinstance(error, OutOfRoom):
        # An error reply means that the command was not carried out.
        again: Exception = NotSent(error.message, url=error.url)
    elif isinstance(error, ConnectionFailed) and not isinstance(error, AuthenticationFailed | ConnectionLost):
        again = ConnectionLost(error.message, url=error.url)
    else:
        return error
    again.__cause__ = error
    return again
