"""Canvases, and what of them runs: links, error callbacks and tasks that run once; for ``test_canvas.py``.

A case is a function from the tests' tasks and a `Book`, in which its tasks write, to three things: the
canvas, its value or the type of its error, and the lines of the book in the end, a tuple where their order
counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import VERSION, chain, chord, group
from celery.exceptions import ChordError
from kombu.utils.uuid import uuid

from tests.integration.canvas_cases import Stamp

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration._places import Tasks

__all__ = ["CHORD_RUNS", "ERRBACKS", "HEADER_RUNS", "RUNS", "Book"]


Run = Callable[["Tasks", "Book"], tuple[Any, Any, "list[str] | tuple[str, ...]"]]


class Book:
    """A file that tasks write in.

    Attributes:
        id: a task's id, for a signature's option ``task_id``; it is written as "id".

    """

    def __init__(self, tasks: Tasks, path: Path) -> None:
        self._tasks = tasks
        self.path = path
        self.id = uuid()

    def note(self, text: str) -> Any:
        """Make a signature that writes a text, and takes no arguments."""
        return self._tasks.record.si(str(self.path), text)

    def errbacks(self) -> list[Any]:
        """Make an error callback of each kind: given nothing, the failed task's id, and its request."""
        path = str(self.path)
        return [
            self.note("error"),
            self._tasks.record_error.s(path=path),
            self._tasks.record_failure.s(path=path),
        ]

    def lines(self) -> list[str]:
        """What has been written."""
        text = self.path.read_text() if self.path.exists() else ""
        return text.replace(self.id, "id").splitlines()


def _linked(canvas: Any, *callbacks: Any) -> Any:
    for callback in callbacks:
        canvas.link(callback)
    return canvas


def _guarded(canvas: Any, *errbacks: Any) -> Any:
    for errback in errbacks:
        canvas.link_error(errback)
    return canvas


def _named(t: Tasks, name: str, *args: Any) -> Any:
    """A signature that knows nothing but its task's name."""
    return t._app.signature(f"tests.{name}", args=args, immutable=True)


def _stamped(canvas: Any) -> Any:
    canvas.stamp(visitor=Stamp(monitoring="here"))
    return canvas


def _failing(t: Tasks, book: Book) -> Any:
    """A task that fails, whose id is the book's."""
    return t.fail.si("failing").set(task_id=book.id)


#: What works with every result backend.
RUNS: dict[str, Run] = {
    "links_of_a_chains_members": lambda t, b: (
        chain(_linked(t.identity.si(7), b.note("linked")) for _ in range(5)),
        7,
        ["linked"] * 5,
    ),
    "error_links_of_a_chains_members": lambda t, b: (
        chain(_guarded(t.fail.si(), b.note("error")) for _ in range(5)),
        ValueError,
        ["error"],
    ),
    "links_of_a_groups_members": lambda t, b: (
        group(_linked(t.identity.si(7), b.note("linked")) for _ in range(5)),
        [7] * 5,
        ["linked"] * 5,
    ),
    "error_links_of_a_groups_members": lambda t, b: (
        group(_guarded(t.fail.si(), b.note("error")) for _ in range(5)),
        ValueError,
        ["error"] * 5,
    ),
    "links_of_an_inner_chain": lambda t, b: (
        chain(
            _guarded(_linked(chain(t.identity.s("a"), t.add.s("b")), b.note("linked")), b.note("never")),
            t.add.s("c"),
        ),
        "abc",
        ["linked"],
    ),
    "error_link_of_a_group_for_each_failure": lambda t, b: (
        _guarded(group([t.identity.si(1)] * 3 + [t.fail.si()] * 4), b.note("error")),
        ValueError,
        ["error"] * 4,
    ),
    "error_link_that_is_retried": lambda t, b: (
        t.fail.si().set(link_error=t.record_after_retry.si(str(b.path), "error")),
        ValueError,
        ["error"],
    ),
    "links_by_name": lambda t, b: (
        _linked(_named(t, "add", 1, 1), _named(t, "record", str(b.path), "linked")),
        2,
        ["linked"],
    ),
    "error_link_by_name": lambda t, b: (
        _guarded(_named(t, "fail"), _named(t, "record", str(b.path), "error")),
        ValueError,
        ["error"],
    ),
    "error_link_of_a_task": lambda t, b: (
        _guarded(_failing(t, b), *b.errbacks()),
        ValueError,
        ["error", "id", "id"],
    ),
    "error_link_of_a_chain": lambda t, b: (
        _guarded(chain(t.add.si(1, 1), _failing(t, b)), *b.errbacks()),
        ValueError,
        ["error", "id", "id"],
    ),
    "error_link_of_a_group_first": lambda t, b: (
        _guarded(group(_failing(t, b), t.identity.si(1)), *b.errbacks()),
        ValueError,
        ["error", "id", "id"],
    ),
    "error_link_of_a_group_last": lambda t, b: (
        _guarded(group(t.identity.si(1), _failing(t, b)), *b.errbacks()),
        ValueError,
        ["error", "id", "id"],
    ),
    "stamped_with_links_as_dicts": lambda t, b: (
        _stamped(t.identity.si(1).set(link=dict(b.note("linked")), link_error=dict(b.note("never")))),
        1,
        ["linked"],
    ),
    "stamped_with_error_links_as_dicts": lambda t, b: (
        _stamped(t.fail.si().set(link=dict(b.note("never")), link_error=dict(b.note("error")))),
        ValueError,
        ["error"],
    ),
}


