"""What stands before a result: the tasks whose failure means that it will never come.

For Celery's results, the drop-in's, and our handles alike: a node has a ``parent``, and a group of them ``results``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["before", "whole"]


def whole(node: Any, group: type) -> Iterator[Any]:
    """Yield everything that a result stands for, each once: itself, members of groups, and what is before each of them."""
    seen: set[int] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        while node is not None and id(node) not in seen:
            seen.add(id(node))
            yield node
            if isinstance(node, group):
                waiting += node.results  # type: ignore[attr-defined]  # groups have them
            node = node.parent


def before(node: Any, group: type) -> Iterator[Any]:
    """Yield the tasks before a node, the nearest first; ``group`` is the class of groups.

    The header of a chord is left out: where one of its tasks fails, the workers say so with the body's ChordError. They
    do not where the task is itself the body of a chord, within the header: Celery's clients look there too, and so do these.
    """
    node = node.parent
    while node is not None:
        if isinstance(node, group):
            yield from _chords(node, group)
        else:
            yield node
        node = node.parent


def _chords(header: Any, group: type) -> Iterator[Any]:
    """Yield the bodies of chords within a header."""
    for member in header.results:
        node = member
        while node is not None:
            if isinstance(node, group):
                yield from _chords(node, group)
            elif isinstance(node.parent, group):
                yield node
            node = node.parent
