"""Writes three of the tasks of separable.yaml as JSON lines: two whose files are nested, and arithmetic.

    python recipes/separable_data.py DATA [OUT]

DATA holds clinc150/data/data_full.json (github.com/clinc/oos-eval, CC-BY-3.0) and text2sql/data/geography.json
(github.com/jkkummerfeld/text2sql-data). OUT is runs/separable_data if left out.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

Rows = list[dict[str, str]]


def clinc150(data: Path) -> dict[str, Rows]:
    """Requests and their intents; without the requests that have none."""
    parts = json.loads((data / "clinc150/data/data_full.json").read_text(encoding="utf-8"))
    return {
        part: [{"prompt": text, "answer": intent.replace("_", " ")} for text, intent in parts[part]]
        for part in ("train", "test")
    }


def geography(data: Path) -> dict[str, Rows]:
    """Questions and their SQL, names left as variables, split by question as in the data's own paper."""
    parts: dict[str, Rows] = {"train": [], "dev": [], "test": []}
    for query in json.loads((data / "text2sql/data/geography.json").read_text(encoding="utf-8")):
        for sentence in query["sentences"]:
            row = {"prompt": sentence["text"], "answer": query["sql"][0]}
            parts[sentence["question-split"]].append(row)
    return {"train": parts["train"] + parts["dev"], "test": parts["test"]}


def arithmetic() -> dict[str, Rows]:
    """Sums and differences of numbers below 100; no pair of the test part is in the training part."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(pairs)

    def rows(part: list[tuple[int, int]]) -> Rows:
        return [
            {"prompt": f"{a} {sign} {b} =", "answer": str(a + b if sign == "+" else a - b)}
            for a, b in part
            for sign in "+-"
        ]

    return {"train": rows(pairs[:4000]), "test": rows(pairs[4000:4250])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/separable_data"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tasks = {"clinc150": clinc150(options.data), "geography": geography(options.data), "arithmetic": arithmetic()}
    for name, parts in tasks.items():
        for part, rows in parts.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (options.out / f"{name}.{part}.jsonl").write_text(lines, encoding="utf-8")
            print(f"{name}.{part}.jsonl: {len(rows):,} rows")


if __name__ == "__main__":
    main()
