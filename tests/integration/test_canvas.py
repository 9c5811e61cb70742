"""Canvas: every primitive, nested in each other, through `TwistedCelery` and through the drop-in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import Celery, chain, chord, group
from celery.exceptions import ChordError
from twisted.internet.defer import maybeDeferred

from tests.integration._clients import outcomes
from tests.integration._places import OverAMQP, OverRedis, RedisOverAMQP, Tasks
from tests.integration.canvas_cases import CHORD_FAILURES, CHORDS, FAILURES, JOINED, PLAIN, Stamp
from tests.support.servers import wait_for_file
from twistedcelery.errors import ResultNotKept

if TYPE_CHECKING:
    from collections.abc import Callable


class _ThroughTwistedCelery:
    """Calls made by ``tx.apply_async``."""

    def open(self: Any, **settings: Any) -> tuple[Tasks, Any, Callable[[Any], Any]]:
        """Give the tasks of a new app, its TwistedCelery, and what calls a canvas."""
        app = Celery("client", broker=self.broker, backend=self.backend)
        app.conf.update(settings)
        tx = self.client(app)
        return Tasks(app), tx, tx.apply_async


class _ThroughDropin:
    """Calls made by the canvas itself, of an app whose class was exchanged."""

    def open(self: Any, **settings: Any) -> tuple[Tasks, Any, Callable[[Any], Any]]:
        """See above."""
        app = self.dropin(**settings)
        return Tasks(app), app.twisted, lambda canvas: canvas.apply_async()


class _Cases:
    """Runs tables of cases, all at once: canvases that run at the same time must not mix."""

    async def assert_values(self: Any, cases: Any) -> None:
        """Each canvas gives its value."""
        tasks, tx, call = self.open()
        callings = {name: call(build(tasks)) for name, (build, _) in cases.items()}
        values = dict(zip(callings, await outcomes(callings.values()), strict=True))
        self.assertEqual(values, {name: expected for name, (_, expected) in cases.items()})
        await self.assert_empties(tx)

    async def assert_failures(self: Any, cases: Any) -> None:
        """Each canvas fails with an error of this kind, which says this, and has the worker's traceback."""
        tasks, tx, call = self.open()
        callings = {name: call(build(tasks)) for name, (build, _, _) in cases.items()}
        errors = dict(zip(callings, await outcomes(callings.values()), strict=True))
        callings.clear()
        wrong = {
            name: errors[name]
            for name, (_, kind, text) in cases.items()
            if not isinstance(errors[name], kind)
            or text not in str(errors[name])
            or errors[name].__cause__ is None
        }
        self.assertEqual(wrong, {})
        await self.assert_empties(tx)


