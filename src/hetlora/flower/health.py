"""What an operator of a federation watches: one object a round, from the records of its run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hetlora.errors import HetLoraError
from hetlora.runs.reader import RECORDS

__all__ = ["round_health"]


def round_health(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield for every recorded round of a run, finished or not, who was there and what it took.

    `nodes` are connected and `refused` nodes are not let in; of the `asked` clients, `answers` were admitted, and `failures`
    gave nothing that counts. `bytes_up` and `bytes_down` are those of messages, `seconds` those of the round without the
    measurement, and `memory` is the server's largest so far, in 10⁶ bytes.

    Args:
        folder: The run's folder on the server.

    Raises:
        HetLoraError: It holds no records, or those of a run in one process.
    """
    path = folder / RECORDS
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what is behind the last line end is being written
    except OSError as error:
        raise HetLoraError(f"{folder} holds no {RECORDS}: {error.strerror}; give the folder of a run") from error
    for line in lines:
        try:
            record = json.loads(line)
            network, kind = record.get("network"), record["kind"]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise HetLoraError(f"{path}: a line that is no record of hetlora's: {error!r}") from error
        if kind == "round":
            if not isinstance(network, Mapping):
                raise HetLoraError(f"{folder} is a run in one process, which has no nodes")
            failures = record["failures"]
            yield {
                "round": record["round"],
                "nodes": network.get("nodes"),
                "refused": network.get("refused"),
                "asked": len(record["ranks"]),
                "answers": len(record["clients"]) + len(record.get("summed", ())),
                "failures": len(failures),
                "bytes_up": network.get("bytes_up"),
                "bytes_down": network.get("bytes_down"),
                "seconds": record["seconds"],
                "memory": network.get("memory"),
            }
