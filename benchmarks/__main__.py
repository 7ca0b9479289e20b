"""Run all benchmarks and record the table: `make bench` and `make bench-quick`.

python -m benchmarks                    # all of it, to benchmarks/results/latest.json
python -m benchmarks --quick            # the same code at small sizes: nothing is judged, nothing is recorded
python -m benchmarks engine server      # some of it
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from benchmarks.table import markdown
from hetlora.runs.process import prepare_process

MODULES = ("engine", "server", "wire", "scale", "precision", "memory", "flower_peer", "pfl_peer")
RESULTS = Path(__file__).parent / "results" / "latest.json"


def main() -> int:
    """Run the modules, print every row as it comes, and record those there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", help=f"of {', '.join(MODULES)}; all where none is given"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is judged or recorded")
    parser.add_argument("--table", action="store_true", help="print what was recorded last, as Markdown")
    options = parser.parse_args()
    if unknown := set(options.modules) - set(MODULES):
        parser.error(f"no such module: {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}")
    if options.table:
        print(markdown(json.loads(RESULTS.read_text("utf8"))))
        return 0
    if options.quick and not options.modules:
        return _side_by_side()
    prepare_process()
    # Norms of updates are NumPy's products, and the row says one thread.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    found, broken = [], []
    for name in options.modules or MODULES:
        began = time.monotonic()
        try:
            for line in importlib.import_module(f"benchmarks.{name}").rows(options.quick):
                found.append({"module": name, **asdict(line)})
                verdict = {True: "holds", False: "MISSED", None: ""}[line.holds]
                print(
                    f"{line.ratio:10.3g} ({line.min:.3g} to {line.max:.3g})  {line.target:8} {verdict:7} {line.name}",
                    flush=True,
                )
        except Exception:  # noqa: BLE001  a benchmark that breaks must not cost the others their figures
            traceback.print_exc()
            broken.append(name)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        if not options.quick:
            _record(found, set(options.modules or MODULES))
    if broken:
        print(f"broken: {', '.join(broken)}", file=sys.stderr)
    return int(bool(broken))


WAITING = ("flower_peer", "pfl_peer", "server", "wire")
"""About half of a quick run; Flower's processes mostly wait for each other."""


def _side_by_side() -> int:
    """Run all modules at small sizes, half of them in a process of its own: nothing is judged, so that nothing is disturbed."""
    halves = (WAITING, [name for name in MODULES if name not in WAITING])
    running = [subprocess.Popen([sys.executable, "-m", "benchmarks", "--quick", *half]) for half in halves]
    return max(process.wait() for process in running)


def _record(found: list[dict[str, object]], measured: set[str]) -> None:
    """Write what was measured, in place of what an earlier run measured of the same modules."""
    earlier = json.loads(RESULTS.read_text("utf8")) if RESULTS.is_file() else []
    kept = [line for line in earlier if line["module"] not in measured]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([*kept, *found], indent=1, ensure_ascii=False) + "\n", encoding="utf8")


if __name__ == "__main__":
    sys.exit(main())
