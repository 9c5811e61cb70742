"""Canvas: every primitive, nested in each other, through `TwistedCelery` and through the drop-in."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any
from unittest import skipIf

import pytest
from celery import VERSION, Celery, chain, chord, group, signals
from celery.exceptions import ChordError, Reject, TaskRevokedError
from celery.result import ResultSet
from kombu.utils.uuid import uuid
from twisted.internet.defer import Deferred, maybeDeferred

from tests.integration._clients import outcomes
from tests.integration._places import OverAMQP, OverRedis, RedisOverAMQP, Tasks
from tests.integration.canvas_cases import CHORD_FAILURES, CHORDS, FAILURES, JOINED, PLAIN, Stamp
from tests.integration.canvas_runs import CHORD_RUNS, ERRBACKS, HEADER_RUNS, RUNS, Book
from tests.support.servers import wait_for_file
from tests.support.tasks import AutoRetry
from twistedcelery.errors import ResultNotKept, WouldBlock

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
        return Tasks(app), app.twisted, lambda canvas, *args, **options: canvas.apply_async(*args, **options)

    async def test_result_set(self: Any) -> None:
        """A ResultSet answers from what has come; what waits for collected results is a GroupResult."""
        tasks, tx, _ = self.open()
        first, second = tasks.add.delay(1, 1), tasks.fail.delay("x")
        found = ResultSet([first])
        found.add(second)
        self.assertEqual((found.ready(), found.waiting(), found.completed_count()), (False, True, 0))
        self.assertRaises(WouldBlock, found.get)
        value, error = await outcomes([first, second])
        self.assertEqual((value, str(error)), (2, "x"))
        self.assertEqual((found.ready(), found.successful(), found.failed()), (True, False, True))
        self.assertEqual((found.completed_count(), first.successful(), second.failed()), (1, True, True))
        group_result = tasks._app.GroupResult
        self.assertEqual(await group_result(uuid(), [first, tasks.add.delay(2, 2)]), [2, 4])
        await self.failure_of(group_result(uuid(), [second, first]), ValueError)
        await self.assert_empties(tx)

    async def test_result_set_join(self: Any) -> None:
        """What of a ResultSet would wait says so, by whatever name."""
        tasks, _, _ = self.open()
        found = ResultSet([tasks.add.delay(1, 1)])
        for wait in (found.get, found.join, found.join_native, lambda: list(found.iter_native())):
            self.assertRaises(WouldBlock, wait)
        await found.results[0]

    async def test_other_names(self: Any) -> None:
        """The less usual of Celery's names block no more than the others do, before the value and after."""
        tasks, _, _ = self.open()
        calling = tasks.add.delay(1, 1)
        waiting = calling.wait()
        self.assertIsInstance(waiting, Deferred)
        self.assertEqual((await calling, await waiting), (2, 2))
        self.assertEqual(await calling.wait(), 2)
        self.assertEqual(await calling.get_leaf(), 2)

    async def test_revoke_by_stamped_headers(self: Any) -> None:
        """A result can revoke all tasks with a stamp, and what that returns can be waited for."""
        tasks, _, _ = self.open()
        calling = tasks.add.delay(1, 1)
        revoking = calling.revoke_by_stamped_headers({"monitoring": [uuid()]})
        self.assertIsInstance(revoking, Deferred)
        self.assertIsNone(await revoking)
        self.assertEqual(await calling, 2)


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

    async def assert_runs(self: Any, cases: Any, **settings: Any) -> None:
        """Each canvas gives its value or its kind of error, and of it runs what has to, once."""
        tasks, tx, call = self.open(**settings)
        books, callings, expected = {}, {}, {}
        for name, build in cases.items():
            books[name] = Book(tasks, self.temporary())
            canvas, outcome, lines = build(tasks, books[name])
            callings[name] = call(canvas)
            expected[name] = (outcome, lines if isinstance(lines, tuple) else sorted(lines))
        found = dict(zip(callings, await outcomes(callings.values()), strict=True))
        callings.clear()

        def written() -> dict[str, Any]:
            """What is in the books, in order where that counts."""
            return {
                name: tuple(book.lines()) if isinstance(expected[name][1], tuple) else sorted(book.lines())
                for name, book in books.items()
            }

        # Links and error callbacks run after the result has come.
        for _ in range(300):
            if all(len(lines) >= len(expected[name][1]) for name, lines in written().items()):
                break
            await self.sleep(0.1)
        # What runs once too often would run now.
        await self.sleep(0.3)
        values = {
            name: type(value) if isinstance(value, Exception) else value for name, value in found.items()
        }
        self.assertEqual({name: (values[name], lines) for name, lines in written().items()}, expected)
        await self.assert_empties(tx)


