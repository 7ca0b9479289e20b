"""The model card of an export: description, origin, scores, and code that loads it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetlora._version import __version__
from hetlora.commands.export.asking import Asking
from hetlora.commands.export.check import ReadBack
from hetlora.commands.export.tier_scores import TierScores
from hetlora.config import RunConfig
from hetlora.data.huggingface import is_dataset
from hetlora.errors import expand_path, printable
from hetlora.methods.listing import first_line
from hetlora.methods.lookup import find_method
from hetlora.runs.reader import number
from hetlora.runs.text import MISSING, figure
from hetlora.runs.trained_run import AdapterSelection, TrainedRun

__all__ = ["Card", "model_card"]


@dataclass(frozen=True)
class Card:
    """The facts of a card beside those of the run.

    Attributes:
        folder: Folder of the files, as in the code.
        merged: Whether they are a whole model.
        ranks: Number of modules per rank; empty for a whole model.
        dtype: Of the numbers.
        part: The exported part of the adapter.
        scores: Scores per tier; None if not measured.
        asking: How the model is asked.
        check: Comparison with what another program computes; None if not checked.
        gguf: Whether there is a file for llama.cpp, too.
    """

    folder: Path
    merged: bool
    ranks: Mapping[int, int]
    dtype: str
    part: AdapterSelection
    scores: TierScores | None
    asking: Asking
    check: ReadBack | None = None
    gguf: bool = False


def model_card(learned: TrainedRun, card: Card) -> str:
    """Return the card as Markdown with front matter that the Hugging Face hub reads.

    Decisions such as the licence are left to the user in comments. Only the code names folders of this machine.
    """
    parts = [
        _front_matter(learned.config, card),
        f"# {learned.config.name}",
        _introduction(learned, card),
        _table([("", ""), *_facts(learned, card)]),
        "## Held-out perplexity",
        *_measurements(learned, card),
        *_scores(card.scores),
        "## How to load it",
        _code(learned.config, card),
        *([LLAMA_CPP] if card.gguf else []),
        *_notes(learned.config, card),
        "## Licence",
        LICENCE.format(" on the adapter that it started from," if learned.config.model.adapter else ""),
        "## Made with",
        f"hetlora {__version__}; the run itself with {_versions(learned)}.",
    ]
    return "\n\n".join(parts) + "\n"


LICENCE = """None is given here. Which one may be given depends on the base model,{} on the data and on who trained it: fill in
the line `license` at the top, and take this section away."""


def _front_matter(config: RunConfig, card: Card) -> str:
    base, data = config.model.base, config.data.path
    lines = [
        f"base_model: {json.dumps(base)}"
        if _on_the_hub(base)
        else "# base_model: OWNER/NAME    (fill in where the base is on the hub; it was a folder, or came with hetlora)",
        f"library_name: {'transformers' if card.merged else 'peft'}",
        "pipeline_tag: text-generation",
        f"tags: {json.dumps(['lora', 'federated-learning', 'hetlora'])}",
        *([f"datasets: {json.dumps([data])}"] if _data_on_the_hub(data) else []),
        "# license: FILL-IN    (of your choice, as the base model and the data allow)",
    ]
    return "\n".join(["---", *lines, "---"])


def _introduction(learned: TrainedRun, card: Card) -> str:
    what = "A model" if card.merged else "A LoRA adapter"
    whose = ""
    if card.part.client is not None:
        whose = f" It is what the client {_quoted(card.part.client)} would be served with."
        if learned.personal:
            whose = f" It is the own adapter of the client {_quoted(card.part.client)}."
    elif card.part.tier is not None:
        whose = f" It is the global adapter cut to what every device of the tier {_quoted(card.part.tier)} affords."
    elif card.part.rank is not None:
        whose = f" It is the global adapter cut to its first {card.part.rank} slots."
    return f"{what} that {_origin(learned)}{whose}"


def _origin(learned: TrainedRun) -> str:
    """Describe the training: clients, rows and aggregation."""
    if learned.method.clients == "pooled":
        return "was fine-tuned on the rows of all clients of a federation, pooled in one place."
    if learned.personal and not learned.sends():
        return (
            "a client of a federation has fine-tuned alone, on rows of its own and at the rank that its hardware affords; "
            "nothing was sent to a server."
        )
    how = "on rows of their own, each at the rank that its hardware affords,"
    if learned.method.trains == "weights":
        how = "every weight of the model on rows of their own,"
    return f"a federation has fine-tuned: its clients trained {how} and a server aggregated what they sent."


def _facts(learned: TrainedRun, card: Card) -> Iterator[tuple[str, str]]:
    config, record = learned.config, learned.run_record()
    line = first_line(find_method(config.method.name))
    yield "base model", _public(config.model.base)
    if config.model.adapter is not None:
        yield "started from", f"the adapter {_public(config.model.adapter)}"
    sizes = f"{_count(record, 'clients', ', {} clients')}{_count(record, 'train_rows', ', {} training rows')}"
    yield "data", f"{_public(config.data.path)}{sizes}"
    yield "method", f"`{config.method.name}`: {line} {learned.method.reference}".rstrip(": ")
    yield (
        "rounds",
        f"{learned.round} of {config.federation.rounds}, {config.federation.clients_per_round} clients a round",
    )
    if card.ranks:
        yield "rank", ", ".join(f"{rank} ({count} modules)" for rank, count in card.ranks.items())
    if learned.method.trains == "adapter":
        yield "ranks of the clients", f"{', '.join(learned.tiers) or 'not measured'} (by tier)"
        yield (
            "scaling",
            f"{config.model.scaling:g}" + ("" if card.merged else " (PEFT's `lora_alpha / r`, of every module)"),
        )
    if config.model.quantize != "none":
        yield "base while training", f"stored as {config.model.quantize}"
    yield "numbers", card.dtype
    yield "seed", str(config.seed)
    yield "read back", "not checked" if card.check is None else ": ".join(card.check.lines())


def _measurements(learned: TrainedRun, card: Card) -> Iterator[str]:
    """Yield the run's own measurements."""
    base, start, final = learned.evaluation(last=False), learned.start(), learned.evaluation(last=True)
    if final is None or base is None:
        last = learned.perplexity()
        yield "The run was not complete, and was not measured at its end." + (
            "" if last is None else f" The last perplexity that was measured before is {last:.2f}.{_of_a_part(card)}"
        )
        return
    some = any(_number(record.get("overall"), "rougeL") != MISSING for record in (base, final))
    # The start was measured without generated answers.
    columns = [("base", base, "perplexity"), ("start", start, "perplexity"), ("after", final, "perplexity")]
    columns += [("ROUGE-L of the base", base, "rougeL"), ("ROUGE-L after", final, "rougeL")] if some else []
    known = [(name, record, key) for name, record, key in columns if record is not None]
    rows = [
        [tier, *(_number(_of_tier(record, tier), key) for _, record, key in known)] for tier in ("all", *learned.tiers)
    ]
    yield _table([["tier of rank", *(name for name, _, _ in known)], *rows])
    yield (
        f"By tier of the clients whose rows they are, measured by the run with {_served(learned)}, on rows that nobody trained "
        f"on.{' The start is the adapter that the run began with.' if start else ''}{_of_a_part(card)}"
    )


