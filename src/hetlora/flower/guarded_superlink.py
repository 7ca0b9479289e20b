"""Start Flower's SuperLink with the middlewares of `answer_guard` in it: `hetlora flower superlink`."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from logging import ERROR
from pathlib import Path
from types import ModuleType
from typing import Any

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.supercore import log
from flwr.supercore.error import FlowerError, http_error_translator
from flwr.supercore.version import package_version
from sqlalchemy import text

from hetlora.errors import HetLoraError
from hetlora.flower.answer_guard import ANSWERS, OBJECTS, TASKS, AnswerGuard, BusyDatabase
from hetlora.flower.credentials import check_certificate

__all__ = ["guard", "in_one_transaction", "megabytes", "print_flower_help", "run_superlink"]

MAIN, COMMAND = "flwr.superlink.main", "flwr.superlink.cli.flower_superlink"
"""Modules of Flower: what makes its app, and the command that serves it."""

ENDING = 2.0
"""Seconds after the end of the SuperExec in which a SuperLink that ends has forgotten it."""

HANDLERS = (
    ("flwr.superlink.servicer.fleet.fleet_handlers", "pull_messages"),
    ("flwr.superlink.servicer.fleet.fleet_handlers", "push_object"),
    ("flwr.superlink.servicer.runtime.runtime_handlers", "pull_messages"),
    ("flwr.superlink.servicer.runtime.runtime_handlers", "push_object"),
)
"""Functions of Flower that `in_one_transaction` is for."""


def guard(app: Any, largest_answer: int) -> None:
    """Put the middlewares into Flower's app.

    Args:
        app: What `flwr.superlink.main.create_app` has made, before its first request.
        largest_answer: Bytes that an answer may have where its message does not say.

    Raises:
        HetLoraError: The app is not as expected.
    """
    from starlette.middleware import Middleware

    table = _module("flwr.supercore.protobuf.translation").PROTOBUF_REQUEST_TYPES
    wanted = {TASKS: PushAppMessagesRequest, ANSWERS: PushMessagesRequest, OBJECTS: PushObjectRequest}
    for path, kind in wanted.items():
        if table.get(("POST", path)) is not kind or not _has_route(app, path):
            raise _missing(f"request {path} as expected")
    inside = [one.kwargs.get("dispatch") is http_error_translator for one in app.user_middleware]
    if True not in inside:
        raise _missing("middleware http_error_translator")
    # Not outside of it, where a locked database is a response as any other error.
    app.user_middleware.insert(inside.index(True) + 1, Middleware(BusyDatabase))
    app.user_middleware.insert(0, Middleware(AnswerGuard, largest_answer=largest_answer))


def _has_route(app: Any, path: str) -> bool:
    from starlette.routing import Match

    scope = {"type": "http", "method": "POST", "path": path, "root_path": "", "headers": []}
    return any(route.matches(scope)[0] is Match.FULL for route in app.routes)


def in_one_transaction(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Return a handler of Flower's that leaves nothing behind where a write of it finds the database locked.

    These take a message, or store an object, and count bytes in a transaction of its own; asked again after that one has
    failed, they would find the message taken, or the object no longer expected.
    """

    def handled(*args: Any, **kwargs: Any) -> Any:
        state = inspect.signature(handler).bind(*args, **kwargs).arguments["state"]
        if not hasattr(state, "session"):  # kept in memory, which is never locked
            return handler(*args, **kwargs)
        with state.session() as session:
            # Python's sqlite3 begins a transaction by itself at UPDATE, but not at WITH … UPDATE, as which a message is taken.
            session.execute(text("BEGIN IMMEDIATE"))
            try:
                return handler(*args, **kwargs)
            except FlowerError as error:  # a refusal, such as that of an ended run, which Flower has tidied up before
                refusal = error
        raise refusal

    return handled