def _inner(t: Tasks, *links: Any, error_links: tuple[Any, ...] = (), last: Any = None) -> Any:
    """A task whose place a chain takes that has links of its own."""
    instead = chain(t.identity.s(), last or t.identity.s())
    return t.replace_by.s(_guarded(_linked(instead, *links), *error_links))


#: What needs a result backend that keeps results.
CHORD_RUNS: dict[str, Run] = {
    "group_task_group": lambda t, b: (
        group([b.note("before")] * 3) | b.note("between") | group([b.note("after")] * 2),
        ["after"] * 2,
        ("before", "before", "before", "between", "after", "after"),
    ),
    "groups_in_a_row": lambda t, b: (
        chain(
            group(b.note("1"), b.note("2"), b.note("3")),
            group(b.note("4"), b.note("5"), b.note("6")),
            group(b.note("7")),
            group(b.note("8")),
            b.note("9"),
            t.identity.si("end"),
        ),
        "end",
        list("123456789"),
    ),
    "groups_in_a_row_to_a_group": lambda t, b: (
        chain(
            group(b.note("1"), b.note("2")),
            group(b.note("3"), b.note("4"), b.note("5")),
            group(b.note("6"), b.note("7"), b.note("8"), b.note("9")),
            # A group of one that becomes a chord's body is no group any more.
            group(t.identity.si("end")),
        ),
        "end",
        list("123456789"),
    ),
    "groups_in_a_row_to_a_task": lambda t, b: (
        chain(
            group(b.note("1"), b.note("2")),
            group(b.note("3"), b.note("4"), b.note("5")),
            group(b.note("6"), b.note("7"), b.note("8"), b.note("9")),
            t.identity.si("end"),
        ),
        "end",
        list("123456789"),
    ),
    "chord_to_groups": lambda t, b: (
        chain(
            chord(group(b.note("1"), b.note("2"), b.note("3")), group(b.note("4"), b.note("5"), b.note("6"))),
            group(b.note("7")),
            group(b.note("8")),
            b.note("9"),
            t.identity.si("end"),
        ),
        "end",
        list("123456789"),
    ),
    "chord_to_a_task_and_a_group": lambda t, b: (
        chain(
            chord(group(b.note("1"), b.note("2"), b.note("3")), group(b.note("4"), b.note("5"), b.note("6"))),
            b.note("7"),
            group(b.note("8")),
            b.note("9"),
            t.identity.si("end"),
        ),
        "end",
        list("123456789"),
    ),
    "replaced_in_its_own_order": lambda t, b: (
        chain(
            t.replace_by.si(
                chain(
                    b.note("1"),
                    t.replace_by.si(chain(b.note("2"), t.replace_by.si(b.note("3")), b.note("4"))),
                    b.note("5"),
                )
            ),
            b.note("6"),
        ),
        "6",
        ("1", "2", "3", "4", "5", "6"),
    ),
    "link_of_a_replacement": lambda t, b: (
        chain(t.identity.s("Hello "), _inner(t, b.note("inner")), t.add.s("world")),
        "Hello world",
        ["inner"],
    ),
    "links_of_a_chain_and_a_replacement": lambda t, b: (
        _linked(chain(t.identity.s("Hello "), _inner(t, b.note("inner")), t.add.s("world")), b.note("outer")),
        "Hello world",
        ["inner", "outer"],
    ),
    "error_link_of_a_replacement": lambda t, b: (
        chain(
            t.identity.s("Hello "),
            _inner(t, error_links=(b.note("inner"),), last=t.fail.si()),
            t.add.s("never"),
        ),
        ValueError,
        ["inner"],
    ),
    "error_links_of_a_chain_and_a_replacement": lambda t, b: (
        _guarded(
            chain(
                t.identity.s("Hello "),
                _inner(t, error_links=(b.note("inner"),), last=t.fail.si()),
                t.add.s("never"),
            ),
            b.note("outer"),
        ),
        ValueError,
        ["inner", "outer"],
    ),
    "link_of_a_chain_with_a_replaced_task": lambda t, b: (
        _linked(chain(t.replace.si(1, 2), t.identity.s()), b.note("linked")),
        3,
        ["linked"],
    ),
    "error_link_of_a_chain_with_a_replaced_task": lambda t, b: (
        _guarded(chain(t.replace.si(1, 2), t.fail.si()), b.note("error")),
        ValueError,
        ["error"],
    ),
    "link_of_a_replaced_task_in_a_chain": lambda t, b: (
        chain(_linked(t.replace.si(1, 2), b.note("linked")), t.identity.s()),
        3,
        ["linked"],
    ),
    "error_link_of_a_replaced_task_in_a_chain": lambda t, b: (
        chain(_guarded(t.replace_by.si(t.fail.si()), b.note("error")), t.identity.si(1)),
        ValueError,
        ["error"],
    ),
    "link_of_a_group_with_a_replaced_task": lambda t, b: (
        _linked(group(t.replace.si(1, 2), t.identity.si(7)), b.note("linked")),
        [3, 7],
        ["linked"],
    ),
    "error_link_of_a_group_with_a_replaced_task": lambda t, b: (
        _guarded(group(t.replace.si(1, 2), t.fail.si()), b.note("error")),
        ValueError,
        ["error"],
    ),
    "link_of_a_replaced_task_in_a_group": lambda t, b: (
        group(_linked(t.replace.si(1, 2), b.note("linked")), t.identity.si(7)),
        [3, 7],
        ["linked"],
    ),
    "error_link_of_a_replaced_task_in_a_group": lambda t, b: (
        group(_guarded(t.replace_by.si(t.fail.si()), b.note("error")), t.identity.si(7)),
        ValueError,
        ["error"],
    ),
    # A chord within a header fails its outer chord too, whose error callback runs once.
    "error_link_of_a_chord_of_a_chord": lambda t, b: (
        _guarded(
            chord(
                group(
                    [b.note("member"), chord([t.identity.si(1), t.fail.si()], b.note("never, the inner one"))]
                ),
                b.note("never, the outer one"),
            ),
            b.note("error"),
        ),
        ChordError,
        ["member", "error"],
    ),
}

