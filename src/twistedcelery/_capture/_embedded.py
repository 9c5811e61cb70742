"""The signatures that a message carries with it: what follows its task, each a dict, in any nesting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["embedded", "redirect"]

#: Where a message embeds signatures (message protocol 2's third part of the body; protocol 1's body).
_EMBEDDED = ("callbacks", "errbacks", "chain", "chord")

#: The arguments of canvas primitives that are signatures.
_PARTS = {"chain": ("tasks",), "group": ("tasks",), "chord": ("header", "body")}


def embedded(body: Any) -> Iterator[dict[str, Any]]:
    """Yield every signature that the body of a task message embeds."""
    embedding = body if isinstance(body, dict) else body[2]
    for name in _EMBEDDED:
        found = embedding.get(name)
        if found:
            yield from _walk(found)


def _walk(found: Any) -> Iterator[dict[str, Any]]:
    if isinstance(found, str):
        raise TypeError(f"{found!r} is no signature: link and link_error take signatures")
    if not isinstance(found, dict):
        for one in found:
            yield from _walk(one)
        return
    yield found
    options = found.get("options") or {}
    for where, names in (
        (options, ("link", "link_error", "chord")),
        (found.get("kwargs") or {}, _PARTS.get(found.get("subtask_type") or "", ())),
    ):
        for name in names:
            inner = where.get(name)
            if inner:
                yield from _walk(inner)


def redirect(options: dict[str, Any], stock: str, ours: str) -> None:
    """Have what these are the options of reply to ``ours`` where it would to ``stock``."""
    if options.get("reply_to") == stock:
        options["reply_to"] = ours
