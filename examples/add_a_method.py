"""A method of one's own is run: `fair.py` has it, and the configuration names it.

    python examples/add_a_method.py

A method is a frozen record of pure functions; the round, the engine, the command line and `hetlora compare` take it as they
take their own. A configuration names it by its module and its factory, `method.name = "fair:fair"`; a package that is installed
is named in the same way, `"mypkg.fair:fair"`. To make a method part of hetlora, put the factory into `src/hetlora/methods/`
and its name into `METHODS`; the laws of the tests then run over it.
"""

from __future__ import annotations

from pathlib import Path

from fair import fair

from hetlora.config import load_config
from hetlora.runs.display import choose_display
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.testing import check_method

if __name__ == "__main__":
    check_method(fair(q=2.0))  # does it keep the laws of methods? An error names the one that it breaks.
    demo = Path(__file__).with_name("demo.toml")
    # The demonstration's own method has arguments that this one does not take.
    changes = ['method={name="fair:fair", q=2.0}', "name=fair", "federation.rounds=2", "federation.clients_per_round=4"]
    changes += ["data.clients=20", "evaluation.generate=0", "evaluation.rows_per_client=2"]
    result = LocalExperiment(load_config(demo, changes), choose_display(quiet=False)).run()
    print(f"held-out perplexity {result.base.overall.perplexity:.2f} -> {result.final.overall.perplexity:.2f}")
