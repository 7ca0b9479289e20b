"""The Flower client app: passes every message to the worker of its node and returns the worker's answer.

It imports neither torch nor transformers, because Flower starts a process for every message.
"""

from __future__ import annotations

import sys
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hetlora.errors import HetLoraError
from hetlora.flower.envelope import WIRE, Envelope, quoted
from hetlora.flower.flwr_messages import from_record_dict, to_record_dict
from hetlora.flower.node_config import NodeConfig

__all__ = ["app"]

app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Announce this node."""
    return _answered(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train clients of this node."""
    return _answered(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score this node's held-out rows."""
    return _answered(message, context)


def _answered(message: Message, context: Context) -> Message:
    name, hello, wire = context.node_config.get("name"), False, WIRE
    try:
        asked = from_record_dict(message.content)
        hello, wire = asked.kind == "hello", asked.value.get("wire", WIRE)
        if asked.kind == "refused":
            print(f"hetlora: the server refused this client: {quoted(asked.value.get('reason'))}", file=sys.stderr)
            return Message(to_record_dict(Envelope("noted")), reply_to=message)
        envelope = _ask(asked, NodeConfig.read(context.node_config), context.node_id)
    except HetLoraError as error:
        envelope = Envelope("refused", {"reason": str(error)})
    if envelope.kind == "refused":
        reason = envelope.value["reason"]
        print(f"hetlora: refused: {reason}", file=sys.stderr)
        if hello and name:  # otherwise the server knows the node by its number alone
            envelope = Envelope("refused", {"reason": quoted(f"client {name!r}: {reason}")})
    return Message(to_record_dict(envelope, wire), reply_to=message)


def _ask(envelope: Envelope, settings: NodeConfig, node: int) -> Envelope:
    if _within_ray():
        # Flower's simulation reuses its processes, and any of them may serve any node.
        from hetlora.flower.client_runtime import answer

        return answer(envelope, settings, keeps=False, simulated=True)
    from hetlora.flower.client_process import ask

    return ask(envelope, settings, node)


def _within_ray() -> bool:
    ray: Any = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
