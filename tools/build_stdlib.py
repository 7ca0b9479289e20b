"""Build the bundled federated data set ``stdlib`` from Python's own standard library.

Every top-level module or package with at least ``--min-rows`` documented functions is a client. A row is one
function: the prompt is its source without the docstring, the target the docstring's first paragraph. The split is
a stable hash of the function's qualified name, so that a row never changes sides when the library grows.

    python tools/build_stdlib.py --out src/hetlora/data/bundled/stdlib
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tests, vendored wheels and generated tables are not what a module's author wrote about a function.
SKIPPED_PARTS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "_bundled", "turtledemo", "pgen2"}
MIN_TARGET_WORDS, MAX_TARGET_WORDS = 4, 40
MAX_PROMPT_CHARACTERS = 480
TEST_SHARE = 5  # one row in five is held out


def main() -> None:
    """Write ``rows.jsonl.gz``, the licence of the texts and a README that states the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--min-rows", type=int, default=12)
    options = parser.parse_args()

    by_client: dict[str, list[dict[str, str]]] = {}
    seen: set[str] = set()  # a prompt twice could stand on both sides of the split
    for row in documented_functions(Path(sysconfig.get_paths()["stdlib"])):
        if row["prompt"] not in seen and row["target"] not in " ".join(row["prompt"].split()):
            seen.add(row["prompt"])
            by_client.setdefault(row["client"], []).append(row)
    clients = {name: rows for name, rows in sorted(by_client.items()) if is_client(rows, options.min_rows)}

    options.out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for rows in clients.values() for row in rows)
    with (options.out / "rows.jsonl.gz").open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(lines.encode())
    (options.out / "LICENSE-PSF.txt").write_text(psf_license())
    (options.out / "README.md").write_text(readme(clients, len(lines)))
    print(f"{len(clients)} clients, {sum(map(len, clients.values()))} rows in {options.out}")


def documented_functions(library: Path) -> Iterator[dict[str, str]]:
    """Yield one row a documented function, in a stable order."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED_PARTS & set(parts) or parts[0] not in sys.stdlib_module_names:
            continue
        source = path.read_text("utf8", errors="ignore")
        module = ".".join(part for part in parts if part != "__init__")
        yield from functions_of(ast.parse(source), source.splitlines(), parts[0], module)


def functions_of(tree: ast.AST, lines: list[str], client: str, prefix: str) -> Iterator[dict[str, str]]:
    """Walk classes and functions; nested functions are left out, their docstrings are rarely a summary."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions_of(node, lines, client, f"{prefix}.{node.name}")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{prefix}.{node.name}"
            target, prompt = first_paragraph(ast.get_docstring(node)), without_docstring(node, lines)
            if target and prompt:
                yield {"client": client, "name": name, "split": split_of(name), "prompt": prompt, "target": target}
        elif isinstance(node, (ast.If, ast.Try)):
            yield from functions_of(node, lines, client, prefix)


def first_paragraph(docstring: str | None) -> str | None:
    """Return the summary on one line, or None where it is a signature, a doctest, too short or too long."""
    text = " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split()) if docstring else ""
    if not MIN_TARGET_WORDS <= len(text.split()) <= MAX_TARGET_WORDS or text.startswith((">>>", ":", "-")):
        return None
    return text


def without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str | None:
    """Return the dedented source from ``def`` on, without the docstring, cut at whole lines."""
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    assert node.end_lineno is not None
    if docstring.lineno <= node.lineno:
        return None
    kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    cut, size = [], 0
    for line in (line[node.col_offset :].rstrip() for line in kept):
        size += len(line) + 1
        if size > MAX_PROMPT_CHARACTERS:
            break
        if line.strip() and not line.lstrip().startswith("#"):
            cut.append(line)
    return "\n".join(cut) or None


def split_of(name: str) -> str:
    """Hold out one row in five by a hash of the name alone."""
    return "test" if int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % TEST_SHARE == 0 else "train"


def is_client(rows: list[dict[str, str]], min_rows: int) -> bool:
    """A client needs enough rows, and at least one on each side of the split."""
    return len(rows) >= min_rows and len({row["split"] for row in rows}) == 2


def psf_license() -> str:
    """Return the licence text that ships with this Python; its texts may not travel without it."""
    for folder in (Path(sysconfig.get_paths()["stdlib"]), Path(sys.base_prefix)):
        for name in ("LICENSE.txt", "LICENSE"):
            if (folder / name).is_file():
                return (folder / name).read_text("utf8")
    raise SystemExit("this Python ships no LICENSE file; use one that does")


def readme(clients: dict[str, list[dict[str, str]]], size: int) -> str:
    """State what the data set holds, so that its skew is known before it is used."""
    sizes = sorted((len(rows) for rows in clients.values()), reverse=True)
    train = sum(row["split"] == "train" for rows in clients.values() for row in rows)
    version = ".".join(map(str, sys.version_info[:3]))
    largest = sorted(clients, key=lambda name: -len(clients[name]))[:5]
    top = ", ".join(f"`{name}` {len(clients[name])}" for name in largest)
    share = sum(sizes[: len(sizes) // 10]) / sum(sizes)
    table = "\n".join(f"| `{name}` | {len(rows)} |" for name, rows in sorted(clients.items()))
    return f"""# stdlib: a federated data set of Python's standard library

Made by `python tools/build_stdlib.py --out src/hetlora/data/bundled/stdlib` with CPython {version}.

A client is a top-level module or package of the library. A row is one documented function: `prompt` is its source
without the docstring and whole-line comments, cut at {MAX_PROMPT_CHARACTERS} characters; `target` is the first paragraph of the
docstring, {MIN_TARGET_WORDS} to {MAX_TARGET_WORDS} words. One row in five is held out, by a hash of the function's name.

- {len(clients)} clients, {sum(sizes)} rows ({train} train, {sum(sizes) - train} test), {size / 1e6:.2f} MB unpacked.
- Sizes: smallest {sizes[-1]}, median {sizes[len(sizes) // 2]}, largest {sizes[0]} ({top}).
- The largest tenth of the clients holds {share:.0%} of the rows.

Licence of the texts: Python Software Foundation License, `LICENSE-PSF.txt` beside this file. Changed from the
original: docstrings and whole-line comments removed from the sources, long sources cut, first paragraphs on one line.

| client | rows |
| --- | --- |
{table}
"""


if __name__ == "__main__":
    main()
