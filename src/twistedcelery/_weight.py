"""Whether a call is too big to be captured on the reactor thread."""

from __future__ import annotations

from itertools import islice
from typing import Any

from celery.canvas import Signature

__all__ = ["is_big"]

#: Messages: each takes about 0.1 ms to capture.
MANY = 50

#: Items, and bytes of text, that arguments may have: serializing more takes milliseconds.
ITEMS = 5000
BYTES = 500_000

#: Types that weigh next to nothing.
_LIGHT = frozenset({int, float, bool, type(None)})


def is_big(signature: Any, args: Any, kwargs: Any) -> bool:
    """Whether capturing the call would hold the reactor for more than a few milliseconds.

    An estimate that is quick to make: a canvas is big with more than 50 tasks, arguments are with more than
    5,000 items or 500,000 characters.
    """
    if isinstance(signature, Signature) and (_tasks(signature, MANY) > MANY or _heavy(signature)):
        return True
    return bool(args or kwargs) and _heavy((args, kwargs))


def _tasks(signature: Any, most: int) -> int:
    """Count the tasks of a canvas, up to a little more than ``most``."""
    if not isinstance(signature, dict):
        return 1
    kind = signature.get("subtask_type")
    given = signature.get("kwargs") or {}
    if kind == "chord":
        return _count(given.get("header"), most) + _tasks(given.get("body"), most)
    if kind in ("group", "chain"):
        return _count(given.get("tasks"), most)
    if signature.get("task") == "celery.chunks":
        # Celery gives these no kind.
        return _chunks(given.get("it"), given.get("n"), most)
    return 1


def _count(tasks: Any, most: int) -> int:
    if isinstance(tasks, dict):
        return _tasks(tasks, most)
    total = 0
    # Celery keeps what it has taken from a generator, so that looking at the first ones loses none.
    for task in islice(tasks or (), most + 1):
        total += _tasks(task, most)
        if total > most:
            break
    return total


def _chunks(items: Any, size: Any, most: int) -> int:
    try:
        # What was an iterator is a list of Celery's own kind now, that has no length before it is used up.
        return -(-len(items) // int(size)) if type(items) in (list, tuple) else most + 1
    except (TypeError, ValueError, ZeroDivisionError):
        # Nonsense, which Celery refuses.
        return most + 1


def _heavy(value: Any) -> bool:
    """Whether a value has more items or more text than may be serialized on the reactor thread."""
    items, size = 0, 0
    waiting = [value]
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind in _LIGHT:
            continue
        if kind is str or kind is bytes:
            size += len(value)
        elif isinstance(value, dict):
            items += len(value)
            if items <= ITEMS:
                waiting.extend(value)
                waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            items += len(value)
            if items <= ITEMS:
                waiting.extend(value)
        if items > ITEMS or size > BYTES:
            return True
    return False
