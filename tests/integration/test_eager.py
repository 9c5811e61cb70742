"""``task_always_eager`` and ``apply()``: tasks run in line, and what they give can be waited for."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any

from celery import Celery, chain, chord, group
from celery.exceptions import Ignore, Reject, Retry, TaskRevokedError
from celery.result import EagerResult
from twisted.internet.defer import Deferred, succeed

from tests.integration._clients import outcomes
from tests.integration._places import Tasks
from tests.integration.canvas_cases import CHORDS, FAILURES, PLAIN
from tests.support.case import IntegrationTestCase
from tests.support.servers import wait_for_file
from twistedcelery import Celery as TwistedCeleryApp
from twistedcelery import TwistedCelery

if TYPE_CHECKING:
    from collections.abc import Callable

#: Nobody listens there.
NOWHERE = "redis://127.0.0.1:1/0"

#: What an eager group gives otherwise in stock Celery too.
UNLIKE = {"group_of_one_chain_to_group": [[4, 5]]}

#: What a task may raise that ends it without a value, and the state that it ends in.
WITHOUT_VALUE: dict[str, Any] = {"IGNORED": Ignore, "REJECTED": Reject, "RETRY": Retry}


class _Eager:
    """What holds through either door."""

    def open(self: Any) -> tuple[Tasks, Callable[..., Any]]:
        """Give the tasks of a new eager app, and what calls a canvas."""
        raise NotImplementedError

    def setUp(self: Any) -> Any:
        """Have the reactor run before the first call."""
        super().setUp()  # type: ignore[misc]
        return self.sleep(0)

    async def found(self: Any, canvases: dict[str, Callable[[Tasks], Any]]) -> dict[str, Any]:
        """Call each; gives their values and errors, and an error for those that do not come."""
        tasks, call = self.open()

        async def one(build: Callable[[Tasks], Any]) -> Any:
            return await call(build(tasks)).addTimeout(1, self.reactor)

        values = [Deferred.fromCoroutine(one(build)) for build in canvases.values()]
        return dict(zip(canvases, await outcomes(values), strict=True))

    async def test_task(self: Any) -> None:
        """One task gives its value or its own exception, and its states can be asked for."""
        tasks, call = self.open()
        calling = call(tasks.add, (1, 2))
        self.assertEqual(await calling, 3)
        failing = call(tasks.custom_error, (7, "text"))
        handles = [calling.async_result, failing.async_result]
        (error,) = await outcomes([failing])
        self.assertEqual((type(error).__name__, error.args), ("CustomError", (7, "text")))
        self.assertEqual([await handle.state() for handle in handles], ["SUCCESS", "FAILURE"])
        self.assertEqual([await handle.ready() for handle in handles], [True, True])
        # What has run here is kept nowhere else.
        await calling.forget()
        self.assertEqual(await handles[0].get(timeout=5), 3)
        self.assertIs(await handles[1].get(propagate=False), error)

    async def test_values(self: Any) -> None:
        """Every primitive, and what can be made of them."""
        cases = {name: (build, UNLIKE.get(name, value)) for name, (build, value) in PLAIN.items()}
        values = await self.found({name: build for name, (build, _) in cases.items()})
        self.assertEqual(values, {name: value for name, (_, value) in cases.items()})

    async def test_failures(self: Any) -> None:
        """The task's own exception comes, wherever in the canvas it is raised."""
        errors = await self.found({name: build for name, (build, _, _) in FAILURES.items()})
        wrong = {
            name: errors[name]
            for name, (_, kind, text) in FAILURES.items()
            if not isinstance(errors[name], kind) or text not in str(errors[name])
        }
        self.assertEqual(wrong, {})

    async def test_chords(self: Any) -> None:
        """Chords, and chords in everything else."""
        names = [
            "chord", "chord_in_chain", "chord_generator", "chord_rebuilt", "chord_of_groups", "chord_body_chain",
            "chord_body_group", "chord_to_group", "chords_in_depth", "group_of_chords", "chain_of_chords",
            "chain_chord_chain_chord", "chain_mid_group", "stamped_chord", "large_header",
        ]  # fmt: skip
        values = await self.found({name: CHORDS[name][0] for name in names})
        self.assertEqual(values, {name: CHORDS[name][1] for name in names})

    async def test_failing_chords(self: Any) -> None:
        """A chord fails with the exception of the task that has failed, in its header or its body."""
        errors = await self.found(
            {
                "header": lambda t: chord([t.add.si(1, 1), t.fail.si("header")], t.tsum.s()),
                "body": lambda t: chord([t.add.si(1, 1)], t.fail.si("body")),
            }
        )
        self.assertEqual(
            {name: (type(error), str(error)) for name, error in errors.items()},
            {name: (ValueError, name) for name in ("header", "body")},
        )

    async def test_within_a_task(self: Any) -> None:
        """A task that runs in line may call a chain or a chord itself."""
        tasks, call = self.open()
        path = Path(self.mktemp())

        @tasks._app.task(name="outer", shared=False)
        def outer(x):
            chain(tasks.add.s(x, 1), tasks.add.s(2)).apply_async()
            chord([tasks.add.s(x, 1), tasks.add.s(x, 2)], tasks.record.si(str(path), "body")).apply_async()
            return [x]

        self.assertEqual(await call(outer, (4,)).addTimeout(1, self.reactor), [4])
        self.assertEqual(await self.in_thread(wait_for_file, path, 1), ["body"])

    async def test_in_line(self: Any) -> None:
        """Eager tasks run in the caller's thread, however many there are."""
        tasks, call = self.open()

        @tasks._app.task(name="where", shared=False)
        def where():
            return get_ident()

        for canvas in (
            where.s(),
            chord([where.s()] * 3, tasks.identity.s()),
            chord([where.s()] * 60, tasks.identity.s()),
        ):
            found = await call(canvas).addTimeout(1, self.reactor)
            self.assertEqual({get_ident()}, {found} if isinstance(found, int) else {*found})

    async def test_error_callbacks(self: Any) -> None:
        """Links and error callbacks run in line too, one that is tried again as well."""
        tasks, call = self.open()
        path = Path(self.mktemp())
        failing = tasks.fail.s("x")
        failing.link_error(tasks.record.si(str(path), "error"))
        failing.link_error(tasks.record_after_retry.si(str(path), "retried"))
        (error,) = await outcomes([call(failing).addTimeout(1, self.reactor)])
        self.assertEqual((type(error), str(error)), (ValueError, "x"))
        self.assertEqual(await call(tasks.add.s(1, 1).set(link=tasks.record.si(str(path), "linked"))), 2)
        lines = await self.in_thread(wait_for_file, path, 3)
        self.assertEqual(sorted(lines), ["error", "linked", "retried"])

    async def test_without_a_value(self: Any) -> None:
        """Ignore, Reject and Retry end a task with None for a value, wherever it stands; its state says which, its info is what was raised."""
        tasks, call = self.open()

        @tasks._app.task(name="raises", shared=False)
        def raises(*args):
            raise WITHOUT_VALUE[args[-1]]("no")

        for state, kind in WITHOUT_VALUE.items():
            gone, one = raises.si(state), tasks.identity.s(1)
            for canvas, value in (
                (gone, None),
                (group(gone, one), [None, 1]),
                (chain(one, gone), None),
                (chain(gone, tasks.identity.s()), None),
                (chord([gone, one], tasks.identity.s()), [None, 1]),
                (chord([one], gone), None),
            ):
                found = await call(canvas).addTimeout(1, self.reactor)
                self.assertEqual(found, value)
                # Twisted takes what has fired at once there.
                passed_on = succeed(canvas).addCallback(call)
                self.assertEqual(await passed_on.addTimeout(1, self.reactor), value)
            handle = call(gone).async_result
            self.assertEqual(
                [
                    await asked.addTimeout(1, self.reactor)
                    for asked in (handle.state(), handle.ready(), handle.successful(), handle.failed())
                ],
                [state, True, False, False],
            )
            self.assertIsInstance(await handle.info(), kind)
            messages: list[Any] = []
            self.assertIsNone(await handle.get(on_message=messages.append))
            self.assertEqual([message["status"] for message in messages], [state])
            members = call(group(gone, one)).async_result
            self.assertEqual(await members.ready(), True)
            self.assertEqual(await members.waiting(), False)
            self.assertEqual(await members.completed_count(), 1)
            self.assertEqual(await members.get(), [None, 1])

    async def test_retry(self: Any) -> None:
        """A task that retries itself runs again, here and now; its last run gives the value or the error."""
        tasks, call = self.open()

        @tasks._app.task(name="again", bind=True, shared=False, max_retries=2)
        def again(task, least):
            if task.request.retries < least:
                raise task.retry(exc=KeyError("never"))
            return task.request.retries

        self.assertEqual(await call(again.s(2)).addTimeout(1, self.reactor), 2)
        self.assertEqual(
            await call(chain(group(again.s(1), again.s(0)), tasks.tsum.s())).addTimeout(1, self.reactor), 1
        )
        self.assertEqual(await call(again, (1,), task_id="known").addTimeout(1, self.reactor), 1)
        (error,) = await outcomes([call(again.s(3)).addTimeout(1, self.reactor)])
        self.assertIsInstance(error, KeyError)

    async def test_task_id_of_a_canvas(self: Any) -> None:
        """A chain that is called with ``task_id=`` gives what its last link does, although all links get that id."""
        tasks, call = self.open()
        first, second = tasks.add.s(1, 2), tasks.add.s(10)
        for canvas, value in (
            (chain(first, second), 13),
            (chain(first, chain(second, second)), 23),
            (chain(first, group(second, second)), [13, 13]),
            (group(first, chain(first, second)), [3, 13]),
            (chord([first, first], tasks.tsum.s()), 6),
        ):
            calling = call(canvas, task_id="known")
            self.assertEqual(await calling.addTimeout(1, self.reactor), value)
            self.assertEqual(await calling.async_result.get(), value)
        calling = call(chain(first, tasks.fail.si("last")), task_id="known")
        handle = calling.async_result
        (error,) = await outcomes([calling.addTimeout(1, self.reactor)])
        self.assertEqual((type(error), str(error)), (ValueError, "last"))
        self.assertEqual((handle.id, await handle.state()), ("known", "FAILURE"))


