"""How the tests' workers say that they are ready: by the file that ``READY`` names in the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery.signals import worker_ready

__all__ = ["say_ready"]


@worker_ready.connect
def say_ready(sender: Any, **_: Any) -> None:
    """Make the file once the worker gets all that it should, broadcasts included.

    Over Redis a worker subscribes to those in the first turn of its event loop, which comes after ``worker_ready``; a timer
    that is set in that turn is due in a later one.
    """
    if path := os.environ.get("READY"):
        sender.hub.call_soon(sender.hub.call_later, 0.02, Path(path).touch)
