"""A part of `proofs.load`: what a federation of many nodes takes, each with one client (`proofs.slim_nodes`)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from flwr.app import Message

from proofs.federation import Federation
from proofs.flower import hosted_app, rounds_of
from proofs.load_figures import cpu_seconds, kibibytes
from proofs.slim_nodes import SlimNodes

__all__ = ["fleet_round"]


class WithoutKeys(Federation):
    """A federation whose nodes register themselves."""

    def superlink_command(self) -> list[str]:
        """Return the command that starts the SuperLink."""
        return [word for word in super().superlink_command() if word != "--enable-supernode-auth"]


def fleet_round(folder: Path, count: int) -> dict[str, Any]:
    """Run one round over so many nodes; return its figures."""
    from hetlora.flower import client_runtime
    from hetlora.flower.flwr_messages import from_record_dict, to_record_dict
    from hetlora.flower.node_config import NodeConfig
    from proofs.small_run import write_base

    def answer(index: int, message: Message) -> Any:
        settings = NodeConfig(place=index, nodes=count)
        asked = from_record_dict(message.content)
        return to_record_dict(client_runtime.answer(asked, settings, keeps=True))

    write_base(folder / "base")
    place, run = hosted_app(folder), folder / "runs" / f"fleet-{count}"
    changes = {
        "name": f"fleet-{count}",
        "model.base": folder / "base",
        "partition.clients": count,
        "partition.rows_per_client": 2,
        "federation.clients_per_round": count,
        "federation.rounds": 1,
        "training.steps": 1,
        "training.batch_size": 1,
        "evaluation.clients": 2,
        "flower.wait": 900,
        "flower.deadline": 900,
    }
    with WithoutKeys(folder) as federation:
        superlink = federation.processes["superlink"].pid
        certificate = (folder / "ca.crt").read_bytes()
        began = time.monotonic()
        with SlimNodes(f"127.0.0.1:{federation.port}", certificate, count, answer) as nodes:
            joined = time.monotonic() - began
            before, began = cpu_seconds(superlink), time.monotonic()
            time.sleep(15.0)
            idle = (cpu_seconds(superlink) - before) / (time.monotonic() - began)
            changed = 'config="run.toml" set="' + " ".join(f"{key}={value}" for key, value in changes.items()) + '"'
            before, began = cpu_seconds(superlink), time.monotonic()
            federation.complete(federation.run(place, changed), run, 1800)
            record = rounds_of(run)[1]
            return {
                "nodes": count,
                "seconds_to_join": round(joined, 1),
                "idle_share_of_a_core": round(idle, 3),
                "seconds_of_the_run": round(time.monotonic() - began, 1),
                "seconds_of_the_round": round(record["seconds"], 1),
                "admitted": len(record["clients"]),
                "failures": dict(list(record["failures"].items())[:3]),
                "superlink_seconds_of_a_core": round(cpu_seconds(superlink) - before, 1),
                "superlink_megabytes": round(kibibytes(Path(f"/proc/{superlink}/status"), "VmHWM") * 1024 / 1e6),
                "server_megabytes": record["network"]["memory"],
                "bytes_up": record["network"]["bytes_up"],
                "late_question_s": round(nodes.slow, 1),
                "errors": nodes.errors[:3],
            }