class _Plain(_Cases):
    """What every result backend can do."""

    async def test_ids_of_a_chain(self: Any) -> None:
        """The tasks of a chain know their root and parent, and so does its result, link by link."""
        tasks, _, call = self.open()
        calling = call(chain(tasks.ids.si(number) for number in range(5)))
        root, parent, own, value = await calling
        self.assertEqual((own, value), (calling.id, 4))
        before = calling.parent
        self.assertEqual(before.id, parent)
        # Each link's value has come as well, and can still be asked for.
        self.assertEqual((await before.get(timeout=10))[3], 3)
        while before.parent is not None:
            before = before.parent
        self.assertEqual(before.id, root)

    async def test_ids_of_a_group(self: Any) -> None:
        """The members of a group at the end of a chain know what stands before it."""
        tasks, _, call = self.open()
        calling = call(
            tasks.ids.si(1) | tasks.ids.si(2) | group(tasks.ids.si(number) for number in range(3, 8))
        )
        for number, (root, parent, _, value) in enumerate(await calling, 3):
            self.assertEqual((root, parent, value), (calling.parent.parent.id, calling.parent.id, number))

    async def test_links(self: Any) -> None:
        """``link`` and ``link_error`` of tasks, chains and groups, given as signatures, lists or dicts, run once each."""
        tasks, _, call = self.open()
        path = self.temporary()

        def note(text: str) -> Any:
            return tasks.record.si(str(path), text)

        await call(tasks.add.s(1, 1).on_error(note("never")).set(link=note("task")))
        await call(tasks.add.s(1, 1).set(link=[note("first"), dict(note("second"))]))
        linked = chain(tasks.add.s(1, 1), tasks.add.s(2))
        linked.link(note("chain"))
        await call(linked)
        await call(tasks.add.s(1, 1).set(link=chain(note("third"), note("fourth"))))
        members = group(tasks.add.s(1, 1), tasks.add.s(2, 2))
        members.link(note("group"))
        await call(members)
        failing = [
            tasks.fail.s("one").on_error(note("task error")),
            tasks.fail.s("two").set(link_error=[dict(note("dict error"))]),
            chain(tasks.add.s(1, 1), tasks.fail.si("three")).on_error(note("chain error")),
            group(tasks.fail.s("four"), tasks.add.s(1, 1)).on_error(note("group error")),
        ]
        for canvas in failing:
            await self.failure_of(call(canvas), ValueError)
        expected = ["task", "first", "second", "chain", "third", "fourth", "group"]
        expected += ["task error", "dict error", "chain error", "group error"]
        lines = await self.in_thread(wait_for_file, path, len(expected))
        self.assertEqual(sorted(lines), sorted(expected))

    async def test_errback_with_arguments(self: Any) -> None:
        """An error callback that takes arguments is given the failed task's id."""
        tasks, _, call = self.open()
        path = self.temporary()
        calling = call(tasks.fail.s("x").on_error(tasks.record_error.s(path=str(path))))
        await self.failure_of(calling, ValueError)
        self.assertEqual(await self.in_thread(wait_for_file, path, 1), [calling.id])

    async def test_arguments_of_apply_async(self: Any) -> None:
        """Arguments and options given with the call reach every member, and the first link."""
        tasks, tx, call = self.open()
        members = group(tasks.add.s(1), tasks.add.s(2))
        first = chain(tasks.echo.s(1), tasks.identity.s())
        if call == tx.apply_async:
            callings = (
                call(members, (10,)),
                call(first, (0,), {"key": 2}),
                call(tasks.add, (1, 2), countdown=0.1),
            )
        else:
            callings = (
                members.apply_async((10,)),
                first.apply_async((0,), {"key": 2}),
                tasks.add.apply_async((1, 2), countdown=0.1),
            )
        self.assertEqual(await callings[0], [11, 12])
        self.assertEqual(await callings[1], [[0, 1], {"key": 2}])
        self.assertEqual(await callings[2], 3)

    async def test_frozen(self: Any) -> None:
        """A signature that was frozen keeps its id, and a canvas can be called twice."""
        tasks, _, call = self.open()
        canvas = tasks.add.s(1, 1)
        frozen = canvas.freeze().id
        calling = call(canvas)
        self.assertEqual((calling.id, await calling), (frozen, 2))
        links = chain(tasks.add.s(1, 1), tasks.add.s(2), tasks.add.s(3)).on_error(tasks.echo.s())
        links.freeze()
        self.assertEqual(await call(links), 7)
        again = tasks.add.s(1, 1) | tasks.add.s(3)
        first, second = call(again), call(again.clone())
        self.assertEqual((await first, await second), (5, 5))

    async def test_stamps(self: Any) -> None:
        """Stamps of a visitor reach the worker, also those of links."""
        tasks, _, call = self.open()
        canvas = chain(tasks.identity.si(1), tasks.header_dump.si())
        canvas.stamp(visitor=Stamp(monitoring="here", many=[4, 2]))
        seen = await call(canvas)
        self.assertEqual(seen["stamps"], {"monitoring": "here", "many": [4, 2]})
        self.assertEqual(sorted(seen["stamped_headers"]), ["many", "monitoring"])

    async def test_many_at_once(self: Any) -> None:
        """Canvases that run at the same time do not mix."""
        tasks, tx, call = self.open()
        callings = [call(chain(tasks.add.s(i, 0), group(tasks.add.s(1), tasks.add.s(2)))) for i in range(30)]
        self.assertEqual(await outcomes(callings), [[i + 1, i + 2] for i in range(30)])
        await self.assert_empties(tx)

    async def test_values(self: Any) -> None:
        """Every primitive, and what can be made of them."""
        await self.assert_values(PLAIN)

    async def test_failures(self: Any) -> None:
        """The task's own exception comes, wherever in the canvas it is raised."""
        await self.assert_failures(FAILURES)