class EagerThroughTwistedCelery(_Eager, IntegrationTestCase):
    """Calls made by ``tx.apply_async``."""

    def open(self) -> tuple[Tasks, Callable[..., Any]]:
        app = Celery("client", broker=NOWHERE, backend=NOWHERE)
        app.conf.task_always_eager = True
        tx = TwistedCelery(app)
        self.addCleanup(tx.stopService)
        return Tasks(app), tx.apply_async

    async def test_without_a_value_in_a_thread(self) -> None:
        """It is the same where the tasks run in a thread."""
        tasks, call = self.open()

        @tasks._app.task(name="raises", shared=False)
        def raises(state):
            raise WITHOUT_VALUE[state]("no")

        members = [raises.s(state) for state in WITHOUT_VALUE]
        self.assertEqual(await call(group(members), in_thread=True).addTimeout(5, self.reactor), [None] * 3)
        calling = call(members[0], in_thread=True)
        self.assertIsNone(await calling.addTimeout(5, self.reactor))
        self.assertEqual(await calling.state(), "IGNORED")

    async def test_chain_in_a_thread(self) -> None:
        """A chain that runs in a thread, where it always has an id, gives what its last link does."""
        tasks, call = self.open()
        calling = call(chain(tasks.add.s(1, 2), tasks.add.s(10)), in_thread=True)
        self.assertEqual(await calling.addTimeout(5, self.reactor), 13)
        self.assertEqual(await calling.info(), 13)
        (error,) = await outcomes([call(chain(tasks.add.s(1, 2), tasks.fail.si("last")), in_thread=True)])
        self.assertEqual((type(error), str(error)), (ValueError, "last"))


