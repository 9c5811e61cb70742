"""What stands before a result: the tasks whose failure means that it will never come.

For Celery's results, the drop-in's, and our handles alike: a node has a ``parent``, and a group of them ``results``.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from celery.exceptions import ChordError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

__all__ = [
    "Header",
    "Known",
    "Line",
    "Member",
    "Stretch",
    "failed_step",
    "first_failure",
    "has_header",
    "ids",
    "is_settled",
    "line_of",
    "stored_failure",
    "stretches",
    "whole",
]


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


class Member(NamedTuple):
    """A task of a chord's header, with what stands before it there."""

    id: str
    line: Line


class Header:
    """The header of a chord: its tasks in order, those of groups within it too."""

    __slots__ = ("_passed", "chord", "members")

    def __init__(self, chord: str, members: list[Member]) -> None:
        #: The id of the header's group, by which workers call the chord.
        self.chord = chord
        self.members = members
        #: How many of the first ones are known to have succeeded.
        self._passed = 0

    def is_settled(self, known: Known) -> bool | None:
        """Whether the first failure in it is certain, whatever else becomes known; None: all have succeeded."""
        members = self.members
        while self._passed < len(members):
            error = _of_member(members[self._passed], known)
            if error is not None:
                return error is not _UNKNOWN
            self._passed += 1
        return None

    def first_failure(self, known: Known) -> tuple[str, BaseException] | None:
        """Return the first of its members that is known to have failed, and with what."""
        for member in islice(self.members, self._passed, None):
            error = _of_member(member, known)
            if error is not None and error is not _UNKNOWN:
                return member.id, error
        return None


#: What stands before a task, the first of all first: tasks and headers.
Line: TypeAlias = "list[str | Header]"

#: How tasks have ended, by id: the exception, or None.
Known: TypeAlias = "dict[str, BaseException | None]"

#: Of a task that is not known to have ended.
_UNKNOWN = Exception()

#: Of most tasks; never changed.
_NOTHING: Line = []


def _of_member(member: Member, known: Known) -> BaseException | None:
    error = known.get(member.id, _UNKNOWN)
    if error is _UNKNOWN and member.line:
        return stored_failure(member.line, known) or _UNKNOWN
    return error


def has_header(line: Line) -> bool:
    """Whether there is a chord in it."""
    return any(isinstance(step, Header) for step in line)


def ids(line: Line) -> Iterator[str]:
    """Yield the ids of all its tasks, in order."""
    for step in line:
        if isinstance(step, Header):
            for member in step.members:
                yield from ids(member.line)
                yield member.id
        else:
            yield step


def failed_step(line: Line, known: Known) -> BaseException | None:
    """Return the exception of the first task that has failed, other than those of headers: workers tell the tasks behind it."""
    for step in line:
        error = None if isinstance(step, Header) else known.get(step)
        if error is not None:
            return error
    return None


def is_settled(line: Line, known: Known) -> bool | None:
    """Whether `first_failure` is certain, whatever else becomes known; None: nothing in it is known to have failed."""
    for step in line:
        if isinstance(step, Header):
            settled = step.is_settled(known)
            if settled is not None:
                return settled
        elif known.get(step) is not None:
            return True
    return None


def first_failure(line: Line, known: Known) -> tuple[BaseException, str | None] | None:
    """Return the exception of the first task that is known to have failed, and for one of a header what says where that is."""
    for step in line:
        if isinstance(step, Header):
            found = step.first_failure(known)
            if found is not None:
                return found[1], f"Raised by task {found[0]} in the header of chord {step.chord}."
        else:
            error = known.get(step)
            if error is not None:
                return error, None
    return None


def stored_failure(line: Line, known: Known) -> BaseException | None:
    """Return what workers store in the name of a task that never runs because of a failure before it, where that is certain."""
    error = failed_step(line, known)
    if error is not None:
        return error
    for step in line:
        found = step.first_failure(known) if isinstance(step, Header) and step.is_settled(known) else None
        if found is not None:
            # Celery's words.
            failure: BaseException = ChordError(f"Dependency {found[0]} raised {found[1]!r}")
            failure.__cause__ = found[1]
            return failure
    return None


def line_of(node: Any, group: Any, above: Collection[str] = ()) -> Line:
    """Return what stands before a node, up to those that are ``above``; ``group`` is the class of groups."""
    found: list[Any] = []
    parent = node.parent
    # By id: what stands before a group may stand before its members as another object.
    while parent is not None and parent.id not in above:
        found.append(parent)
        parent = parent.parent
    if not found:
        return _NOTHING
    found.reverse()
    inner = {node.id, *above, *(one.id for one in found)} - {None}
    line: Line = []
    for step in found:
        if isinstance(step, group):
            line.append(Header(step.id, list(_members(step, group, inner, _NOTHING))))
        else:
            line.append(step.id)
    return line


def _members(header: Any, group: Any, above: Collection[str], before: Line) -> Iterator[Member]:
    for member in header.results:
        line = line_of(member, group, above)
        if before:
            line = [*before, *line]
        if isinstance(member, group):
            yield from _members(member, group, above, line)
        else:
            yield Member(member.id, line)


class Stretch:
    """What stands before some of the tasks of a wait."""

    __slots__ = ("done", "line", "tasks")

    def __init__(self, line: Line, tasks: list[str] | None) -> None:
        self.line = line
        #: Those that never run if it fails; None: all.
        self.tasks = tasks
        #: Whether it has failed, and they are told.
        self.done = False


def stretches(node: Any, group: Any) -> list[Stretch]:
    """Return what stands before a node, and for a group what stands before each of its members besides."""
    line = line_of(node, group)
    found = [Stretch(line, None)] if line else []
    if isinstance(node, group):
        above = {node.id}
        parent = node.parent
        while parent is not None:
            above.add(parent.id)
            parent = parent.parent
        above.discard(None)
        waiting = list(node.results)
        for member in waiting:
            line = line_of(member, group, above)
            within = isinstance(member, group)
            if line:
                found.append(Stretch(line, list(_tasks(member, group)) if within else [member.id]))
            if within:
                waiting.extend(member.results)
    return found


def _tasks(node: Any, group: Any) -> Iterator[str]:
    for member in node.results:
        if isinstance(member, group):
            yield from _tasks(member, group)
        else:
            yield member.id
