"""What of the rows of a run is used, what is left out, dropped or cut, and who then has nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hetlora.commands.doctor.findings import Notes
from hetlora.config import RunConfig
from hetlora.config.build import make_method
from hetlora.config.build_data import load_federation, read_federation
from hetlora.config.preconditions import check_cohort
from hetlora.data import Example, Federation, Tokenization, TokenizedFederation

__all__ = ["Looked", "look_at_clients", "look_at_examples"]

MOST_ROWS = 20_000
"""Rows that are tokenized; of more, those of some clients speak for all."""
MUCH_CUT = 0.1
"""Share of the rows that are cut from which on it is worth a warning."""
MUCH_LEFT_OUT = 0.5
NAMED = 5


@dataclass(frozen=True)
class Looked:
    """The clients whose rows were tokenized, with their training examples, none for an empty client."""

    examples: dict[str, Sequence[Example]]


def look_at_clients(notes: Notes, config: RunConfig) -> Federation | None:
    """Read and divide the rows; None where that cannot be done."""
    whole = notes.attempt("rows", "data", lambda: read_federation(config))
    if whole is None:
        return None
    _left_out(notes, config, whole)
    federation = notes.attempt("rows", "data", lambda: load_federation(config))
    if federation is None:
        return None
    train, test = federation.total("train"), federation.total("test")
    notes.ok("rows", f"{len(federation.clients)} clients, {train} training rows, {test} held out", "data")

    def enough() -> bool:
        check_cohort(config, len(federation.names))
        return True

    if notes.attempt("cohort", "federation.clients_per_round", enough):
        asked = config.federation.clients_per_round
        averages = "robustness" not in make_method(config).refuses  # else there is nothing to bound the influence on
        if asked == 1 and averages and len(federation.names) > 1:
            way_out = "raise it: an average of one is that one"
            notes.warn("cohort", "one client a round", "federation.clients_per_round", way_out)
        else:
            notes.ok("cohort", f"{asked} of {len(federation.names)} clients a round", "federation.clients_per_round")
    return federation


def _left_out(notes: Notes, config: RunConfig, whole: Federation) -> None:
    """Look at what never gets into the run: rows of neither side, and clients."""
    no_side = sum(whole.left_out_rows.values())
    rows = sum(len(own.train) + len(own.test) for own in whole.clients.values())
    values = ", ".join(sorted(whole.left_out_rows)[:NAMED])
    if no_side > MUCH_LEFT_OUT * (no_side + rows):
        way_out = "set data.train and data.test to the values that the field has"
        notes.warn("rows of no side", f"{no_side} of {no_side + rows} ({values})", "data.split_field", way_out)
    else:
        notes.ok("rows of no side", f"{no_side}" + (f" ({values})" if values else ""), "data.split_field")
    empty = [name for name, own in whole.clients.items() if not own.train]
    silent = [name for name, own in whole.clients.items() if own.train and not own.test]
    few = sum(0 < len(own.train) < config.data.min_rows and bool(own.test) for own in whole.clients.values())
    if empty:
        way_out = "give them rows, or take them out of the data"
        notes.warn("clients left out", f"no training row: {_named(empty)}", "data.train", way_out)
    if silent:
        way_out = 'raise data.test_share (with data.split_field = ""), or hold out a row of each'
        notes.warn("clients left out", f"no held-out row: {_named(silent)}", "data.test_share", way_out)
    if not empty and not silent:
        notes.ok("clients left out", f"{few} with fewer than {config.data.min_rows} rows", "data.min_rows")


def look_at_examples(
    notes: Notes, config: RunConfig, federation: Federation, tokenization: Tokenization
) -> Looked | None:
    """Tokenize the rows, and say what of them is lost; None where they cannot be."""
    names = _some(config, federation)
    data = TokenizedFederation(federation, tokenization)
    before = tokenization.truncated, tokenization.empty
    test = notes.attempt("rows", "data", lambda: sum(len(data.test(name)) for name in names))
    train = notes.attempt("rows", "data", lambda: {name: data.train(name) for name in names})
    if test is None or train is None:
        return None
    cut, dropped = tokenization.truncated - before[0], tokenization.empty - before[1]
    rows = test + sum(map(len, train.values())) + dropped
    of = f"of {rows} rows" + ("" if len(names) == len(federation.names) else f" of {len(names)} clients")
    if dropped:
        way_out = "give those rows a target, or take them out: nobody learns from them"
        notes.warn("rows without a target", f"{dropped} {of}", "data.target", way_out)
    else:
        notes.ok("rows without a target", f"0 {of}", "data.target")
    if cut > MUCH_CUT * rows:
        way_out = "raise data.max_length, or set data.long_rows = 'split' for rows without a prompt"
        notes.warn("rows too long", f"{cut} {of} are cut", "data.max_length", way_out)
    else:
        notes.ok("rows too long", f"{cut} {of} are cut", "data.max_length")
    nothing = [name for name in names if not train[name]]
    if nothing:
        way_out = "raise data.min_rows, or give their rows targets: each of their rounds is a failure"
        notes.fail("empty clients", f"no training row with a target: {_named(nothing)}", "data.target", way_out)
    else:
        notes.ok("empty clients", f"none of {len(names)}", "data.target")
    return Looked(train)


def _some(config: RunConfig, federation: Federation) -> Sequence[str]:
    """Return the clients whose rows are tokenized: all, or so many as hold `MOST_ROWS`."""
    rows = federation.total("train") + federation.total("test")
    names = federation.names
    if rows <= MOST_ROWS:
        return names
    count = max(1, len(names) * MOST_ROWS // rows)
    places = random.Random(f"doctor:{config.seed}").sample(range(len(names)), count)
    return [names[place] for place in sorted(places)]


def _named(clients: Sequence[str]) -> str:
    return ", ".join(map(repr, clients[:NAMED])) + (f" and {len(clients) - NAMED} more" if len(clients) > NAMED else "")
