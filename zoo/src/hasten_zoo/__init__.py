"""Small trained reference models of the same classes as the large ones, as subjects of hasten's benchmarks."""

__version__ = "0.2.0"