class EagerThroughDropin(_Eager, IntegrationTestCase):
    """Calls made by the canvas itself, of an app whose class was exchanged."""

    def open(self, **settings: Any) -> tuple[Tasks, Callable[..., Any]]:
        app = self.app(task_always_eager=True)
        return Tasks(app), lambda canvas, *args, **options: canvas.apply_async(*args, **options)

    def app(self, **settings: Any) -> TwistedCeleryApp:
        """Make an app of the drop-in; its TwistedCelery ends with the test."""
        app = TwistedCeleryApp("client", broker=NOWHERE, backend=NOWHERE)
        app.conf.update(settings)
        self.addCleanup(app.twisted.stopService)
        return app

    async def test_apply(self) -> None:
        """``apply()`` gives a result that can be yielded; Celery's names answer at once, ``get()`` too."""
        app = self.app()
        tasks = Tasks(app)
        good, bad = tasks.add.apply((1, 2)), tasks.fail.apply(("x",))
        self.assertEqual((await good, good.state, good.get()), (3, "SUCCESS", 3))
        self.assertIsInstance(good, EagerResult)
        for waiting in (
            tasks.fail.apply(("x",)),
            succeed(None).addCallback(lambda _: tasks.fail.apply(("x",))),
            chain(tasks.add.s(1, 2), tasks.fail.si("x")).apply(),
            group([tasks.fail.si("x")]).apply(),
        ):
            await self.failure_of(waiting, ValueError)
        for other in (copy.copy(good), pickle.loads(pickle.dumps(good))):
            self.assertEqual((other.id, other.state, other.get()), (good.id, "SUCCESS", 3))
        self.assertEqual(
            (bad.state, bad.ready(), bad.failed(), bad.successful()), ("FAILURE", True, True, False)
        )
        (error,) = await outcomes([bad])
        self.assertEqual((type(error), str(error)), (ValueError, "x"))
        # As in Celery, whether it has been waited for or not.
        self.assertEqual(tasks.add.apply((3, 4)).get(), 7)
        self.assertEqual(str(tasks.fail.apply(("y",)).get(propagate=False)), "y")
        self.assertRaises(ValueError, tasks.fail.apply(("z",)).get)
        self.assertIsNone(await good.forget())
        self.assertIsNone(await good.revoke())
        self.assertEqual(good.state, "REVOKED")
        # Before it has fired.
        revoked = tasks.add.apply((1, 2))
        await revoked.revoke()
        await self.failure_of(succeed(None).addCallback(lambda _: revoked), TaskRevokedError)

    async def test_apply_of_a_canvas(self) -> None:
        """So does a signature's, a group's, a chain's and a chord's."""
        tasks = Tasks(self.app())
        self.assertEqual(await tasks.add.s(1, 1).apply(), 2)
        self.assertEqual(
            await chain(tasks.add.s(1, 1), tasks.add.s(2)).apply().addTimeout(1, self.reactor), 4
        )
        self.assertEqual(
            await group(tasks.add.s(1, 1), tasks.add.s(2, 2)).apply().addTimeout(1, self.reactor), [2, 4]
        )
        canvas = chord([tasks.add.s(1, 1), tasks.add.s(2, 2)], tasks.tsum.s())
        self.assertEqual(await canvas.apply().addTimeout(1, self.reactor), 6)

    async def test_ids(self) -> None:
        """A task that calls others by ``apply()`` is their parent, and the first of all is the root."""
        app = self.app()

        @app.task(name="nested", bind=True, shared=False)
        def nested(task, depth):
            ids = [task.request.root_id, task.request.parent_id, task.request.id]
            return [ids] if not depth else [ids, *nested.apply((depth - 1,)).get()]

        calling = nested.apply((2,))
        first, second, third = await calling
        self.assertEqual(first, [calling.id, None, calling.id])
        self.assertEqual(second[:2], [calling.id, calling.id])
        self.assertEqual(third[:2], [calling.id, second[2]])