if VERSION >= (5, 6):
    # Before, its last task runs twice.
    CHORD_RUNS["chord_of_two_groups_to_a_chain"] = lambda t, b: (
        chain(
            group(b.note("a"), b.note("a")) | group(b.note("a"), b.note("a")),
            b.note("a") | b.note("b"),
        ),
        "b",
        ["a"] * 5 + ["b"],
    )


def _body(t: Tasks, book: Book) -> Any:
    """A body that never runs, whose id is the book's."""
    return t.record.si(str(book.path), "never").set(task_id=book.id)


_TOLD = ["error", "id", "id"]

#: Error callbacks of chords: where the header fails they are told of the body, else of the failed task.
ERRBACKS: dict[str, Run] = {
    "header_task": lambda t, b: (chord([t.fail.si()], _body(t, b)), ValueError, _TOLD),
    "header_chain": lambda t, b: (
        chord([chain(t.identity.si(1), t.fail.si(), t.identity.si(1))], _body(t, b)),
        ValueError,
        _TOLD,
    ),
    "header_chain_last": lambda t, b: (
        chord([chain(t.identity.si(1), t.fail.si())], _body(t, b)),
        ValueError,
        _TOLD,
    ),
    "header_group": lambda t, b: (
        chord([group(t.identity.si(1), t.fail.si())], _body(t, b)),
        ValueError,
        _TOLD,
    ),
    "header_of_many": lambda t, b: (
        chord([group([t.identity.si(1)] * 3 + [t.fail.si() for _ in range(4)])], _body(t, b)),
        ValueError,
        _TOLD,
    ),
    "body_task": lambda t, b: (chord([t.identity.si(1)], _failing(t, b)), ValueError, _TOLD),
    "body_chain": lambda t, b: (
        chord([t.identity.si(1)], chain(t.identity.si(1), _failing(t, b), t.identity.si(1))),
        ValueError,
        _TOLD,
    ),
    "body_chain_last": lambda t, b: (
        chord([t.identity.si(1)], chain(t.identity.si(1), _failing(t, b))),
        ValueError,
        _TOLD,
    ),
    "body_group": lambda t, b: (
        chord([t.identity.si(1)], group(t.identity.si(1), _failing(t, b))),
        ValueError,
        _TOLD,
    ),
}