def _served(learned: TrainedRun) -> str:
    """Describe what the run's own figures measure."""
    if learned.method.trains == "weights":
        return "the whole model"
    if learned.personal:
        return "each client's own adapter"
    which = "the whole global adapter"
    if learned.config.evaluation.adapter == "received" and learned.method.clients != "pooled":
        which = "the adapter that each client receives"
    return which + (" on the base as the run has changed it" if learned.in_weights else "")


def _of_a_part(card: Card) -> str:
    """Note that the figures are not those of the exported part."""
    if card.part == AdapterSelection():
        return ""
    if card.part.client is not None:
        return " Figures here are the run's, of all clients, and not of this client's adapter alone."
    own = card.scores is not None and any(tier.rank in card.ranks for tier in card.scores.tiers)
    where = ": its own are below." if own else ", which was not measured."
    return f" Figures here are the run's, and not of this cut{where}"


def _scores(scores: TierScores | None) -> Iterator[str]:
    if scores is not None:
        yield "## What a device of each tier gets"
        yield _table(scores.rows())
        yield (
            "The global adapter cut to the rank that every device of a tier affords, on the rows of all measured clients. The "
            "whole adapter has the slots that some client still had."
        )


GENERATE = """\
# Greedy, whatever generation_config.json of the base says.
model.generation_config = GenerationConfig(max_new_tokens={longest}, eos_token_id=ends, pad_token_id={pad})
inputs = torch.tensor([ids])
answer = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs))[0, len(ids) :].tolist()"""

