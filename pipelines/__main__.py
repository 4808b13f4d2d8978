"""`python -m pipelines`: the same as the `ptuning` command."""

from pipelines.cli import main

main()