@contextlib.contextmanager
def _guarded(largest_answer: int) -> Iterator[Callable[[], None]]:
    """Yield Flower's command, which now starts a SuperLink with limits.

    Raises:
        HetLoraError: Flower has not what is needed.
    """
    main, command = _module(MAIN), _module(COMMAND)
    create: Any = getattr(main, "create_app", None)
    serve: Any = getattr(command, "_run_superlink_http_api", None)
    start: Any = getattr(command, "flower_superlink", None)
    if _parameters(create) != ["config", "superlink_lifespan_class"]:
        raise _missing(f"function create_app(config, superlink_lifespan_class) in {MAIN}")
    # Only a function that imports create_app when it is called gets ours.
    if not {MAIN, "create_app"} <= set(getattr(getattr(serve, "__code__", None), "co_names", ())):
        raise _missing(f"use of {MAIN}.create_app in {COMMAND}._run_superlink_http_api")
    if _parameters(start):
        raise _missing(f"function flower_superlink() in {COMMAND}")

    def create_app(config: Any = None, superlink_lifespan_class: Any = None) -> Any:
        own = config is not None and config.isolation == "subprocess"  # it starts the SuperExec itself
        if own and config.ssl_certfile is not None:
            check_certificate(Path(config.ssl_certfile), config.host)
        app = create(config, superlink_lifespan_class)
        guard(app, largest_answer)
        if own:
            threading.Thread(target=_watch_superexec, args=[app.state.superlink_lifespan], daemon=True).start()
        return app

    with contextlib.ExitStack() as replaced:
        for place, name in HANDLERS:
            module = _module(place)
            handler: Any = getattr(module, name, None)
            if "state" not in _parameters(handler):
                raise _missing(f"function {name}(request, state, …) in {place}")
            replaced.callback(setattr, module, name, handler)
            setattr(module, name, in_one_transaction(handler))
        replaced.callback(setattr, main, "create_app", create)
        setattr(main, "create_app", create_app)  # noqa: B010
        yield start


def _watch_superexec(lifespan: Any) -> None:
    """Log the end of the process that starts the apps of runs: a SuperLink without it listens, and no run begins."""
    while (process := lifespan.superexec_process) is None:
        time.sleep(1.0)
    code = process.wait()
    time.sleep(ENDING)
    if lifespan.superexec_process is process:
        log(ERROR, "hetlora: flower-superexec ended with %s: no run begins until this SuperLink is started again", code)


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _missing(f"module {name}") from error


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters) if callable(function) else ["no function"]


def _missing(what: str) -> HetLoraError:
    return HetLoraError(
        f"Flower {package_version} has no {what}; start flower-superlink, which then has no limits on answers"
    )


def megabytes(text: str) -> int:
    """Return a number of megabytes in bytes.

    Raises:
        HetLoraError: It is no number above 0.

    Example:
        >>> megabytes("0.5")
        500000
    """
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)) and number > 0:
            return math.ceil(number * 1e6)
    raise HetLoraError(f"--largest-answer {text}: give megabytes, such as 512")


def run_superlink(options: Sequence[str], largest_answer: str) -> int:
    """Run Flower's SuperLink in this process until it is ended.

    Args:
        options: Those of `flower-superlink`.
        largest_answer: Megabytes that an answer may have where its message does not say.

    Returns:
        The exit code.

    Raises:
        HetLoraError: An option is wrong, or Flower has not what is needed.
    """
    most = megabytes(largest_answer)
    # Flower's former API for nodes, over gRPC, would be a way in without limits.
    os.environ["FLWR_INTERNAL_GRPC_FLEET_API"] = "0"
    sys.argv = ["hetlora flower superlink", *options]  # where Flower looks for them
    with _guarded(most) as start:
        start()
    return 0


def print_flower_help() -> None:
    """Print the options of `flower-superlink`."""
    print(f"\nOptions of flower-superlink (Flower {package_version}):\n")
    parser: Any = getattr(_module(COMMAND), "_parse_args_run_superlink", None)
    if parser is not None:  # a later Flower may call it otherwise
        print(parser().format_help())
