"""compress: one call after which a model's generate() uses a compressed cache."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from tqsearch.errors import InvalidInputError
from tqsearch.kvcache.cache import TurboQuantCache
from tqsearch.kvcache.policy import Width

# The arguments of generate with which a caller chooses a cache, or none.
_CHOOSES = ("past_key_values", "cache_implementation")


class CompressedGenerate:
    """A model's generate() with a fresh `TurboQuantCache` a call, unless the call chooses a cache of its own.

    An object, not a closure: copying or pickling the model copies it with a reference to the copy.

    Args:
        model: whose generate is meant.
        options: arguments of `TurboQuantCache` after the configuration.
    """

    def __init__(self, model: PreTrainedModel, options: dict[str, Any]) -> None:
        self.model, self.options = model, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own generate, which see."""
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        configuration = given or self.model.generation_config
        uses = kwargs.get("use_cache", getattr(configuration, "use_cache", None)) is not False
        chosen = (
            any(kwargs.get(name) is not None for name in _CHOOSES) or configuration.cache_implementation is not None
        )
        if uses and not chosen:
            kwargs["past_key_values"] = new_cache(self.model, self.options)
        model_class: Any = type(self.model)  # transformers adds generate to it with the classes that can
        return model_class.generate(self.model, *args, **kwargs)


def new_cache(model: PreTrainedModel, options: dict[str, Any]) -> TurboQuantCache | EncoderDecoderCache:
    """A fresh cache for a model: with an encoder, self-attention is compressed and cross-attention is not."""
    cache = TurboQuantCache(model.config, **options)
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(cache, DynamicCache(config=model.config.get_text_config(decoder=True)))
    return cache


def compress(model: PreTrainedModel, bits: Width = 4, **options: Any) -> None:
    """Lets every later generate() of this model use a fresh `TurboQuantCache`.

    A call of generate that names a cache (`past_key_values`, `cache_implementation`) or wants none (`use_cache=False`)
    gets what it names.

    Args:
        model: a transformers model that can generate.
        bits: as for `TurboQuantCache`; None undoes an earlier call.
        **options: as for `TurboQuantCache`.

    Raises:
        InvalidInputError: an option is out of range, or nothing of this model can be compressed; the model is as it
            was.
    """
    if bits is None:
        if options:
            raise InvalidInputError(f"bits None undoes compress and takes no options, got {', '.join(sorted(options))}")
        vars(model).pop("generate", None)
        return
    if not getattr(model, "can_generate", lambda: False)():
        raise InvalidInputError(f"model must be a transformers model that can generate, got {type(model).__name__}")
    options = {"bits": bits, **options}
    new_cache(model, options)  # raises here, not at the first call
    vars(model)["generate"] = CompressedGenerate(model, options)