class _Plain(_Cases):
    """What every result backend can do."""

    async def test_ids_of_a_chain(self: Any) -> None:
        """The tasks of a chain know their root and parent, and so does its result, link by link."""
        tasks, _, call = self.open()
        canvas = chain(tasks.ids.si(number) for number in range(5))
        frozen = canvas.freeze().id
        calling = call(canvas)
        root, parent, own, value = await calling
        self.assertEqual((own, calling.id, value), (frozen, frozen, 4))
        node, number = calling, value
        while node.parent is not None:
            node, number = node.parent, number - 1
            self.assertEqual(node.id, parent)
            # Each link's value has come as well, and can still be asked for.
            found = await node.get(timeout=30)
            self.assertEqual((found[0], found[2], found[3]), (root, node.id, number))
            parent = found[1]
        self.assertEqual((node.id, parent, number), (root, None, 0))

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
        tasks, _, call = self.open()
        members = group(tasks.add.s(1), tasks.add.s(2))
        first = chain(tasks.echo.s(1), tasks.identity.s())
        callings = (
            call(members, (10,)),
            call(first, (0,), {"key": 2}),
            call(tasks.add, (1, 2), countdown=0.1),
            call(chain(chain(tasks.identity.s(), tasks.identity.s())), (7,)),
        )
        self.assertEqual(await callings[0], [11, 12])
        self.assertEqual(await callings[1], [[0, 1], {"key": 2}])
        self.assertEqual(await callings[2], 3)
        self.assertEqual(await callings[3], 7)

    async def test_frozen(self: Any) -> None:
        """A signature that was frozen keeps its id, and a canvas can be called twice."""
        tasks, _, call = self.open()
        canvas = tasks.add.s(1, 1)
        frozen = canvas.freeze().id
        calling = call(canvas)
        self.assertEqual((calling.id, await calling), (frozen, 2))
        links = chain(tasks.add.s(1, 1), tasks.add.s(2), tasks.add.s(3)).on_error(tasks.echo.s())
        frozen = links.freeze().id
        calling = call(links)
        self.assertEqual((calling.id, await calling), (frozen, 7))
        named = chain(tasks.add.s(1, 1), tasks.add.s(2).set(task_id=uuid()))
        calling = call(named)
        self.assertEqual((calling.id, await calling), (named.tasks[-1].id, 4))
        again = tasks.add.s(1, 1) | tasks.add.s(3)
        first, second = call(again), call(again.clone())
        self.assertEqual((await first, await second), (5, 5))

    async def test_stamps(self: Any) -> None:
        """Stamps of a visitor reach the worker as they are, and are no properties; also by retry and link."""
        tasks, _, call = self.open()
        path = self.temporary()

        def stamps() -> dict[str, Any]:
            # Celery lengthens a list that it merges into.
            return {"monitoring": "here", "many": [4, 2], "number": 42}

        def noted() -> Any:
            return tasks.record_request.si(str(path), "stamps")

        for dump in (tasks.header_dump, tasks.retry_then_dump):
            canvas = chain(tasks.identity.si(1), dump.si())
            canvas.stamp(visitor=Stamp(monitoring="not yet"))
            canvas.link(noted())
            # Linked after the first stamps, it gets the second ones.
            canvas.stamp(visitor=Stamp(**stamps()))
            seen = await call(canvas)
            self.assertEqual((seen["stamps"], seen["replaced_task_nesting"]), (stamps(), 0))
            self.assertEqual(sorted(seen["stamped_headers"]), sorted(stamps()))
            self.assertFalse({*stamps(), "stamped_headers"} & {*seen["properties"]})
        failing = tasks.fail.si().on_error(noted())
        failing.stamp(visitor=Stamp(**stamps()))
        await self.failure_of(call(failing), ValueError)
        lines = await self.in_thread(wait_for_file, path, 3)
        self.assertEqual([json.loads(line) for line in lines], [stamps()] * 3)

    async def test_options(self: Any) -> None:
        """Options of a call, and those of the task itself, reach the worker; most also with a retry."""
        tasks, _, call = self.open()
        options = {
            "app_id": "1234",
            "headers": {"x-own": "value"},
            "priority": 7,
            "time_limit": 30,
            "soft_time_limit": 20,
            "argsrepr": "own arguments",
            "kwargsrepr": "own keywords",
        }
        seen = await call(tasks.header_dump, (1,), **options)
        self.assertEqual(seen["properties"]["app_id"], "1234")
        self.assertEqual((seen["argsrepr"], seen["kwargsrepr"]), ("own arguments", "own keywords"))
        again = await call(tasks.retry_then_dump, (1,), **options)
        for one in (seen, again):
            self.assertEqual((one["x-own"], one["delivery_info"]["priority"]), ("value", 7))
            self.assertEqual(one["timelimit"], [30, 20])
        self.assertEqual((await call(tasks.header_dump))["timelimit"], [None, None])
        other, _, call = self.open()

        @other._app.task(name="tests.header_dump", shared=False, time_limit=60, soft_time_limit=45)
        def declared() -> None:
            """Stand for the worker's."""

        self.assertEqual((await call(declared))["timelimit"], [60, 45])
        seen = await call(declared, time_limit=10, soft_time_limit=5)
        self.assertEqual(seen["timelimit"], [10, 5])

    async def test_wrong_calls(self: Any) -> None:
        """What the task's function cannot take is refused at once; it can be called as a function too."""
        tasks, tx, call = self.open()

        @tasks._app.task(name="tests.add", shared=False)
        def typed(x: int, y: int, z: int = 0) -> int:
            return x + y + z

        @tasks._app.task(name="limited", shared=False, soft_time_limit=2, time_limit=1)
        def limited() -> None:
            """Cannot be called: its soft time limit is the longer one."""

        self.assertEqual((typed(1, 1), typed(1, 1, z=1)), (2, 3))
        for arguments in ((), ((5,),), ((5, 5), {"wrong": 5})):
            self.assertRaises(TypeError, call, typed, *arguments)
            self.assertRaises(TypeError, call, group(typed.s()), *arguments)
        if VERSION >= (5, 5):
            self.assertRaises(ValueError, call, limited)
        await self.assert_empties(tx)
        self.assertEqual(await call(typed, (1, 2)), 3)

    async def test_ignored(self: Any) -> None:
        """A call for no result gives None once it is sent, in a group too; nothing more can be asked."""
        tasks, tx, call = self.open()
        for calling in (call(tasks.add, (1, 2), ignore_result=True), call(tasks.ignore)):
            self.assertIsNone(await calling)
            await self.failure_of(calling.get(), ResultNotKept)
        self.assertEqual(await call(group(tasks.add.s(1, 1), tasks.ignore.s())), [2, None])
        await self.assert_empties(tx)

    @skipIf(VERSION < (5, 7), "the worker tells nobody")
    async def test_rejected(self: Any) -> None:
        """A task that is rejected for good has failed."""
        tasks, _, call = self.open()
        calling = call(tasks.raise_reject)
        await self.failure_of(calling, Reject)
        handle = calling.async_result
        self.assertEqual((await handle.state(), await handle.failed()), ("FAILURE", True))

    async def test_task_class(self: Any) -> None:
        """A task that is a class can be called once it is registered."""
        tasks, _, call = self.open()
        self.assertEqual(await call(tasks._app.register_task(AutoRetry()), (2,)), 2)

    async def test_early_handles(self: Any) -> None:
        """The handle of a call knows the value once it has come, also one that was taken before."""
        tasks, _, call = self.open()
        callings = [call(tasks.add, (1, 1)), call(group(tasks.add.s(1, 1), tasks.add.s(2, 2)))]
        handles = [calling.async_result for calling in callings]
        values = await outcomes(callings)
        self.assertEqual(values, [2, [2, 4]])
        self.assertEqual(await outcomes([handle.get(timeout=30) for handle in handles]), values)
        self.assertEqual(await handles[0].state(), "SUCCESS")
        self.assertEqual(await handles[1].completed_count(), 2)

    async def test_signature_as_value(self: Any) -> None:
        """A signature that a task returns can be rebuilt and called."""
        tasks, _, call = self.open()
        canvas = chain(tasks.add.s(1, 1), group(tasks.add.s(1), chain(tasks.add.s(2), tasks.add.s(3))))
        value = await call(tasks.identity.s(canvas))
        self.assertIs(type(value), dict)
        self.assertEqual(await call(tasks._app.signature(value)), [3, 7])

    async def test_times(self: Any) -> None:
        """``countdown`` and ``eta`` put a task off, and what has expired by then is revoked."""
        tasks, _, call = self.open()

        def later(seconds: float) -> datetime:
            return datetime.now(timezone.utc) + timedelta(seconds=seconds)

        began = self.reactor.seconds()
        callings = [call(tasks.add, (1, 1), countdown=1.0), call(tasks.add, (2, 2), eta=later(1.0))]
        late = [
            call(tasks.add, (1, 1), countdown=0.4, expires=0.1),
            call(tasks.add, (1, 1), countdown=0.4, expires=later(0.1)),
        ]
        handles = [calling.async_result for calling in callings]
        await self.sleep(0.3)
        self.assertEqual([await handle.state() for handle in handles], ["PENDING"] * 2)
        self.assertEqual([await handle.ready() for handle in handles], [False] * 2)
        self.assertEqual(await outcomes(callings), [2, 4])
        self.assertGreater(self.reactor.seconds() - began, 0.95)
        errors = await outcomes(late)
        handles = [calling.async_result for calling in late]
        for handle, error in zip(handles, errors, strict=True):
            self.assertIs(type(error), TaskRevokedError)
            await self.failure_of(handle.get(timeout=30), TaskRevokedError)
            self.assertEqual(await handle.state(), "REVOKED")
            answers = [await handle.ready(), await handle.failed(), await handle.successful()]
            self.assertEqual(answers, [True, False, False])

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

    async def test_runs(self: Any) -> None:
        """Links and error callbacks of tasks, chains and groups run once for each task they belong to."""
        await self.assert_runs(RUNS)


