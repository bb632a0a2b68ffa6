"""Files that travel with the package."""

from pathlib import Path

MOLORA_TINY = Path(__file__).parent / "molora-tiny"
"""A trained Llama of 3.5 M parameters with its tokenizer; its README.md says how it was made."""
PAGE = Path(__file__).parent / "page.html"
"""The page of `molora serve`: HTML, style and script in one file."""
