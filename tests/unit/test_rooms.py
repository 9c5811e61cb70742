"""The rooms of docs/design.md: which may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

import twistedcelery

ROOT = Path(twistedcelery.__file__).parent

#: Pure: no reactor, no transport, no timer.
PURE = [
    "errors.py",
    "signals.py",
    "interfaces.py",
    "_operations.py",
    "_waiters.py",
    "_pace.py",
    "_weight.py",
    "_ancestry.py",
    "_reactor_scope.py",
    "_urls.py",
    "amqp/tables.py",
    "amqp/methods.py",
    "amqp/codec.py",
    "amqp/events.py",
    "amqp/config.py",
    "amqp/login.py",
    "amqp/confirms.py",
    "amqp/connection.py",
    "redis/replies.py",
    "redis/connection.py",
    "redis/pieces.py",
    "redis/subscription.py",
]

#: The only modules of the package that a room may import; others are free but for UPSTAIRS.
ONLY = {
    "_capture": {"_operations", "errors", "signals"},
    "_operations": set(),
    "_waiters": {"interfaces"},
    "_waits": {"_ancestry", "_waiters", "errors", "interfaces"},
    "_outbox": {"_operations", "_slices", "_unit", "errors", "interfaces"},
    "_unit": {"_operations", "_outbox"},
    "_keeper": {"_explain", "errors"},
    "errors": set(),
    "signals": set(),
    "interfaces": {"_operations"},
    "_pace": set(),
    "_slices": set(),
    "_steady": set(),
    "_weight": set(),
    "_ancestry": set(),
    "_reactor_scope": set(),
    "_outcomes": {"_operations", "_slices", "interfaces"},
    "_undecodable": set(),
    "_inflate": {"_slices", "errors"},
    "_limits": set(),
    "amqp": {
        "_explain",
        "_inflate",
        "_keeper",
        "_limits",
        "_operations",
        "_outcomes",
        "_pace",
        "_steady",
        "_undecodable",
        "_urls",
        "errors",
        "interfaces",
    },
    "redis": {
        "_endpoints",
        "_explain",
        "_inflate",
        "_keeper",
        "_limits",
        "_operations",
        "_outcomes",
        "_pace",
        "_slices",
        "_steady",
        "_undecodable",
        "_urls",
        "errors",
        "interfaces",
    },
    # Handles and waits know the engine by its type only.
    "_handles": {"_ancestry", "_engine", "_slices", "_waits", "errors", "interfaces"},
    "results": {"_engine", "_handles", "_slices", "_unit", "_waits", "errors", "interfaces"},
}


def imports(path):
    """Yield (module, at run time, at module level) for each import of a file, package-relative names made absolute."""
    package = ["twistedcelery", *path.relative_to(ROOT).parts[:-1]]

    def walk(node, checking, level):
        for child in ast.iter_child_nodes(node):
            inside = checking or (
                isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING"
            )
            if isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                name = ".".join([*base, *([child.module] if child.module else [])])
                yield from ((f"{name}.{alias.name}", not inside, level) for alias in child.names)
            elif isinstance(child, ast.Import):
                yield from ((alias.name, not inside, level) for alias in child.names)
            else:
                deeper = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, inside, level and not deeper)

    yield from walk(ast.parse(path.read_text()), False, True)


def rooms(path):
    """Yield the names of the package's own modules that a file imports, also for types."""
    for name, _, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "twistedcelery" and len(parts) > 1:
            yield parts[1]


class RoomTests(SynchronousTestCase):
    def test_pure_modules(self):
        """Codecs, state machines, capture and the table of waits import nothing of Twisted's I/O."""
        pure = [ROOT / name for name in PURE] + sorted((ROOT / "_capture").glob("*.py"))
        for path in pure:
            found = [
                name
                for name, runs, _ in imports(path)
                if runs and name.startswith(("twisted.internet", "twisted.protocols"))
            ]
            self.assertEqual(found, [], path.name)

    def test_nobody_imports_the_reactor(self):
        """The global reactor is imported by a function that needs it, never by a module."""
        for path in ROOT.rglob("*.py"):
            found = [name for name, _, level in imports(path) if level and "internet.reactor" in name]
            self.assertEqual(found, [], path.name)

    def test_rooms_know_only_what_is_below(self):
        """Each room imports only those that it may."""
        for room, allowed in ONLY.items():
            one = ROOT / f"{room}.py"
            for path in [one] if one.exists() else sorted((ROOT / room).rglob("*.py")):
                self.assertEqual(set(rooms(path)) - allowed - {room}, set(), path.name)

    def test_import_installs_no_reactor(self):
        """Importing the package leaves the choice of the reactor to the program."""
        program = (
            "import sys, twistedcelery; "
            "sys.exit('twisted.internet.reactor' in sys.modules or 'twisted.internet.epollreactor' in sys.modules)"
        )
        self.assertEqual(subprocess.run([sys.executable, "-c", program], check=False).returncode, 0)

    def test_exports(self):
        """What the package exports is sorted, exists, and is all that it shows."""
        self.assertEqual(twistedcelery.__all__, sorted(twistedcelery.__all__))
        for name in twistedcelery.__all__:
            self.assertTrue(callable(getattr(twistedcelery, name)), name)
