"""The README's table: the demonstration's federation under each method, several seeds, as Markdown.

python benchmarks/demo_table.py --seeds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

DEMO = "examples/demo.toml"
ROWS = {
    "FedAvg, rank 4 for all": ['method={name="fedavg"}', 'ranks={kind="same", rank=4}'],
    "FedAvg, rank 16 for all": ['method={name="fedavg"}', 'ranks={kind="same", rank=16}'],
    "HetLoRA without pruning, sample weights": ['method={name="hetlora", weights="examples", gamma=1.0}'],
    "HetLoRA without pruning": ['method={name="hetlora", gamma=1.0}'],
    "HetLoRA": [],
}


def main() -> None:
    """Run every row with every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    base: list[float] = []
    lines = []
    for name, changes in ROWS.items():
        results = [run(changes, seed) for seed in range(options.seeds)]
        base = [result["base"]["perplexity"] for result in results]
        cells = [
            spread([result["final"]["perplexity"] for result in results]),
            spread([result["final"]["rougeL"] for result in results]),
            f"{statistics.mean(result['bytes_up'] for result in results) / 1e6:.1f}",
            f"{statistics.mean(result['prunes'] for result in results):.1f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    print("| method | perplexity | ROUGE-L | MB up | prunes |\n| --- | --- | --- | --- | --- |")
    print(f"| the base, not fine-tuned | {base[0]:.2f} | | | |")
    print("\n".join(lines))


def run(changes: list[str], seed: int) -> dict:
    """Return the JSON result of one run."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"seed={seed}", f"output={json.dumps(folder)}", "evaluation.every=0", *changes]
        arguments = [argument for setting in settings for argument in ("--set", setting)]
        command = [sys.executable, "-m", "hetlora.cli", "run", DEMO, "--json", "--quiet", *arguments]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation over seeds."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.2f}"


if __name__ == "__main__":
    main()
