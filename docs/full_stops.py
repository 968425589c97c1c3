"""Writes pairs of answers for `gptcore finetune prefer`: an answer that ends in a full stop, and the same without it.

``python docs/full_stops.py OUT`` takes the answers from the data that ``gptcore fetch instructions`` brought.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gptcore.data.conversations import read_conversations


def main(out: Path) -> None:
    pairs = []
    for _, messages in read_conversations(Path("instructions")):
        answer = messages[-1]["content"].strip()
        if answer.endswith(".") and len(answer) < 300:
            pairs.append({"prompt": messages[:-1], "chosen": answer, "rejected": answer[:-1]})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    print(f"{out}: {len(pairs)} pairs")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