# Celery's own, of chords with error callbacks.
@pytest.mark.filterwarnings("ignore:task_allow_error_cb_on_chord_header=False:PendingDeprecationWarning")
class _Chords(_Cases):
    """What needs a result backend that keeps results."""

    async def test_ids_of_a_chord(self: Any) -> None:
        """The result of a chord's body leads to the header and what stands before it; so do its ids."""
        tasks, _, call = self.open()
        ids = tasks.ids
        header, body = [ids.si(i) for i in range(2, 6)], [ids.s(), ids.si(9)]
        for canvas in (
            chain(ids.si(0), ids.si(1), chord(group(header), chain(*body))),
            ids.si(0) | ids.si(1) | group(header) | body[0] | body[1],
        ):
            last = call(canvas)
            root, parent, own, value = await last
            middle, members = last.parent, last.parent.parent
            before, first = members.parent, members.parent.parent
            self.assertEqual((own, parent, value, root), (last.id, middle.id, 9, first.id))
            found = await members.get(timeout=30)
            self.assertEqual(
                found, [[root, before.id, one.id, i] for i, one in enumerate(members.results, 2)]
            )
            # The body is called by that task of the header that ends last.
            value = await middle.get(timeout=30)
            self.assertIn(value[1], [one.id for one in members.results])
            self.assertEqual(value, [root, value[1], middle.id, found])
            self.assertEqual(await before.get(timeout=30), [root, first.id, before.id, 1])
            self.assertEqual(await first.get(timeout=30), [root, None, root, 0])

    async def test_arguments_of_chords(self: Any) -> None:
        """Arguments given with the call of a chord reach each task of its header, or the first of a chain."""
        tasks, _, call = self.open()
        header = group(tasks.echo.s(i) for i in range(2))
        callings = [
            call(header | tasks.identity.s(), (4,), {"z": 1}),
            call(
                tasks.echo.s(1) | group(tasks.identity.s(), tasks.identity.s()) | tasks.identity.s(),
                (0,),
                {"z": 2},
            ),
            call(
                chain(chord([tasks.identity.s(), tasks.identity.s()], tasks.identity.s()), tasks.xsum.s()),
                (3,),
            ),
            call(
                chain(group(tasks.add.s(1, 2), tasks.add.s(3, 4)), tasks.tsum.s()).on_error(tasks.echo.s()),
                eta=datetime.now(timezone.utc) + timedelta(seconds=0.3),
            ),
        ]
        self.assertEqual(
            await outcomes(callings),
            [[[[4, i], {"z": 1}] for i in range(2)], [[[0, 1], {"z": 2}]] * 2, 6, 10],
        )

    async def test_stamps_of_all(self: Any) -> None:
        """A visitor's stamps are with every task of a canvas, and with its links."""
        tasks, tx, call = self.open()
        path = self.temporary()

        def noted() -> Any:
            return tasks.record_request.si(str(path), "stamps")

        canvases = [
            chain(group(noted()), noted(), noted()),
            chord([noted(), noted() | noted()], noted()),
            chord(group(chain(noted(), noted()), chord([noted(), noted()], noted())), noted()),
            group(noted() | noted(), noted(), noted()) | group(noted(), noted()),
        ]
        for canvas in canvases:
            canvas.link(noted())
            canvas.link_error(tasks.record.si(str(path), "never"))
            canvas.stamp(visitor=Stamp(number=42))
        await outcomes(map(call, canvases))
        # The tasks of each, and its link: that of a group is the link of its first task.
        lines = await self.in_thread(wait_for_file, path, 3 + 4 + 6 + 6 + len(canvases))
        self.assertEqual([json.loads(line) for line in lines], [{"number": 42}] * 23)
        await self.assert_empties(tx)

    async def test_sent_twice(self: Any) -> None:
        """A chain whose message comes twice has one chord all the same: the message has its ids."""
        tasks, _, call = self.open()
        path = self.temporary()

        def again(
            body: Any, exchange: Any, routing_key: Any, headers: Any, properties: Any, **_: Any
        ) -> None:
            with tasks._app.producer_or_acquire() as producer:
                producer.publish(
                    body, exchange=exchange, routing_key=routing_key, headers=headers, **properties
                )

        signals.before_task_publish.connect(again)
        self.addCleanup(signals.before_task_publish.disconnect, again)
        header = [tasks.record_request.si(str(path), "group"), tasks.identity.si(2)]
        await call(chain(tasks.identity.si(1), chord(header, tasks.identity.si(3))))
        lines = await self.in_thread(wait_for_file, path, 2)
        self.assertEqual((len(lines), len({*lines})), (2, 1))

    async def test_chord_error(self: Any) -> None:
        """A chord fails with the exception of the task that has failed, with a note that says where; error callbacks run once."""
        tasks, tx, call = self.open()
        path = self.temporary()
        body = tasks.tsum.s().on_error(tasks.record.si(str(path), "body"))
        calling = call(chord([tasks.add.si(1, 1), tasks.fail.si("header")], body))
        error = await self.failure_of(calling, ValueError)
        failed = calling.parent.results[1]
        self.assertEqual(str(error), "header")
        if sys.version_info >= (3, 11):
            (note,) = error.__notes__
            self.assertIn(failed.id, note)
            self.assertIn(calling.parent.id, note)
        await self.failure_of(failed.get(timeout=30), ValueError)
        self.assertEqual(await self.in_thread(wait_for_file, path, 1), ["body"])
        # A bare id knows no header.
        error = await self.failure_of(tx.AsyncResult(calling.id).get(timeout=30), ChordError)
        self.assertEqual(str(error), f"Dependency {failed.id} raised ValueError('header')")
        error = error.with_traceback(None)

    async def test_chord_error_whenever_asked(self: Any) -> None:
        """It is the same before the states have come and after, and at every door that knows the header."""
        tasks, tx, call = self.open()
        bodies = (
            tasks.tsum.s(),
            tasks.tsum.s() | tasks.identity.s(),
            group(tasks.tsum.s(), tasks.tsum.s()),
            chord([tasks.identity.s(), tasks.identity.s()], tasks.tsum.s()),
        )

        def header() -> Any:
            return [tasks.identity.si(1), tasks.fail.si("one"), tasks.fail.si("two")]

        for body in bodies:
            calling, late = call(chord(header(), body)), call(chord(header(), body))
            early = [calling.get(timeout=30), calling.async_result.get(timeout=30)]
            errors = await outcomes([calling, *early])
            members = late
            while members.parent is not None:
                members = members.parent
            await outcomes([one.get(timeout=30) for one in members.results])
            errors += await outcomes([late.get(timeout=30), late.async_result.get(timeout=30), late])
            errors += await outcomes([late.get(timeout=30), late.async_result.get(timeout=30)])
            self.assertEqual([repr(error) for error in errors], ["ValueError('one')"] * len(errors))
        await self.assert_empties(tx)

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
        """A chord fails with the exception of the task that has failed; where that is a chord itself, with ChordError, as it is stored."""
        await self.assert_failures(CHORD_FAILURES)

    async def test_header_before_a_chord(self: Any) -> None:
        """A header fails the chord that is its body, however the two were put together."""
        tasks, tx, call = self.open()

        def header() -> Any:
            return group(tasks.add.si(1, 1), tasks.fail.si("header"))

        def body() -> Any:
            return chord(group(tasks.add.si(1, 1), tasks.add.si(2, 2)), tasks.tsum.s())

        callings = [
            call(canvas)
            for canvas in (
                chain(header(), body()),
                chord(header(), body()),
                header() | group(tasks.add.si(1, 1), tasks.add.si(2, 2)) | tasks.tsum.s(),
            )
        ]
        for calling in callings:
            calling.addTimeout(3, self.reactor)
        errors = await outcomes(callings)
        self.assertEqual([repr(error) for error in errors], ["ValueError('header')"] * 3)
        await self.assert_empties(tx)

    async def test_chord_runs(self: Any) -> None:
        """Groups, chords and replaced tasks run once, in order, and so do their links and error callbacks."""
        await self.assert_runs(CHORD_RUNS)

    async def test_chord_errbacks(self: Any) -> None:
        """The error callbacks of a chord run once; they are told of the body where the header fails."""

        def guarded(build: Any) -> Any:
            def guard(tasks: Tasks, book: Book) -> Any:
                canvas, outcome, lines = build(tasks, book)
                for errback in book.errbacks():
                    canvas.link_error(errback)
                return canvas, outcome, lines

            return guard

        await self.assert_runs({name: guarded(build) for name, build in ERRBACKS.items()})

    async def test_header_errbacks(self: Any) -> None:
        """``task_allow_error_cb_on_chord_header``: they run for each failure in a header and the body."""
        await self.assert_runs(HEADER_RUNS, task_allow_error_cb_on_chord_header=True)


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
