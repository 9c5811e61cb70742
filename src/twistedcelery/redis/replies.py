"""What Redis's error replies mean for whoever sent the command.

A reply such as ``-LOADING Redis is loading the dataset in memory`` begins with a code word; the words
are the protocol (redis.io, "Redis serialization protocol", simple errors). An error reply always means
that the command itself was **not** carried out.
"""

from __future__ import annotations

from ..errors import AuthenticationFailed, NotSent, Refused, ServerUnreachable, TwistedCeleryError

__all__ = ["MISPLACED_CREDENTIALS", "CommandRefused", "NotMaster", "NotNow", "OutOfRoom", "server_error"]

#: Redis 5 about ``AUTH user password``: it knows the password alone.
MISPLACED_CREDENTIALS = "ERR wrong number of arguments for 'auth' command"


class NotNow(NotSent):
    """The server cannot do it at the moment, and has not: wait a little and send it again."""


class NotMaster(NotSent):
    """The server has become a replica and takes no writes: connect again, to the new master."""


class CommandRefused(Refused):
    """The server refuses this command for good: wrong type of key, no permission, unknown command."""


class OutOfRoom(Refused):
    """The server has no memory or disk left, or too few replicas; it may have again later."""


#: Code word -> error. What is not here is refused for good.
_MEANINGS: dict[str, type[TwistedCeleryError]] = {
    "NOAUTH": AuthenticationFailed,
    "WRONGPASS": AuthenticationFailed,
    "DENIED": AuthenticationFailed,  # protected mode: no password set, and we are not on its loopback
    "LOADING": NotNow,
    "BUSY": NotNow,  # a script runs
    "MASTERDOWN": NotNow,
    "TRYAGAIN": NotNow,
    "CLUSTERDOWN": NotNow,
    "READONLY": NotMaster,
    "UNBLOCKED": NotMaster,  # a blocking command, ended because the server became a replica
    "OOM": OutOfRoom,
    "MISCONF": OutOfRoom,
    "NOREPLICAS": OutOfRoom,
}


def server_error(text: str) -> TwistedCeleryError:
    """Make the error for an error reply, its text without the leading ``-``."""
    word = text.split(" ", 1)[0]
    if word == "ERR" and text.startswith("ERR Error running script"):
        # Before Redis 7 the error of a command within a script comes as a part of the text.
        word = text.rpartition(": -")[2].split(" ", 1)[0]
    meaning = _MEANINGS.get(word)
    if meaning is None:
        meaning = ServerUnreachable if text.startswith("ERR max number of clients") else CommandRefused
    return meaning(text)
