"""The tables of the README and the docs by what they are about; `benchmarks/tables.py` writes them into the pages."""
