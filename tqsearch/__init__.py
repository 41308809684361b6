"""Search millions of embeddings straight from TurboQuant codes of 1 to 8 bits a dimension."""

__version__ = "0.1.0"

__all__ = ["__version__"]
