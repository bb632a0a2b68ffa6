"""``python -m molora_cli``."""

from molora_cli import main

main()
