"""Search millions of embeddings straight from TurboQuant codes of 1 to 8 bits a dimension."""

from tqsearch.index import TurboQuantIndex
from tqsearch.plan import BitPlan
from tqsearch.quantizer import TurboQuantizer

__version__ = "0.1.0"

__all__ = ["BitPlan", "TurboQuantIndex", "TurboQuantizer", "__version__"]
