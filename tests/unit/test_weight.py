"""Which calls are captured in a thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import Celery, chain, chord, group
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery._weight import BYTES, ITEMS, MANY, is_big

if TYPE_CHECKING:
    from collections.abc import Iterator


class WeightTests(SynchronousTestCase):
    def setUp(self):
        self.app = Celery("client", broker="memory://", set_as_current=False)

        @self.app.task(name="t", shared=False)
        def t(*args: Any) -> Any:
            return args

        self.t: Any = t

    def assert_limit(self, build: Any, limit: int) -> None:
        """What has as many as the limit is small, with one more it is big."""
        self.assertFalse(is_big(build(limit), None, None))
        self.assertTrue(is_big(build(limit + 1), None, None))

    def test_tasks(self):
        """A canvas is big by its number of tasks, wherever they stand."""
        t = self.t
        self.assert_limit(lambda n: group([t.si()] * n), MANY)
        self.assert_limit(lambda n: chain([t.si()] * n), MANY)
        self.assert_limit(lambda n: chord([t.si()] * (n - 1), t.s()), MANY)
        self.assert_limit(lambda n: chord([t.si()], group([t.s()] * (n - 1))), MANY)
        self.assert_limit(lambda n: chain(t.si(), group([t.si()] * (n - 1))), MANY)
        self.assert_limit(lambda n: group(group([t.si()] * (n - 1)), t.si()), MANY)
        self.assert_limit(lambda n: t.chunks([(i,) for i in range(n * 10)], 10).group(), MANY)

    def test_chunks(self):
        """Chunks are as many tasks as there are pieces; of an iterator nobody knows, and it is not used up."""
        self.assert_limit(lambda n: self.t.chunks([(1,)] * (n * 10), 10), MANY)
        items = iter([(1,), (2,)])
        self.assertTrue(is_big(self.t.chunks(items, 1), None, None))
        self.assertEqual(list(items), [(1,), (2,)])

    def test_generator(self):
        """A group made of a generator keeps all of its tasks."""
        taken = []

        def tasks() -> Iterator[Any]:
            for number in range(MANY * 3):
                taken.append(number)
                yield self.t.si(number)

        canvas = group(tasks())
        self.assertTrue(is_big(canvas, None, None))
        self.assertEqual(len(canvas.tasks), MANY * 3)

    def test_items(self):
        """Arguments are big by their number of items, also inside of them, and keys count."""
        for build in (
            lambda n: [1] * (n - 1),
            lambda n: (1,) * (n - 1),
            lambda n: [[1] * (n - 2)],
            lambda n: {*range(n - 1)},
            lambda n: dict.fromkeys(range(n - 1)),
        ):
            # The tuple of arguments has one item itself, and with the keywords it makes two.
            self.assertFalse(is_big(None, (build(ITEMS - 2),), {}))
            self.assertTrue(is_big(None, (build(ITEMS + 2),), {}))

    def test_text(self):
        """They are by the length of their text, in keys too."""
        half = "x" * (BYTES // 2)
        for small, big in (
            ((half,), (half + "x", half)),
            (([half],), ([half, "x" + half],)),
            ((half.encode(),), (half.encode(), b"x" + half.encode())),
            (({half: 1},), ({half: half + "x"},)),
        ):
            self.assertFalse(is_big(None, small, None))
            self.assertTrue(is_big(None, big, None))
        self.assertTrue(is_big(None, None, {"a": half, "b": half + "x"}))

    def test_arguments_of_a_signature(self):
        """Those that a signature has count as well."""
        self.assertTrue(is_big(self.t.s("x" * (BYTES + 1)), None, None))
        self.assertTrue(is_big(self.t.s(a=[1] * (ITEMS + 1)), None, None))
        self.assertTrue(is_big(group(self.t.s("x" * (BYTES + 1))), None, None))
        self.assertFalse(is_big(self.t.s(1), (2,), {"b": 3}))
