"""Canvases, and what each gives: run by ``test_canvas.py`` through `TwistedCelery` and through the drop-in.

A case is a function from the tests' tasks to a signature. What it has to give stands beside it: a value, or an error's type
and a part of its text.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from celery import VERSION, chain, chord, group
from celery.canvas import StampingVisitor, chunks
from celery.exceptions import ChordError, ImproperlyConfigured

from tests.support.tasks import CustomError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration._places import Tasks

__all__ = ["CHORDS", "CHORD_FAILURES", "FAILURES", "JOINED", "PLAIN", "Stamp"]


class Stamp(StampingVisitor):
    """Stamps every signature with a monitoring id."""

    def __init__(self, **stamps: Any) -> None:
        self.stamps = stamps

    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        return {**self.stamps, "stamped_headers": list(self.stamps)}


def _stamped(canvas: Any, **stamps: Any) -> Any:
    canvas.stamp(visitor=Stamp(**stamps))
    return canvas


def _set(canvas: Any, **options: Any) -> Any:
    return canvas.set(**options)


def _rebuilt(t: Tasks, canvas: Any) -> Any:
    """A signature from what JSON made of it."""
    return t._app.signature(json.loads(json.dumps(canvas)))


def _instead(t: Tasks, *values: Any) -> Any:
    """A task whose place a chain takes that gives its value."""
    return t.replace_by.s(*values, chain(t.identity.s(), t.identity.s()))


Case = tuple["Callable[[Tasks], Any]", Any]

#: What works with every result backend.
PLAIN: dict[str, Case] = {
    "signature": (lambda t: t.add.s(1, 2), 3),
    "signature_partial": (lambda t: t.add.s(2).clone((3,)), 5),
    "signature_immutable": (lambda t: t.add.si(1, 2), 3),
    "signature_kwargs": (lambda t: t.echo.s(1, a=2).clone((0,), {"b": 3}), [[0, 1], {"a": 2, "b": 3}]),
    "signature_from_dict": (lambda t: t._app.signature(dict(t.add.s(1, 2))), 3),
    "signature_by_name": (lambda t: t._app.signature("tests.add", args=(1, 2)), 3),
    "signature_with_options": (lambda t: t.add.s(1, 2).set(countdown=0.1, priority=3, expires=30), 3),
    "signature_of_bound_task": (lambda t: t.retry_then_succeed.s(2), 2),
    "chain": (lambda t: t.add.s(4, 4) | t.add.s(8) | t.add.s(16), 32),
    "chain_of_one": (lambda t: chain(t.add.s(3, 4)), 7),
    "chain_of_chain_of_one": (lambda t: chain([chain(t.identity.s(42))]), 42),
    "chain_of_chains": (lambda t: chain(chain(t.add.s(1, 1), t.add.s(2)), chain(t.add.s(3), t.add.s(4))), 11),
    "chain_immutable": (lambda t: chain(t.add.si(1, 1), t.add.si(5, 5)), 10),
    "chain_long": (lambda t: chain([t.add.s(0, 0), *[t.add.s(1)] * 30]), 30),
    "chain_rebuilt": (lambda t: _rebuilt(t, chain(t.add.s(1, 1), t.add.s(2))), 4),
    "chain_to_group": (lambda t: t.add.s(2, 2) | group(t.add.s(i) for i in range(4)), [4, 5, 6, 7]),
    "chain_to_group_of_chains": (
        lambda t: t.add.s(5, 6) | group((t.add.s(1) | t.add.s(2), t.add.s(3))),
        [14, 14],
    ),
    "chain_with_priorities": (lambda t: t.priority.s().set(priority=3) | t.priority.s().set(priority=5), 5),
    "group": (lambda t: group(t.add.s(i, i) for i in range(4)), [0, 2, 4, 6]),
    "group_from_list": (lambda t: group([t.identity.s(42), t.identity.s(43)]), [42, 43]),
    "group_of_one": (lambda t: group(t.identity.s(42)), [42]),
    "group_empty": (lambda t: group([]), []),
    "group_rebuilt": (lambda t: _rebuilt(t, group(t.add.s(1, 1), t.add.s(2, 2))), [2, 4]),
    "group_of_groups": (
        lambda t: group(
            t.add.si(1, 10), group(t.add.si(1, 100), group(t.add.si(1, 1000), t.add.si(1, 2000)))
        ),
        [11, 101, 1001, 2001],
    ),
    "group_of_chains": (lambda t: group(t.add.s(1, 1) | t.add.s(10), t.add.s(2, 2) | t.add.s(20)), [12, 24]),
    "group_of_chain_to_group": (
        lambda t: group(
            t.identity.si(1), chain(t.identity.si(5), group([t.identity.si(3), t.identity.si(4)]))
        ),
        [1, [3, 4]],
    ),
    "chunks": (lambda t: t.add.chunks([(i, i) for i in range(6)], 2), [[0, 2], [4, 6], [8, 10]]),
    "chunks_class": (lambda t: chunks(t.add.s(), [(1, 1), (2, 2)], 1), [[2], [4]]),
    "chunks_as_group": (lambda t: t.add.chunks([(i, i) for i in range(4)], 2).group(), [[0, 2], [4, 6]]),
    "map": (lambda t: t.identity.map([1, 2, 3]), [1, 2, 3]),
    "starmap": (lambda t: t.add.starmap([(2, 2), (4, 4)]), [4, 8]),
    "chain_to_map": (lambda t: t.add.s(1, 1) | t.identity.map([1, 2]), [1, 2]),
    "stamped": (lambda t: _stamped(t.add.si(1, 1), monitoring="one"), 2),
    "stamped_chain": (lambda t: _stamped(t.add.s(1, 1) | t.add.s(10), stamp=42), 12),
    "stamped_group": (lambda t: _stamped(group(t.add.s(1, 1), t.add.s(2, 2)), stamp=[4, 2]), [2, 4]),
    "chain_of_a_group": (lambda t: chain(group(t.identity.s(42), t.identity.s(43))), [42, 43]),
    "group_of_one_group": (lambda t: group(group(t.identity.s(42), t.identity.s(43))), [42, 43]),
    "group_of_one_chain_to_group": (lambda t: group(t.add.s(1, 2) | group(t.add.s(1), t.add.s(2))), [4, 5]),
    "group_large": (lambda t: group(t.identity.s(i) for i in range(300)), list(range(300))),
    "retried_with_expires": (lambda t: t.retry_then_succeed.s(1).set(expires=60), 1),
    "chain_of_chain_rebuilt": (lambda t: _rebuilt(t, chain(chain(t.add.s(1, 1), t.add.s(2)), t.add.s(3))), 7),
    "chain_to_group_rebuilt": (
        lambda t: _rebuilt(t, chain(t.add.s(1, 1), group(t.add.s(1), chain(t.add.s(2), t.add.s(3))))),
        [3, 7],
    ),
    "group_of_chain_rebuilt": (lambda t: _rebuilt(t, group(chain(t.add.s(1, 1), t.add.s(2)))), [4]),
    "group_of_group_rebuilt": (lambda t: _rebuilt(t, group(group(t.add.s(1, 1)), t.add.s(2, 2))), [2, 4]),
}

#: What needs a result backend that keeps results: chords, and tasks that are replaced (rpc replies of those go to their worker).
CHORDS: dict[str, Case] = {
    "group_added": (lambda t: group(t.add.s(1, 1)) | group(t.identity.si(7)), [7]),
    "chain_with_replaced": (
        lambda t: (
            chain(t.add.s(2, 2), t.add.s(4), t.replace.s(8), t.add.s(16)) | group(t.add.s(i) for i in (0, 1))
        ),
        [32, 33],
    ),
    "chain_last_replaced": (lambda t: chain(t.add.s(2, 2), t.replace.s(8)), 12),
    "replaced": (lambda t: t.replace.s(1, 2), 3),
    "replaced_by_a_replaced_chain": (lambda t: t.replace_twice.s(5), 7),
    "chord": (lambda t: chord([t.add.s(i, i) for i in range(4)], t.tsum.s()), 12),
    "chord_in_chain": (lambda t: chord([t.add.s(1, 1), t.add.s(2, 2)], t.tsum.s()) | t.add.s(4), 10),
    "chord_generator": (
        lambda t: chord((t.identity.si(i) for i in range(10)), t.identity.s()),
        list(range(10)),
    ),
    "chord_of_one": (lambda t: chord([t.add.s(2, 5)], t.add_to_all.s(9)), [16]),
    "group_of_one_with_body": (lambda t: group([t.add.s(2, 5)]) | t.add_to_all.s(9), [16]),
    "chord_empty": (lambda t: chord([], t.add_to_all.s(9)), []),
    "group_empty_with_body": (lambda t: group([]) | t.add_to_all.s(9), []),
    "chord_rebuilt": (lambda t: _rebuilt(t, chord([t.add.s(1, 1), t.add.s(2, 2)], t.tsum.s())), 6),
    "chord_partial": (
        lambda t: (group(t.add.s(i) for i in range(4)) | t.add_to_all.s(8)).clone((4,)),
        [12, 13, 14, 15],
    ),
    "chord_of_groups": (lambda t: chord((group(t.identity.s(1), t.identity.s(1)),), t.identity.s()), [1, 1]),
    "chord_body_chain": (lambda t: chord([t.add.s(1, 1), t.add.s(2, 2)], t.tsum.s() | t.add.s(10)), 16),
    "chord_body_group": (
        lambda t: chord([t.add.s(1, 1), t.add.s(2, 2)], group(t.tsum.s(), t.xsum.s())),
        [6, 6],
    ),
    "chord_to_group": (
        lambda t: (
            group(t.add.s(1, 1), t.add.s(1, 1)) | t.tsum.s() | t.add.s(1) | group(t.add.s(1), t.add.s(2))
        ),
        [6, 7],
    ),
    "chord_of_chords": (
        lambda t: chord(
            [chord([t.add.s(1, 2), t.add.s(3, 4)], t.add.s([5])), chord([t.add.s(6, 7)], t.add.s([10]))],
            t.add_to_all.s(["A"]),
        ),
        [[3, 7, 5, "A"], [13, 10, "A"]],
    ),
    "chords_in_depth": (
        lambda t: (
            group([group([group([group([t.add.s(1, 2)]) | t.add.s([3])]) | t.add.s([4])]) | t.add.s([5])])
            | t.add.s([6])
        ),
        [[[[3, 3], 4], 5], 6],
    ),
    "group_of_chords": (
        lambda t: group(chord(group(t.add.s(1, 2), t.add.s(3, 4)), t.tsum.s()) for _ in range(2)),
        [10, 10],
    ),
    "group_of_a_mixed_chord": (
        lambda t: group(
            (
                chord(
                    (
                        t.identity.si(42),
                        chain((t.identity.si(42),) * 5),
                        group((t.identity.si(42),) * 5),
                        chord((t.identity.si(42),) * 5, t.identity.si(1337)),
                    ),
                    t.identity.s(),
                ),
            )
        ),
        [[42, 42, 42, 42, 42, 42, 42, 1337]],
    ),
    "chain_group_chain": (
        lambda t: t.add.s(2, 2) | group(t.add.s(i) for i in range(4)) | t.add_to_all.s(8),
        [12, 13, 14, 15],
    ),
    "chain_of_groups": (
        lambda t: t.add.si(1, 0) | group(t.add.s(1), t.add.s(1)) | group(t.tsum.s(), t.tsum.s()) | t.tsum.s(),
        8,
    ),
    "chain_of_chords": (
        lambda t: (
            chain(
                chord(group(t.add.si(1, 0), t.add.si(1, 0)), t.tsum.s()),
                chord(group(t.add.s(1), t.add.s(1)), t.tsum.s()),
                chord(group(t.add.s(0), t.add.s(0)), t.tsum.s()),
            )
            | chain(
                chord(group(t.add.s(10), t.add.s(10)), t.tsum.s()),
                chord(group(t.add.s(0), t.add.s(0)), t.tsum.s()),
                chord(group(t.add.s(1), t.add.s(1)), t.tsum.s()),
            )
        ),
        178,
    ),
    "chain_chord_chain_chord": (
        lambda t: chain(
            t.identity.si(1),
            chord(
                [
                    t.identity.si(2),
                    chain(t.identity.si(3), chord([t.identity.si(4), t.identity.si(5)], t.identity.si(6))),
                ],
                t.identity.si(7),
            ),
        ),
        7,
    ),
    "chord_of_chains_of_chords": (
        lambda t: chord(
            group(
                [
                    chain(t.add.si(1, 2), chord(group([t.add.si(1, 2), t.add.si(1, 2)]), t.add.si(1, 2)))
                    for _ in range(2)
                ]
            ),
            t.add.si(2, 2),
        ),
        4,
    ),
    "chain_mid_group": (
        lambda t: chain(t.identity.s(42), group(t.identity.s(), t.identity.s()), t.identity.s()),
        [42, 42],
    ),
    "chord_with_replaced": (
        lambda t: chord(
            [
                chord([t.add.s(1, 2), t.replace.s(3, 4)], t.add_to_all.s(5)) | t.tsum.s(),
                chord([t.replace.s(6, 7), t.add.s(0, 0)], t.add_to_all.s(8)) | t.tsum.s(),
            ],
            t.add_to_all.s(9),
        ),
        [29, 38],
    ),
    "chord_body_replaced": (lambda t: chord([t.add.s(1, 1), t.add.s(2, 2)], t.add_to_all.s(1)), [3, 5]),
    "chord_added_to": (lambda t: group([t.add_to_chord.s([1, 2, 3], 4)]) | t.xsum.s(), 18),
    "group_replaced_by_groups": (
        lambda t: group(t.add_to_all.s([1, 2], 1), t.add_to_all.s([3], 1)),
        [[2, 3], [4]],
    ),
    "stamping_example": (
        lambda t: chain(
            group(t.identity.s(i) for i in range(1, 4)) | t.xsum.s(),
            chord(group(t.mul.s(10) for _ in range(1, 4)), t.xsum.s()),
        ),
        180,
    ),
    "stamped_chord": (
        lambda t: _stamped(
            chord([t.add.s(1, 1) | t.add.s(10), t.add.s(2, 2) | t.add.s(20)], t.xsum.s()), stamp=42
        ),
        36,
    ),
    "chord_of_chunks": (lambda t: t.add.chunks([(i, i) for i in range(4)], 2).group() | t.xsum.s(), 12),
    "large_header": (lambda t: group(t.identity.si(i) for i in range(300)) | t.tsum.s(), 44850),
    "chain_to_large_header": (
        lambda t: t.identity.si(1) | group(t.identity.s() for _ in range(300)) | t.tsum.s(),
        300,
    ),
    "two_chords_and_a_task_between": (
        lambda t: (
            t.add.si(1, 0)
            | group(t.add.s(1), t.add.s(1))
            | t.tsum.s()
            | t.add.s(1)
            | group(t.add.s(1), t.add.s(1))
            | t.tsum.s()
        ),
        12,
    ),
    "two_chords_one_of_them_given": (
        lambda t: (
            t.add.si(1, 0)
            | group(t.add.s(1), t.add.s(1))
            | t.tsum.s()
            | t.add.s(1)
            | chord(group(t.add.s(1), t.add.s(1)), t.tsum.s())
        ),
        12,
    ),
    "task_chord_task_to_group": (
        lambda t: (
            t.add.si(1, 0)
            | group(t.add.s(1), t.add.s(1))
            | t.tsum.s()
            | t.add.s(1)
            | group(t.add.s(1), t.add.s(1))
        ),
        [6, 6],
    ),
    "chord_two_tasks_to_group": (
        lambda t: (
            group(t.add.s(1, 1), t.add.s(1, 1))
            | t.tsum.s()
            | t.add.s(1)
            | t.add.s(1)
            | group(t.add.s(1), t.add.s(2))
        ),
        [7, 8],
    ),
    "chord_three_tasks_to_group": (
        lambda t: (
            group(t.add.s(1, 1), t.add.s(1, 1))
            | t.tsum.s()
            | t.add.s(1)
            | t.add.s(1)
            | t.add.s(1)
            | group(t.add.s(1), t.add.s(2))
        ),
        [8, 9],
    ),
    "chord_to_chord_to_chain_with_group": (
        lambda t: chord(
            [t.add.s(0, 1)],
            chord(
                [t.tsum, t.tsum], chain(t.tsum.s(), group(t.add.s(8), t.add.s(16)), t.tsum.s() | t.add.s(32))
            ),
        ),
        60,
    ),
    "groups_with_bodies_in_a_group_with_a_body": (
        lambda t: (
            group(
                [
                    group([t.add.s(1, 2), t.add.s(3, 4)]) | t.add.s([5]),
                    group([t.add.s(6, 7)]) | t.add.s([10]),
                ]
            )
            | t.add_to_all.s(["A"])
        ),
        [[3, 7, 5, "A"], [13, 10, "A"]],
    ),
    "chord_extended_by_a_chord": (
        lambda t: (
            group([t.extend_chord.s(group(t.add.s(number, 4) for number in (1, 2, 3)) | t.tsum.s())])
            | t.tsum.s()
        ),
        18,
    ),
    "group_of_a_chord_of_one": (lambda t: group((chord((t.identity.si(42),), t.identity.s()),)), [[42]]),
    "group_of_a_chord_of_a_chain": (
        lambda t: group((chord((chain((t.identity.si(42),) * 5),), t.identity.s()),)),
        [[42]],
    ),
    "group_of_a_chord_of_a_group": (
        lambda t: group((chord((group((t.identity.si(42),) * 5),), t.identity.s()),)),
        [[42] * 5],
    ),
    "group_of_a_chord_of_a_chord": (
        lambda t: group((chord((chord((t.identity.si(42),) * 5, t.identity.si(43)),), t.identity.s()),)),
        [[43]],
    ),
    "group_of_a_chord_with_a_body_chain": (
        lambda t: group((chord(t.identity.si(42), chain((t.identity.s(),))),)),
        [[42]],
    ),
    "group_of_chord_rebuilt": (lambda t: _rebuilt(t, group(chord([t.add.s(1, 1)], t.tsum.s()))), [2]),
    "chain_of_chord_rebuilt": (
        lambda t: _rebuilt(t, chain(t.add.s(1, 1), chord([t.add.s(1), t.add.s(2)], t.tsum.s()))),
        7,
    ),
    "chord_of_chain_rebuilt": (
        lambda t: _rebuilt(t, chord([chain([t.add.s(1, 1), t.add.s(2)])], t.tsum.s())),
        4,
    ),
    "chord_of_group_rebuilt": (lambda t: _rebuilt(t, chord(group([t.add.s(1, 1)]), t.tsum.s())), 2),
    "chord_of_chord_rebuilt": (
        lambda t: _rebuilt(t, chord(chord([t.add.s(1, 1)], t.tsum.s()), t.tsum.s())),
        2,
    ),
    "replaced_by_a_chain": (lambda t: _instead(t, 42), 42),
    "replaced_first_in_chain": (lambda t: chain(_instead(t, 42), t.identity.s()), 42),
    "replaced_within_chain": (lambda t: chain(t.identity.s(42), _instead(t), t.add.s(1)), 43),
    "replaced_last_in_chain": (lambda t: chain(t.identity.s(42), _instead(t)), 42),
    "replaced_twice_in_chain": (lambda t: chain(t.replace_twice.si(5), t.add.s(4)), 11),
    "replaced_first_in_group": (lambda t: group(_instead(t, 42), t.identity.s(1)), [42, 1]),
    "replaced_within_group": (lambda t: group(t.identity.s(1), _instead(t, 42), t.identity.s(2)), [1, 42, 2]),
    "replaced_last_in_group": (lambda t: group(t.identity.s(1), _instead(t, 42)), [1, 42]),
    "replaced_by_groups_in_group": (
        lambda t: group([t.add_to_all.s([2, 1], 1), t.add_to_all.s([4, 3], 1)] * 5),
        [[3, 2], [5, 4]] * 5,
    ),
    "replaced_header": (lambda t: chord(_instead(t, 42), t.identity.s()), [42]),
    "replaced_first_in_header": (
        lambda t: chord([_instead(t, 42), t.identity.s(1)], t.identity.s()),
        [42, 1],
    ),
    "replaced_within_header": (
        lambda t: chord([t.identity.s(1), _instead(t, 42), t.identity.s(2)], t.identity.s()),
        [1, 42, 2],
    ),
    "replaced_last_in_header": (lambda t: chord([t.identity.s(1), _instead(t, 42)], t.identity.s()), [1, 42]),
    "replaced_body": (lambda t: chord(t.identity.s(42), _instead(t)), [42]),
    "replaced_first_in_body": (
        lambda t: chord(t.identity.s(42), chain(_instead(t), t.identity.s())),
        [42],
    ),
    "replaced_within_body": (
        lambda t: chord(t.identity.s(42), chain(t.identity.s(), _instead(t), t.identity.s())),
        [42],
    ),
    "replaced_last_in_body": (
        lambda t: chord(t.identity.s(42), chain(t.identity.s(), _instead(t))),
        [42],
    ),
}

if VERSION >= (5, 7):
    # Before, each message of a header had all the rest of the chain, three times for each chord.
    CHORDS["chain_of_nine_chords"] = (
        lambda t: chain(
            chord([t.add.si(1, 0)] * 3, t.tsum.s()),
            *[chord([t.add.s(1)] * 3, t.tsum.s()) for _ in range(7)],
            chord([t.add.s(0)] * 3, t.tsum.s()),
        ),
        29520,
    )

#: Chords whose header holds groups: their worker joins the results, which threads of one worker must not do at the same time
#: (Celery's flag that forbids ``get()`` within a task is global).
JOINED: dict[str, Case] = {
    "chain_with_a_group_in_a_group": (
        lambda t: chain(
            t.add.si(1, 0),
            group(t.add.si(1, 100), chain(t.add.si(1, 200), group(t.add.si(1, 1000), t.add.si(1, 2000)))),
            t.add.si(1, 10),
        ),
        11,
    ),
    "chord_of_a_chain_to_a_group": (
        lambda t: chord(
            group(chain(t.identity.s(42), group(t.identity.s(), t.identity.s()))), t.identity.s()
        ),
        [[42, 42]],
    ),
}

#: Failures that every result backend tells.
FAILURES: dict[str, tuple[Callable[[Tasks], Any], type[Exception], str]] = {
    "task": (lambda t: t.fail.s("alone"), ValueError, "alone"),
    "own_error": (lambda t: t.custom_error.s(7, "own"), CustomError, "own"),
    "retried_in_vain": (lambda t: t.retry_for_ever.s(), ValueError, "never"),
    "chain_first": (lambda t: chain(t.fail.si("first"), t.add.si(1, 1), t.add.s(2)), ValueError, "first"),
    "chain_middle": (lambda t: chain(t.add.s(1, 2), t.fail.si("middle"), t.add.s(3)), ValueError, "middle"),
    "chain_last": (lambda t: chain(t.add.s(1, 2), t.fail.si("last")), ValueError, "last"),
    "chain_before_group": (
        lambda t: t.fail.si("before") | group(t.add.si(1, 1), t.add.si(2, 2)),
        ValueError,
        "before",
    ),
    "chain_to_failing_group": (
        lambda t: t.add.s(1, 1) | group(t.add.s(1), t.fail.si("member")),
        ValueError,
        "member",
    ),
    "group_first": (lambda t: group(t.fail.si("one"), t.add.si(1, 1)), ValueError, "one"),
    "group_last": (lambda t: group(t.add.si(1, 1), t.fail.si("two")), ValueError, "two"),
    "group_of_failing_chains": (
        lambda t: group(t.add.si(1, 1), chain(t.fail.si("link"), t.add.si(1, 1))),
        ValueError,
        "link",
    ),
    "group_of_chain_to_group": (
        lambda t: group(t.add.si(1, 1), chain(t.fail.si("deep"), group(t.add.si(1, 1), t.add.si(1, 2)))),
        ValueError,
        "deep",
    ),
    "chunks": (lambda t: t.add.chunks([(1, 1), (1, "x")], 1), TypeError, ""),
    "starmap": (lambda t: t.add.starmap([(1, 1), (1, "x")]), TypeError, ""),
    "chain_middle_before_group": (
        lambda t: t.add.s(1, 1) | t.fail.si("middle") | group(t.add.si(1, 1), t.add.si(1, 1)),
        ValueError,
        "middle",
    ),
    "wrong_arguments": (lambda t: t.add.s(5), TypeError, "missing 1 required positional argument: 'y'"),
    "unknown_argument": (lambda t: t.add.s(5, wrong=5), TypeError, "unexpected keyword argument 'wrong'"),
    "unpicklable": (lambda t: t.raise_unpicklable.s(), Exception, "not picklable"),
    "replaced_by_nothing": (
        lambda t: chain(t.identity.s(1), t.replace_by.s(chain())),
        ImproperlyConfigured,
        "Cannot replace with an empty chain",
    ),
}


def _slow_failure(t: Tasks) -> Any:
    return chain(t.sleep.si(0.5), t.fail.si("slow"))


#: Failures of these, and what they say.
CHORD_FAILURES: dict[str, tuple[Callable[[Tasks], Any], type[Exception], str]] = {
    "replaced_by_failure": (lambda t: t.replace_by_failure.s("instead"), ValueError, "instead"),
    "chain_replaced_by_failure": (
        lambda t: chain(t.replace_by_failure.si("instead"), t.add.si(1, 1)),
        ValueError,
        "instead",
    ),
    "header": (lambda t: chord([t.add.si(1, 1), t.fail.si("header")], t.tsum.s()), ValueError, "header"),
    "body": (lambda t: chord([t.add.si(1, 1), t.add.si(1, 1)], t.fail.si("body")), ValueError, "body"),
    "header_of_one": (lambda t: chord([t.fail.si("header")], t.tsum.s()), ValueError, "header"),
    "header_of_failures": (
        lambda t: chord([t.add.si(1, 1), t.fail.si("first"), t.fail.si("second")], t.tsum.s()),
        ValueError,
        "first",
    ),
    "header_slow_and_quick": (
        lambda t: chord([_slow_failure(t), t.fail.si("quick")], t.tsum.s()),
        ValueError,
        "slow",
    ),
    "header_slow_and_quick_with_body_group": (
        lambda t: chord([_slow_failure(t), t.fail.si("quick")], group(t.tsum.s(), t.tsum.s())),
        ValueError,
        "slow",
    ),
    "header_large": (
        lambda t: chord([*[t.identity.si(1)] * 80, t.fail.si("large")], t.tsum.s()),
        ValueError,
        "large",
    ),
    "header_chain_first": (
        lambda t: chord([t.add.si(1, 1), chain(t.fail.si("link"), t.add.si(1, 1))], t.tsum.s()),
        ValueError,
        "link",
    ),
    "header_chain_last": (
        lambda t: chord([t.add.si(1, 1), chain(t.add.si(1, 1), t.fail.si("tail"))], t.tsum.s()),
        ValueError,
        "tail",
    ),
    "header_group": (
        lambda t: chord([group(t.fail.si("inner"), t.add.si(1, 1))], t.tsum.s()),
        ValueError,
        "inner",
    ),
    "header_chord": (
        lambda t: chord(
            [t.add.si(1, 1), chord([t.fail.si("inner"), t.add.si(1, 1)], t.tsum.s())], t.tsum.s()
        ),
        ChordError,
        "inner",
    ),
    "header_chord_and_task": (
        lambda t: chord(
            [chord([t.fail.si("inner"), t.add.si(1, 1)], t.tsum.s()), t.fail.si("no")], t.tsum.s()
        ),
        ChordError,
        "inner",
    ),
    "with_body_chord": (
        lambda t: chord(
            [t.add.si(1, 1), t.fail.si("header")], chord([t.identity.s(), t.identity.s()], t.tsum.s())
        ),
        ValueError,
        "header",
    ),
    "with_body_chain": (
        lambda t: chord([t.add.si(1, 1), t.fail.si("header")], t.tsum.s() | t.identity.s()),
        ValueError,
        "header",
    ),
    "with_body_group": (
        lambda t: chord([t.add.si(1, 1), t.fail.si("header")], group(t.tsum.s(), t.tsum.s())),
        ValueError,
        "header",
    ),
    "group_then_chain": (
        lambda t: chain(chain(group(t.add.si(1, 1), t.fail.si("header")), t.identity.s()), t.identity.s()),
        ValueError,
        "header",
    ),
    "before": (
        lambda t: t.fail.si("before") | group(t.add.si(1, 1), t.add.si(1, 1)) | t.tsum.s(),
        ValueError,
        "before",
    ),
    "long_before": (
        lambda t: (
            t.add.si(1, 1)
            | t.fail.si("before")
            | t.add.si(1, 1)
            | group(t.add.si(1, 1), t.add.si(1, 1))
            | t.tsum.s()
        ),
        ValueError,
        "before",
    ),
    "behind": (
        lambda t: group(t.add.si(1, 1), t.add.si(1, 1)) | t.tsum.s() | t.fail.si("behind"),
        ValueError,
        "behind",
    ),
    "two_chords_before": (
        lambda t: chain(
            chord([t.add.si(1, 1), t.fail.si("header")], t.tsum.s()),
            chord([t.add.s(1), t.add.s(2)], t.tsum.s()),
        ),
        ValueError,
        "header",
    ),
    "group_of_chords": (
        lambda t: group(t.add.si(1, 1), chord([t.add.si(1, 1), t.fail.si("header")], t.tsum.s())),
        ChordError,
        "header",
    ),
    "group_of_chords_in_chains": (
        lambda t: group(
            t.add.si(1, 1), chain(t.fail.si("link"), group(t.add.si(1, 1), t.add.si(1, 1)), t.tsum.s())
        ),
        ValueError,
        "link",
    ),
    "nested_chain_member": (
        lambda t: chain(
            group(
                t.identity.si(1),
                chain(t.fail.si("nested"), group(t.identity.si(2), t.identity.si(3)), t.identity.si(4)),
            ),
            t.identity.s(),
        ),
        ValueError,
        "nested",
    ),
    "header_replaced": (
        lambda t: chord([t.add.si(1, 1), t.replace_by_failure.si("instead")], t.tsum.s()),
        ValueError,
        "instead",
    ),
    "body_chain_middle": (
        lambda t: chord([t.add.si(1, 1)], chain(t.tsum.s(), t.fail.si("link"), t.add.si(1, 1))),
        ValueError,
        "link",
    ),
    "body_chain_last": (
        lambda t: chord([t.add.si(1, 1)], chain(t.tsum.s(), t.fail.si("tail"))),
        ValueError,
        "tail",
    ),
    "body_group": (
        lambda t: chord([t.add.si(1, 1)], group(t.tsum.s(), t.fail.si("member"))),
        ValueError,
        "member",
    ),
    "replaced_body": (
        lambda t: chord([t.add.si(1, 1)], t.replace_by_failure.si("instead")),
        ValueError,
        "instead",
    ),
}
