"""An immutable mapping whose next version costs only the changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar, cast

__all__ = ["PersistentMap", "updated"]

K = TypeVar("K")
V = TypeVar("V")

_ABSENT = object()


class PersistentMap(Mapping[K, V]):
    """An immutable mapping. The newest version holds the items; an older one holds its differences and refers to the next one.

    A round with a million clients thus costs only what its cohort changes, and memory does not grow with the rounds: no version
    refers to an older one. (Rerooting, as of persistent arrays: Baker, 1991.)

    Example:
        >>> before = PersistentMap({"a": 1})
        >>> after = before.updated({"a": 2, "b": 3})
        >>> dict(before), dict(after)
        ({'a': 1}, {'a': 2, 'b': 3})
    """

    def __init__(self, items: Mapping[K, V]) -> None:
        self.held: dict[K, object] = dict(items)  # an older version holds its differences from the next one
        self.newer: PersistentMap[K, V] | None = None
        self._size = len(self.held)

    def updated(self, changes: Mapping[K, V]) -> PersistentMap[K, V]:
        """Return the next version. This costs the changes for the newest version, and all items for an older one."""
        if self.newer is not None:
            return PersistentMap(self).updated(changes)
        if not changes:
            return self
        after: PersistentMap[K, V] = PersistentMap({})
        after.held, self.held = self.held, {key: self.held.get(key, _ABSENT) for key in changes}
        after.held.update(changes)
        after._size = len(after.held)
        self.newer = after
        return after

    def __getitem__(self, key: K) -> V:
        version: PersistentMap[K, V] | None = self
        while version is not None:
            value = version.held.get(key, version)
            if value is _ABSENT:
                break
            if value is not version:  # the default of get: no such key here
                return cast("V", value)
            version = version.newer
        raise KeyError(key)

    def __iter__(self) -> Iterator[K]:
        newest = self
        while newest.newer is not None:
            newest = newest.newer
        return iter(newest.held) if newest is self else (key for key in newest.held if key in self)

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return repr(dict(self))


def updated(mapping: Mapping[K, V], changes: Mapping[K, V]) -> PersistentMap[K, V]:
    """Return `{**mapping, **changes}`, at the cost of the changes alone if this function made `mapping`."""
    return (mapping if isinstance(mapping, PersistentMap) else PersistentMap(mapping)).updated(changes)
