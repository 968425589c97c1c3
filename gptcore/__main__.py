"""`python -m gptcore` is the `gptcore` command."""

from gptcore.cli import main

main()
