"""What every test of the cache shares. Transformers is imported first, its and torch's own warnings left out."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch.utils.mkldnn
    import transformers.cache_utils
    import transformers.generation.utils  # noqa: F401

import pytest
import torch

from tqsearch import TurboQuantizer
from tqsearch.kvcache.outliers import key_codec
from tqsearch.kvcache.store import value_codec


@pytest.fixture
def levels_on_the_grid(monkeypatch):
    """Plain torch decodes to the kernels' levels, which lie on a grid of int8: what is left is their rounding."""
    real, made = TurboQuantizer.tables, {}

    def tables(self, device):
        if (self, device) not in made:
            made[self, device] = tuple(
                band._replace(levels=(torch.tensor(band.steps, device=device) - band.offset) * band.step)
                for band in real(self, device)
            )
        return made[self, device]

    monkeypatch.setattr(TurboQuantizer, "tables", tables)
    for codecs in (key_codec, value_codec):
        codecs.cache_clear()
    yield
    for codecs in (key_codec, value_codec):
        codecs.cache_clear()
