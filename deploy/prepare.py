"""Write what the containers of compose.yaml share: certificates, keys, rows of three clients, and the Flower App."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from hetlora.config import load_config
from hetlora.config.build_data import load_records
from hetlora.flower.credentials import write_certificates, write_key
from hetlora.flower.new_app import new_app


def prepare(folder: Path) -> None:
    """Write everything, unless a former rehearsal has."""
    if (folder / "ready").exists():
        return
    for item in folder.iterdir():  # of a start that broke off
        shutil.rmtree(item) if item.is_dir() else item.unlink()
    write_certificates(folder, "server")
    new_app(folder / "federation")
    records = load_records(load_config(folder / "federation" / "run.toml"))
    for number, rows in enumerate(records.values(), start=1):
        write_key(folder / f"client-{number}")
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"client-{number}.jsonl").write_text("".join(lines), encoding="utf8")
    (folder / "flwr").mkdir()
    connection = f'address = "server:9500"\nroot-certificates = "{folder / "ca.crt"}"\n'
    (folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\n{connection}', encoding="utf8"
    )
    (folder / "ready").touch()


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
