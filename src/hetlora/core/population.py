"""Populations that are not stored: client names, and a value per client, computed on access."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar, overload

__all__ = ["MANY", "LazyClientMap", "NumberedNames", "finder", "names_of"]

V = TypeVar("V")

MANY = 20_000
"""Population size above which a sample or a bound replaces a pass over all clients."""


class NumberedNames(Sequence[str]):
    """The names ``client-000``, ``client-001`` … of `count` clients, without storing them.

    Example:
        >>> names = NumberedNames(1_000_000)
        >>> names[17], names.index("client-000017"), "client-17" in names
        ('client-000017', 17, False)
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.width = max(3, len(str(count - 1)))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        chosen = range(self._count)[index]
        return [self._name(number) for number in chosen] if isinstance(chosen, range) else self._name(chosen)

    def __iter__(self) -> Iterator[str]:
        return map(self._name, range(self._count))

    def __contains__(self, name: object) -> bool:
        return self._number(name) is not None

    def index(self, name: str, start: int = 0, stop: int | None = None) -> int:
        """Return a client's number.

        Raises:
            ValueError: There is no such client among `start … stop - 1`.
        """
        number = self._number(name)
        if number is None or number not in range(self._count)[start:stop]:
            raise ValueError(f"{name!r} is no client")
        return number

    def _name(self, number: int) -> str:
        return f"client-{number:0{self.width}}"

    def _number(self, name: object) -> int | None:
        digits = name.removeprefix("client-") if isinstance(name, str) else ""
        # A name has one spelling, but int() also reads "+17" and digits of other scripts.
        number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) == self.width else self._count
        return number if number < self._count and name == self._name(number) else None


def finder(names: Sequence[str]) -> Callable[[str], int]:
    """Return a function from a name to its index, without a search. It raises KeyError for an unknown name."""
    if isinstance(names, NumberedNames):

        def find(name: str) -> int:
            if name not in names:
                raise KeyError(name)
            return names.index(name)

        return find
    return {name: place for place, name in enumerate(names)}.__getitem__


class LazyClientMap(Mapping[str, V]):
    """A value per client, in the order of `names`, computed on access.

    Args:
        names: The clients' names, without repetition.
        at: Returns the value of a client from its index in `names`; the same at every call.

    Example:
        >>> squares = LazyClientMap(NumberedNames(10**6), lambda place: place**2)
        >>> squares["client-000012"], len(squares), "client-12" in squares
        (144, 1000000, False)
    """

    def __init__(self, names: Sequence[str], at: Callable[[int], V]) -> None:
        self.names = names
        self.at = at
        self._find = finder(names)

    def __getitem__(self, name: str) -> V:
        return self.at(self._find(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        try:
            self._find(name)  # type: ignore[arg-type]
        except (KeyError, TypeError):
            return False
        return True

    def __repr__(self) -> str:
        return repr(dict(self)) if len(self) <= 20 else f"<{type(self).__name__} of {len(self)} clients>"


def names_of(clients: Mapping[str, object]) -> Sequence[str]:
    """Return the names of clients as a sequence, lazily for a `LazyClientMap`."""
    return clients.names if isinstance(clients, LazyClientMap) else list(clients)
