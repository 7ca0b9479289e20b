"""Check and run a method outside the package, the one in `fair.py`.

    python examples/add_a_method.py

A configuration names the method by its module and its factory, `method.name = "fair:fair"`, or `"mypkg.fair:fair"` for an
installed package. To make a method part of hetlora, put the factory into `src/hetlora/methods/` and its name into `METHODS`:
the tests then check the laws for it.
"""

from __future__ import annotations

from pathlib import Path

from fair import fair

from hetlora.config import load_config
from hetlora.runs.display import choose_display
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.testing import check_method

if __name__ == "__main__":
    check_method(fair(q=2.0))  # raises an error that names a broken law
    demo = Path(__file__).with_name("demo.toml")
    # A whole new table: the arguments of the demo's method do not fit this one.
    changes = ['method={name="fair:fair", q=2.0}', "name=fair", "federation.rounds=2", "federation.clients_per_round=4"]
    changes += ["data.clients=20", "evaluation.generate=0", "evaluation.rows_per_client=2"]
    result = LocalExperiment(load_config(demo, changes), choose_display(quiet=False)).run()
    print(f"held-out perplexity {result.base.overall.perplexity:.2f} -> {result.final.overall.perplexity:.2f}")
