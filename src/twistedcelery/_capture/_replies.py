"""Where replies go: signatures that were frozen outside a capture name the queue that stock Celery would read."""

from __future__ import annotations

from typing import Any

__all__ = ["redirect"]

#: Where a message embeds signatures (message protocol 2's third part of the body; protocol 1's body).
_EMBEDDED = ("callbacks", "errbacks", "chain", "chord")

#: The arguments of canvas primitives that are signatures.
_PARTS = {"chain": ("tasks",), "group": ("tasks",), "chord": ("header", "body")}


def redirect(message: Any, stock: str, ours: str) -> None:
    """Have a task message, and all signatures that it embeds, reply to ``ours`` where they would to ``stock``."""
    if message.properties.get("reply_to") == stock:
        message.properties["reply_to"] = ours
    body = message.body
    embedding = body if isinstance(body, dict) else body[2]
    for name in _EMBEDDED:
        found = embedding.get(name)
        if found:
            _redirect(found, stock, ours)


def _redirect(found: Any, stock: str, ours: str) -> None:
    """Walk a signature, which is a dict, or any nesting of them."""
    if not isinstance(found, dict):
        for one in found:
            _redirect(one, stock, ours)
        return
    options = found.get("options") or {}
    if options.get("reply_to") == stock:
        options["reply_to"] = ours
    for where, names in (
        (options, ("link", "link_error", "chord")),
        (found.get("kwargs") or {}, _PARTS.get(found.get("subtask_type") or "", ())),
    ):
        for name in names:
            inner = where.get(name)
            if inner:
                _redirect(inner, stock, ours)
