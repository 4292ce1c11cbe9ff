"""``python -m diagnostics.cli``: the command without its installation."""

from diagnostics.cli import main

main()
