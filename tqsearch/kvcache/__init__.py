"""A compressed KV cache for HuggingFace transformers: `TurboQuantCache`, `compress`, and policies of bits."""

from tqsearch.kvcache import installed  # noqa: F401 (first: it says what is missing)
from tqsearch.kvcache.attention import register
from tqsearch.kvcache.cache import TurboQuantCache
from tqsearch.kvcache.generate import compress
from tqsearch.kvcache.policy import LayerBits, PerLayer, Policy, Uniform

__all__ = ["LayerBits", "PerLayer", "Policy", "TurboQuantCache", "Uniform", "compress"]

register()