def _marked(t: Tasks, b: Book, good: int, bad: int) -> tuple[Any, Any, list[str]]:
    """A chord whose header and body have error links, each its own."""
    members = [t.identity.si(1) for _ in range(good)] + [t.fail.si() for _ in range(bad)]
    canvas = chord([_guarded(member, b.note("header")) for member in members], b.note("never"))
    canvas.body.link_error(b.note("body"))
    return canvas, ValueError, [*["header"] * bad, "body"]


def _upgraded(t: Tasks, b: Book, good: int, bad: int) -> tuple[Any, Any, list[str]]:
    """A chain that becomes a chord; its error link is everybody's."""
    members = [t.identity.si(1) for _ in range(good)] + [t.fail.si() for _ in range(bad)]
    return (
        _guarded(chain(group(members), b.note("never")), b.note("error")),
        ValueError,
        ["error"] * (bad + 1),
    )


#: With ``task_allow_error_cb_on_chord_header``.
HEADER_RUNS: dict[str, Run] = {
    "header_of_one": lambda t, b: _marked(t, b, 0, 1),
    "header_of_failures": lambda t, b: _marked(t, b, 0, 3),
    "header_with_a_failure": lambda t, b: _marked(t, b, 2, 1),
    "header_with_failures": lambda t, b: _marked(t, b, 2, 3),
    "chord": lambda t, b: (
        _guarded(chord([t.fail.si(), t.identity.si(1), t.fail.si()], b.note("never")), b.note("error")),
        ValueError,
        ["error"] * 3,
    ),
    "chain_of_failures": lambda t, b: _upgraded(t, b, 0, 3),
    "chain_with_a_failure": lambda t, b: _upgraded(t, b, 1, 1),
    "chain_with_failures": lambda t, b: _upgraded(t, b, 2, 3),
    "long_chain": lambda t, b: (
        _guarded(chain(t.identity.si(1), group(t.fail.si(), t.fail.si()), b.note("never")), b.note("error")),
        ValueError,
        ["error"] * 3,
    ),
}
