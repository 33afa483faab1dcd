"""The `hasten` command: one file per group of commands."""
