"""Faster ``app.conf.name``, with Celery's own answer.

A call reads five settings or more, and each costs Celery seven dictionary misses, with an exception for each. Which maps are asked for which
keys, in what order, is Celery's affair and differs between its versions. So one look-up of Celery's own is watched for each
name. From then on its questions are repeated without exceptions: as long as the maps answer as before, so does Celery, and the
value is read from where it was found. Anything else, and Celery looks it up.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from celery.app.utils import Settings as CelerySettings
from celery.utils.collections import AttributeDict, DictAttribute

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Settings", "quicken"]

_PLANS = "_twistedcelery_plans"


class _Plan(NamedTuple):
    """How one name was found."""

    #: All maps, in order; compared by identity first.
    maps: list[Any]
    #: ``contains, key``: what was asked in vain.
    misses: tuple[tuple[Callable[[str], bool], str], ...]
    #: What was asked at last, and had it.
    read: Callable[[str], Any]
    key: str


class Settings(CelerySettings):  # type: ignore[misc]  # untyped base
    """Celery's settings; a class of its own only to be asked first."""

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        plans = own.get(_PLANS)
        plan = None if plans is None else plans.get(name)
        if plan:
            maps, misses, read, key = plan
            if maps == own["maps"]:
                for contains, missed in misses:
                    if contains(missed):
                        break
                else:
                    try:
                        return read(key)
                    except KeyError:
                        pass  # it has gone; Celery knows what comes next
        value = super().__getattr__(name)
        if plans is not None and plan is not False:
            plans[name] = _watch(self, name) or False
        return value


def quicken(conf: Any) -> None:
    """Make an app's settings fast. Does nothing for settings of a class that is not Celery's."""
    if type(conf) is CelerySettings:
        vars(conf)[_PLANS] = {}
        # Celery's __setattr__ would take it for a setting.
        object.__setattr__(conf, "__class__", Settings)


class _Watched:
    """A map that remembers what it is asked."""

    def __init__(self, asked: list[tuple[Any, str]], mapping: Any) -> None:
        self._asked = asked
        self._mapping = mapping

    def __getitem__(self, key: str) -> Any:
        self._asked.append((self._mapping, key))
        return self._mapping[key]


def _watch(conf: Settings, name: str) -> _Plan | None:
    """Look a name up as Celery does, and return how it was found; None where that cannot be repeated."""
    maps = list(conf.__dict__["maps"])
    asked: list[tuple[Any, str]] = []
    watched = object.__new__(CelerySettings)
    watched.__dict__.update(vars(conf), maps=[_Watched(asked, mapping) for mapping in maps])
    try:
        value = CelerySettings.__getattr__(watched, name)
    except AttributeError:
        return None
    if not asked:
        return None
    found, key = asked.pop()
    if type(found) not in _CONTAINS or not all(type(mapping) in _CONTAINS for mapping, _ in asked):
        return None
    if found[key] is not value:
        return None
    return _Plan(
        maps,
        tuple((_CONTAINS[type(mapping)](mapping), missed) for mapping, missed in asked),
        found.__getitem__,
        key,
    )


#: How to ask a kind of map whether it has a key, as its ``__getitem__`` would, without an exception.
_CONTAINS: dict[type, Callable[[Any], Callable[[str], bool]]] = {
    dict: lambda mapping: mapping.__contains__,
    AttributeDict: lambda mapping: mapping.__contains__,
    DictAttribute: lambda mapping: partial(hasattr, vars(mapping)["obj"]),
}
