"""How to log in to an AMQP server, and the limits of a connection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["ConnectionConfig"]


@dataclass(frozen=True)
class ConnectionConfig:
    """What a connection is opened with. The address and TLS belong to the endpoint."""

    username: str = "guest"
    #: Or what returns it: asked for every attempt.
    password: str | Callable[[], str] = field(default="guest", repr=False)  # RabbitMQ's own default
    virtual_host: str = "/"
    #: ``PLAIN``, ``AMQPLAIN``, ``EXTERNAL``, or another that ``login_response`` is for (``broker_login_method``).
    #: None: the first of these three that the server offers, PLAIN being kombu's default as well.
    login_method: str | None = None
    #: Sent as it is instead of user name and password.
    login_response: bytes | None = field(default=None, repr=False)
    #: Seconds between signs of life (``broker_heartbeat``); whole ones on the wire, rounded up. 0: none are asked for.
    heartbeat: float = 60
    #: Bytes; the lower of ours and the server's holds. 0: as the server says.
    frame_max: int = 131072
    #: The lower of ours and the server's holds. 0: as the server says.
    channel_max: int = 2047
    #: Told to the server beside our own; shown by its management tools.
    client_properties: Mapping[str, Any] = field(default_factory=dict)
    #: Bytes; of a larger message the body is thrown away as it comes. RabbitMQ's own ``max_message_size`` was this up to 3.13.
    max_body_size: int = 128 * 1024 * 1024
    #: Seconds that the server may take for an answer to a method (``queue.declare`` ...) while it gives signs of life; 0: any time.
    declare_timeout: float = 30.0
    #: For error messages, without the password.
    url: str = ""

    def __post_init__(self) -> None:
        """Refuse what AMQP cannot express."""
        if self.frame_max and self.frame_max < 4096:
            raise ValueError(f"frame_max is {self.frame_max}; AMQP demands 4096 bytes at least")
        if not 0 <= self.channel_max <= 65535:
            raise ValueError(f"channel_max is {self.channel_max}, not within 0 and 65535")
        if not 0 <= self.heartbeat <= 65535:
            raise ValueError(f"heartbeat is {self.heartbeat}, not within 0 and 65535 seconds")
