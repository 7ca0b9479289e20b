"""Load an export with the tool that it is for, in a process of its own: nothing of hetlora is imported here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(request: str) -> None:
    """Write the logits of some rows.

    Args:
        request: A JSON file: the folder of the `model`, its `dtype`, the folder of an `adapter` or null, the `device`, the
            tokens of each of `rows`, and where to write as `answer`.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    asked = json.loads(Path(request).read_text("utf8"))
    model: Any = AutoModelForCausalLM.from_pretrained(
        asked["model"], dtype=asked["dtype"], trust_remote_code=False, use_safetensors=True
    )
    if asked["adapter"] is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, asked["adapter"])
    model = model.eval().to(asked["device"])
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0] for ids in asked["rows"]]
    save_file({str(row): values.float().cpu().contiguous() for row, values in enumerate(logits)}, asked["answer"])


if __name__ == "__main__":
    main(sys.argv[1])
