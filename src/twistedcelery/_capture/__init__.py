"""Celery's code in, operations out: no sockets, no reactor.

`Capture` runs any of Celery's calling functions unmodified and returns what it would have sent. The seams
are attributes of one app instance (its producer pool, its connection pool, its message sender, its backend); outside a
capture they answer as stock Celery does.
"""

from __future__ import annotations

from ._backend import inert_backend
from ._capture import Capture, Captured
from ._options import amqp_properties
from ._scope import Pauses, recorder

__all__ = ["Capture", "Captured", "Pauses", "amqp_properties", "inert_backend", "recorder"]
