"""Imports transformers once, with the warnings of its and torch's own imports, which are not ours to mend, left out."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch.utils.mkldnn  # noqa: F401 (warns of torch.jit)
    import transformers.cache_utils
    import transformers.generation.utils  # noqa: F401
