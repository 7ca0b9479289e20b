"""A run whose configured clients are hosted by nodes with the data, on a cluster or simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hetlora.config import RunConfig
from hetlora.config.build import make_method, wire_rounding
from hetlora.core.population import finder
from hetlora.core.types import Client
from hetlora.flower.engine import check_method
from hetlora.flower.membership import Node, NodeRegistry
from hetlora.flower.session import Network
from hetlora.flower.transport import Transport
from hetlora.runs.local_experiment import BuiltExperiment
from hetlora.runs.observer import Observer
from hetlora.runs.parts import build_parts, with_drop_outs
from hetlora.runs.records import RoundRecord

__all__ = ["HostedExperiment"]


class HostedExperiment(BuiltExperiment):
    """An experiment like in-process, measured by the server on the same rows, with clients on Flower's nodes.

    Node i of n hosts every n-th client of the configuration from the i-th on.

    Args:
        config: The run, with ``flower.clients = "config"``.
        display: Shows the progress.
        transport: Sends messages and receives answers.

    Raises:
        HetLoraError: As `LocalExperiment`, or the method cannot run over Flower.
    """

    def __init__(self, config: RunConfig, display: Observer, transport: Transport) -> None:
        check_method(make_method(config))
        parts = build_parts(config, display)
        self.network = Network(transport, config, display.say, _hosting(finder(parts.data.federation.names)))
        super().__init__(parts, with_drop_outs(config, self.network.engine), display)
        self.rounding = wire_rounding(config)

    def cohort(self, round_number: int) -> Sequence[Client]:
        """Wait until every share of the clients has a node, then draw as in-process.

        Raises:
            HetLoraError: Nodes are missing at the timeout.
        """
        registry = self.network.registry
        wanted = "a node for every share of the clients"
        registry.gather(lambda: _complete(registry), self.config.flower.wait, lambda: wanted)
        return super().cohort(round_number)

    def annotate(self, record: RoundRecord) -> RoundRecord:
        """Add network figures to the record of a round."""
        return self.network.annotate(record)


def _hosting(find: Callable[[str], int]) -> Callable[[NodeRegistry, str], Node | None]:
    """Return a function that finds a client's node."""

    def node_of(registry: NodeRegistry, client: str) -> Node | None:
        place = find(client)
        return next((node for (share, nodes), node in registry.shares().items() if place % nodes == share), None)

    return node_of


def _complete(registry: NodeRegistry) -> bool:
    shares = registry.shares()
    return bool(shares) and len(shares) == next(iter(shares))[1]