BY_PASSES = """\
# By whole passes: transformers' generate gives other answers with this architecture.
answer = []
while len(answer) < {longest} and (not answer or answer[-1] not in ends):
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits
    answer.append(int(logits[0, -1].argmax()))"""

CODE = """```python
{imports}

{load}

{ask}
ends = {ends}  # each of them ends an answer
{answer}
print(tokenizer.decode([token for token in answer if token not in ends], skip_special_tokens=True).strip())
```"""


LLAMA_CPP = """llama.cpp takes `adapter.gguf` over a GGUF file of the base, which may be quantised; Ollama takes the
`Modelfile`, whose first line names that file:

```sh
llama-cli -m BASE.gguf --lora adapter.gguf -p "..." --temp 0
ollama create NAME -f Modelfile
```"""


def _code(config: RunConfig, card: Card) -> str:
    folder, dtype = str(card.folder), card.dtype if card.merged else config.model.dtype
    base, tokenizer = (_place(name) for name in (config.model.base, config.model.tokenizer or config.model.base))
    imports = ["import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig"]
    if card.merged:
        load = [
            f"model = AutoModelForCausalLM.from_pretrained({folder!a}, dtype={dtype!r}).eval()",
            f"tokenizer = AutoTokenizer.from_pretrained({folder!a})",
        ]
    else:
        imports.insert(1, "from peft import PeftModel")
        if "locate_base(" in base + tokenizer:
            imports.insert(1, "from hetlora.model.lora_model import locate_base")
        load = [
            f"base = AutoModelForCausalLM.from_pretrained({base}, dtype={dtype!r})",
            f"model = PeftModel.from_pretrained(base, {folder!a}).eval()",
            f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
        ]
    if config.data.chat_template is not None and not card.merged:
        imports.insert(0, "from pathlib import Path\n")
        template = str(card.folder / "chat_template.jinja")
        load.append(f"tokenizer.chat_template = Path({template!a}).read_text(encoding='utf8')")
    longest = config.evaluation.max_new_tokens
    by_generate = card.check is None or card.check.cache
    return CODE.format(
        answer=(GENERATE if by_generate else BY_PASSES).format(longest=longest, pad=card.asking.pad),
        imports="\n".join(imports),
        load="\n".join(load),
        ask=card.asking.lines,
        ends=list(card.asking.ends),
    )


def _notes(config: RunConfig, card: Card) -> Iterator[str]:
    yield (
        f"Prompt and answer had at most {config.data.max_length} tokens together while this was trained; a longer prompt lost "
        "its beginning, a chat its first exchanges."
    )
    if not card.merged and config.model.quantize != "none":
        yield (
            f"The base was stored as {config.model.quantize} while this was trained and measured; loaded as above it is whole, "
            "and the figures can differ."
        )


def _on_the_hub(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def _data_on_the_hub(path: str) -> bool:
    return is_dataset(path) and not expand_path(path).exists()


def _public(name: str) -> str:
    """Return a name without the folders of this machine."""
    hub = _on_the_hub(name) or _data_on_the_hub(name)
    bundled = name in ("nano", "stdlib")
    return _quoted(name if hub else Path(name).name) + (", which comes with hetlora" if bundled else "")


def _place(name: str) -> str:
    """Return the code's expression for the path of a base."""
    return 'locate_base("nano")' if name == "nano" else ascii(name)


def _of_tier(record: Mapping[str, Any], name: str) -> object:
    if name == "all":
        return record.get("overall")
    tiers = record.get("tiers")
    return tiers.get(name) if isinstance(tiers, dict) else None


def _number(of: object, key: str) -> str:
    return figure(number(of.get(key)) if isinstance(of, dict) else None, ".2f")


def _count(record: Mapping[str, Any], key: str, text: str) -> str:
    value = record.get(key)
    return text.format(value) if isinstance(value, int) else ""


def _versions(learned: TrainedRun) -> str:
    record = learned.run_record()
    versions = record.get("versions")
    known = {"hetlora": record.get("hetlora"), **(versions if isinstance(versions, dict) else {})}
    return ", ".join(f"{printable(str(name))} {printable(str(version))}" for name, version in known.items())


def _quoted(text: str) -> str:
    """Return any text as Markdown code."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', '/')}`"


def _table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
