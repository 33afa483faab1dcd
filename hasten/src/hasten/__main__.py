"""`python -m hasten`: the command, where its script is not on the path."""

from hasten.cli.entry import main

main()
