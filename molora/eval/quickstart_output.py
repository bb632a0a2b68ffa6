"""What `molora quickstart` prints at its end."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from molora.eval import terminal

_EXPERTS = ("black on cyan", "black on yellow", "black on green", "black on magenta", "white on blue", "white on red")


def comparison_table(title: str, rows: dict[str, dict[str, float]], columns: dict[str, str]) -> Table:
    """Accuracies in percent; `columns` maps a key of each row to its heading."""
    table = terminal.plain_table(title, ["", *columns.values()])
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.0%}" for key in columns), style="bold" if name == "average" else "")
    return table


def show_quickstart(results: dict[str, Any], folder: Any) -> None:
    """The table, composite prompts, a text by expert, and what to do next."""
    out = terminal.out
    columns = {"base": "base", "lora": "one LoRA", "mixture": "mixture"}
    average = results["average"]
    out.print(comparison_table("exact match on unseen subjects", {**results["tasks"], "average": average}, columns))
    del columns["base"]
    out.print(comparison_table("skills in a row, each on the answer before", results["composite"], columns))
    counts = results["parameters"]
    out.print(
        f"trainable parameters: one LoRA {counts['lora']:,}, mixture {counts['mixture']:,}; {results['seconds']:.0f} s",
        highlight=False,
    )
    if average["mixture"] < average["lora"]:
        behind = 100 * (average["lora"] - average["mixture"])
        out.print(
            f"In this short run the mixture is {behind:.1f} points behind one LoRA: it learns the last skills "
            "later. Seeds differ by several points, and in longer runs both were level (docs/results.md).",
            highlight=False,
        )
    text = Text()
    for token, expert in results["tokens"]["tokens"]:
        text.append(token, style=_EXPERTS[expert % len(_EXPERTS)])
    out.print(f"\nby expert, as the router of {results['tokens']['router']} chooses:", highlight=False, soft_wrap=True)
    out.print(text)
    legend = Text()
    for expert in sorted({expert for _, expert in results["tokens"]["tokens"]}):
        legend.append(f" expert {expert} ", style=_EXPERTS[expert % len(_EXPERTS)])
        legend.append(" ")
    out.print(legend)
    out.print(f'\nnext:  molora generate {folder}/mixture "Take 31415, in words:"', highlight=False, soft_wrap=True)
    again = f"molora train {folder}/mixture/recipe.yaml training.output_dir=runs/mine"
    out.print(f"       {again}", highlight=False, soft_wrap=True)
    out.print("       molora presets", highlight=False)
