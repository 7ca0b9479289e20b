"""Methods by their names in configurations: from `METHODS`, or from another package."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_origin, get_type_hints

from hetlora.core.method import Method
from hetlora.methods import METHODS

__all__ = ["argument_types", "find_method", "made_of", "source_of"]

Factory = Callable[..., Method[Any]]


def find_method(name: str, admit: Callable[[str], None] | None = None) -> Factory:
    """Return the factory of a method.

    Args:
        name: A name in `METHODS`, or ``"package.module:factory"``. The module is imported, so that its code runs.
        admit: Called with the name of the module before the import; raises ValueError to refuse it.

    Raises:
        ValueError: There is no such factory.

    Example:
        >>> find_method("rbla") is find_method("hetlora.methods.rbla:rbla")
        True
        >>> find_method("hetlora.methods.rbla:rbl")
        Traceback (most recent call last):
        ValueError: 'hetlora.methods.rbla:rbl': hetlora.methods.rbla has no 'rbl'; did you mean 'rbla'?
    """
    if name in METHODS:
        return METHODS[name]
    if name.lower() in ("homlora", "hom_lora"):
        raise ValueError(f"{name!r}: one rank for all is method 'fedavg', or any other with ranks.kind = 'same'")
    if ":" not in name:
        raise ValueError(
            f"{name!r} is not a method; {_meant(name, METHODS)}use one of {', '.join(sorted(METHODS))}, or "
            "'package.module:factory' for one of your own package"
        )
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ValueError(
            f"{name!r} names no factory; write the path of its module, one colon and its name, as in 'mypkg.fair:fair'"
        )
    try:
        if admit is not None:
            admit(module)
        return _factory(module, attribute)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error


def argument_types(factory: Factory) -> dict[str, Any]:
    """Return the arguments of a factory with their types.

    Raises:
        ValueError: An argument has no default or no type, or the types cannot be read.

    Example:
        >>> argument_types(METHODS["rbla"])
        {'weights': typing.Literal['examples', 'equal']}
    """
    try:
        parameters, types = inspect.signature(factory).parameters, get_type_hints(factory)
    except Exception as error:  # an annotation is any expression
        raise ValueError(f"the types of its arguments cannot be read: {_text(error)}; mend them") from error
    for name, parameter in parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"a configuration cannot give the argument {parameter}; take plain keywords")
        if parameter.default is parameter.empty:
            raise ValueError(f"its argument {name} has no default; give it one")
        if name not in types:
            raise ValueError(f"its argument {name} has no type; write one, as in 'q: float = 1.0'")
    return {name: types[name] for name in parameters}


def made_of(name: object, arguments: Mapping[str, Any]) -> Method[Any] | None:
    """Return the method of a name and arguments; with its default arguments if these are wrong; None if the name is wrong.

    The validation of the configuration reports such errors.

    Example:
        >>> made_of("flora", {}).folds, made_of("rbla", {"weights": 3}).name, made_of("nosuch", {}), made_of(3, {})
        (True, 'rbla', None, None)
    """
    made = None
    for given in (arguments, dict[str, Any]()):
        # A factory of another package may raise anything.
        with contextlib.suppress(Exception, SystemExit):
            made = made or (find_method(name)(**given) if isinstance(name, str) else None)
    return made if isinstance(made, Method) else None


def source_of(name: str) -> str | None:
    """Return the file of a factory of another package; None for a method in `METHODS`.

    Raises:
        ValueError: As `find_method`.
    """
    if name in METHODS:
        return None
    try:
        return inspect.getsourcefile(find_method(name))
    except TypeError:  # the factory has no file
        return None


def _factory(module: str, attribute: str) -> Factory:
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            top = module.partition(".")[0]
            way_out = (
                f"is {top} installed here, or on PYTHONPATH?" if error.name == top else f"{top} is here; mend the name"
            )
            raise ValueError(f"{error}; {way_out}") from error
        raise ValueError(f"importing {module} raises {_text(error)}; mend the module") from error
    if not hasattr(found, attribute):
        public = [key for key in vars(found) if not key.startswith("_")]
        meant = _meant(attribute, public) or f"there are {', '.join(public) or 'no names'}"
        raise ValueError(f"{module} has no {attribute!r}; {meant.rstrip()}")
    factory = getattr(found, attribute)
    if not callable(factory):
        way_out = "name a factory, a function that returns a hetlora.Method"
        raise ValueError(f"it is {factory!r:.60} and cannot be called; {way_out}")  # noqa: TRY004  what is wrong is the name
    argument_types(factory)
    # Before the call: the name may be that of any installed function, which a configuration must not call.
    returns = get_type_hints(factory).get("return")
    if (get_origin(returns) or returns) is not Method:
        raise ValueError(
            f"{attribute} does not say that it returns a Method; write `-> hetlora.Method[Any]` behind its arguments"
        )
    return factory  # type: ignore[no-any-return]


def _meant(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
