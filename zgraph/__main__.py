"""`python -m zgraph` is the `zgraph` command."""

from zgraph.cli import main

main()
