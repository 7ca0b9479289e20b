"""The version of the package, for all rooms; a test holds it equal to that of pyproject.toml and CITATION.cff."""

__all__ = ["__version__"]

__version__ = "0.1.0"
