"""compress: one call after which a model's generate() uses a compressed cache."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from tqsearch.errors import InvalidInputError
from tqsearch.kvcache.attention import NAME as ATTENTION
from tqsearch.kvcache.cache import TurboQuantCache
from tqsearch.kvcache.policy import Width
from tqsearch.kvcache.replay import replaying

# The arguments of generate with which a caller chooses a cache, or none.
_CHOOSES = ("past_key_values", "cache_implementation")


class CompressedGenerate:
    """A model's generate() with a fresh `TurboQuantCache` a call, unless the call chooses a cache of its own.

    An object, not a closure: copying or pickling the model copies it with a reference to the copy.

    Args:
        model: whose generate is meant.
        options: arguments of `TurboQuantCache` after the configuration.
        attention: the attention implementation that the model had, where another was set; else None.
    """

    def __init__(self, model: PreTrainedModel, options: dict[str, Any], attention: str | None) -> None:
        self.model, self.options, self.attention = model, options, attention

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
        if kwargs.get("disable_compile", getattr(configuration, "disable_compile", False)):
            return model_class.generate(self.model, *args, **kwargs)
        with replaying(self.model):
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
    gets what it names. A model on a GPU with the library's "sdpa" attention, or with "eager" where its class has no
    other, gets attention from the codes besides, as by `model.set_attn_implementation("turboquant")`; then its decoding
    steps over a `TurboQuantCache` are recorded as CUDA graphs and replayed where they can be (`replay`). While one is
    recorded, for a few hundredths of a second each `block_length` tokens, CUDA lets no other thread synchronize the
    whole device (`torch.cuda.synchronize`): such a call raises there. A call with `disable_compile=True` records
    nothing.

    Args:
        model: a transformers model that can generate.
        bits: as for `TurboQuantCache`; None undoes an earlier call.
        **options: as for `TurboQuantCache`.

    Raises:
        InvalidInputError: an option is out of range, or nothing of this model can be compressed; the model is as it
            was.
    """
    if bits is None and options:
        raise InvalidInputError(f"bits None undoes compress and takes no options, got {', '.join(sorted(options))}")
    if bits is not None:
        if not getattr(model, "can_generate", lambda: False)():
            raise InvalidInputError(f"model must be a transformers model that can generate, got {type(model).__name__}")
        options = {"bits": bits, **options}
        new_cache(model, options)  # raises here, not at the first call
    earlier = vars(model).pop("generate", None)
    if isinstance(earlier, CompressedGenerate) and earlier.attention and _attention(model) == ATTENTION:
        _set_attention(model, earlier.attention)
    if bits is None:
        return
    own = None
    if _gains(model, options):
        own = _attention(model)
        _set_attention(model, ATTENTION)
    vars(model)["generate"] = CompressedGenerate(model, options, own)


def _attention(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Sets the decoder's implementation; a model's other parts, an image encoder's say, keep theirs."""
    decoder = model.config.get_text_config(decoder=True)
    key = next((key for key in model.config.sub_configs if getattr(model.config, key, None) is decoder), None)
    model.set_attn_implementation(name if key is None else {key: name})


def _gains(model: PreTrainedModel, options: dict[str, Any]) -> bool:
    """Whether attention from the codes is to be had, is faster, and stands in for nothing that was asked for."""
    if model.device.type != "cuda" or find_spec("triton") is None or options.get("backend") == "reference":
        return False
    if options.get("codec", "scalar") != "scalar" or options.get("outlier_channels"):
        return False
    if getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None) is not None:
        return False
    model_class: Any = type(model)
    chosen_for_it = "sdpa" if model_class._supports_sdpa else "eager"
    return _attention(model) == chosen_for_it and bool(model_class._can_set_attn_implementation())
