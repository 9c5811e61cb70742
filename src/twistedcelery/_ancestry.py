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
                # Not +=: Celery's own kind of list, of a group that came from a generator, would make it one of its own.
                waiting.extend(node.results)  # type: ignore[attr-defined]  # groups have them
            node = node.parent


def before(node: Any, group: type) -> Iterator[tuple[Any, bool]]:
    """Yield the tasks before a node, each once, and whether it is in the header of a chord; ``group`` is the class of groups.

    Where a task of a header fails, workers say so in the body's name, but not every version of them, and not for every body.
    """
    ancestors = []
    parent = node.parent
    while parent is not None:
        ancestors.append(parent)
        parent = parent.parent
    # By task id: what stands before a group may stand before its members as another object.
    seen = {node.id, *(ancestor.id for ancestor in ancestors)}
    for ancestor in ancestors:
        if not isinstance(ancestor, group):
            yield ancestor, False
            continue
        for member in ancestor.results:  # type: ignore[attr-defined]  # as above
            for task in whole(member, group):
                if task.id not in seen and not isinstance(task, group):
                    seen.add(task.id)
                    yield task, True