class _Chords(_Cases):
    """What needs a result backend that keeps results."""

    async def test_ids_of_a_chord(self: Any) -> None:
        """The result of a chord's body leads to the header, and to what stands before it."""
        tasks, _, call = self.open()
        calling = call(
            tasks.ids.si(1) | group(tasks.ids.si(i) for i in range(2, 6)) | tasks.ids.s() | tasks.ids.si(9)
        )
        root, parent, _, value = await calling
        body, header = calling.parent, calling.parent.parent
        self.assertEqual((value, parent, root), (9, body.id, header.parent.id))
        values = await header.get(timeout=10)
        self.assertEqual([one[3] for one in values], [2, 3, 4, 5])
        self.assertEqual((await body.get(timeout=10))[3], values)

    async def test_chord_error(self: Any) -> None:
        """A chord fails with ChordError, which names the task and its exception; error callbacks run once."""
        tasks, _tx, call = self.open()
        path = self.temporary()
        body = tasks.tsum.s().on_error(tasks.record.si(str(path), "body"))
        calling = call(chord([tasks.add.si(1, 1), tasks.fail.si("header")], body))
        error = await self.failure_of(calling, ChordError)
        failed = calling.parent.results[1]
        self.assertIn(f"{failed.id} raised ValueError('header')", str(error))
        # The task's own exception, where it is asked for.
        await self.failure_of(failed.get(timeout=10), ValueError)
        self.assertEqual(await self.in_thread(wait_for_file, path, 1), ["body"])
        error = error.with_traceback(None)

    async def test_errback_on_header(self: Any) -> None:
        """``task_allow_error_cb_on_chord_header``: the error callback of a chord runs for its header too."""
        tasks, _, call = self.open(task_allow_error_cb_on_chord_header=True)
        path = self.temporary()
        canvas = chord([tasks.add.si(1, 1), tasks.fail.si("header")], tasks.tsum.s())
        canvas.link_error(tasks.record.si(str(path), "error"))
        await self.failure_of(call(canvas), ChordError)
        self.assertEqual(await self.in_thread(wait_for_file, path, 2), ["error", "error"])

    async def test_chords_at_once(self: Any) -> None:
        """Chords that run at the same time do not mix."""
        tasks, tx, call = self.open()
        callings = [call(chord([tasks.add.si(i, j) for j in range(3)], tasks.tsum.s())) for i in range(20)]
        self.assertEqual(await outcomes(callings), [3 * i + 3 for i in range(20)])
        await self.assert_empties(tx)

    async def test_chords(self: Any) -> None:
        """Chords, and chords in everything else."""
        await self.assert_values(CHORDS)
        for name, case in JOINED.items():
            await self.assert_values({name: case})

    async def test_chord_failures(self: Any) -> None:
        """A chord fails with ChordError, what stands before or behind it with the task's own exception."""
        await self.assert_failures(CHORD_FAILURES)


class _Refusals:
    """What rpc cannot do."""

    async def test_no_chords(self: Any) -> None:
        """Chords are refused with Celery's own words, and nothing of them is sent."""
        tasks, tx, call = self.open()
        path = self.temporary()
        header = [tasks.record.si(str(path), "header")]
        stock = Celery("stock", broker=self.broker, backend=self.backend)
        words = str(self.assertRaises(NotImplementedError, stock.backend.ensure_chords_allowed))
        for canvas in (
            chord(header, tasks.tsum.s()),
            group(header) | tasks.tsum.s(),
            group(header) | group(header),
        ):
            error = self.assertRaises(NotImplementedError, call, canvas)
            self.assertEqual(str(error.with_traceback(None)), words)
        await self.assert_empties(tx)
        await call(tasks.add.s(1, 1))
        self.assertFalse(path.exists())

    async def test_no_saved_groups(self: Any) -> None:
        """Nor can groups be saved."""
        tasks, tx, call = self.open()
        calling = call(group(tasks.add.s(1, 1)))
        await calling
        await self.failure_of(maybeDeferred(calling.save), NotImplementedError)
        await self.failure_of(maybeDeferred(tx.restore_group, calling.id), ResultNotKept)


class TwistedCeleryOverAMQP(_ThroughTwistedCelery, _Plain, _Refusals, OverAMQP):
    """RabbitMQ and rpc."""


class DropinOverAMQP(_ThroughDropin, _Plain, _Refusals, OverAMQP):
    """RabbitMQ and rpc."""


class TwistedCeleryOverRedis(_ThroughTwistedCelery, _Plain, _Chords, OverRedis):
    """Redis and Redis."""


class DropinOverRedis(_ThroughDropin, _Plain, _Chords, OverRedis):
    """Redis and Redis."""


class TwistedCeleryRedisOverAMQP(_ThroughTwistedCelery, _Plain, _Chords, RedisOverAMQP):
    """RabbitMQ and Redis."""


class DropinRedisOverAMQP(_ThroughDropin, _Plain, _Chords, RedisOverAMQP):
    """RabbitMQ and Redis."""
