"""A trained model's own predictions with a compressed cache beside those with a dense one.

What is asked is what docs/kvcache.md reports of novels, for one document: the KL divergence's mean there is 0.0023 at 3
bits (95 % of documents within 0.001 of it), two thirds of it along a trellis.
"""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from tqsearch.kvcache import TurboQuantCache

SHARED = Path(os.environ.get("TQSEARCH_SHARED", Path(__file__).resolve().parents[3] / "shared"))
FOLDER, TEXT = SHARED / "models" / "booklm-25m", SHARED / "data" / "text" / "heldout-books.txt"
pytestmark = pytest.mark.skipif(
    not (FOLDER.is_dir() and TEXT.is_file()),
    reason=f"{FOLDER} or {TEXT} is not there; set TQSEARCH_SHARED to the folder that holds models/ and data/",
)
LENGTH, CHUNK, FIRST = 1024, 64, 320
SMALL = {"residual_length": 128, "block_length": 16}


@pytest.fixture(scope="module")
def subject():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    words = tokenizer(TEXT.read_text()[20_000:40_000], return_tensors="pt", verbose=False)["input_ids"]
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval(), tokenizer, words


@torch.inference_mode()
def predictions(model, words, cache):
    """Log-probabilities of all but the first tokens, fed in chunks: the past is read from the cache."""
    chunks = [model(words[:, i : i + CHUNK], past_key_values=cache).logits for i in range(0, LENGTH, CHUNK)]
    return torch.log_softmax(torch.cat(chunks, dim=1)[:, FIRST:].double(), dim=2)


def divergence(model, words, dense, **options):
    found = predictions(model, words, TurboQuantCache(model.config, **SMALL, **options))
    return float((dense.exp() * (dense - found)).sum(dim=2).mean())


def test_predictions_stay_and_a_large_key_bias_changes_nothing(subject):
    model, _, words = subject
    dense = predictions(model, words, DynamicCache(config=model.config))
    scalar, trellis = (divergence(model, words, dense, bits=3, codec=codec) for codec in ("scalar", "trellis"))
    assert scalar < 0.0045
    assert trellis < 0.8 * scalar
    assert divergence(model, words, dense, bits=8) < 0.0001

    # The lowest frequencies hardly turn, so that the same constant is in every key and softmax drops it.
    layers = model.model.layers
    biases = [layer.self_attn.k_proj.bias for layer in layers]
    before = [bias.detach().clone() for bias in biases]
    try:
        with torch.no_grad():
            for bias, size in zip(biases, (150.0, *[12.0] * (len(layers) - 2), 90.0), strict=True):
                for element, share in ((62, 1.0), (127, 1.0), (126, -0.7), (63, -0.8)):
                    bias.view(-1, 128)[:, element] += share * size
        assert divergence(model, words, dense, bits=3) == pytest.approx(scalar, rel=0.2)
        assert divergence(model, words, dense, bits=3, codec="trellis") < 0.8 * scalar
    finally:
        with torch.no_grad():
            for bias, old in zip(biases, before, strict=True):
                bias.copy_(old)


@pytest.mark.parametrize("codec", ["scalar", "trellis"])
def test_a_needle_is_found_among_compressed_tokens(subject, codec):
    model, tokenizer, words = subject
    fact, question = (
        tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        for text in (
            " The secret number of the brave falcon is 48213.",
            " Question: what is the secret number of the brave falcon? Answer:",
        )
    )
    prompt = torch.cat([words[:, :300], fact, words[:, 300:900], question], dim=1)
    cache = TurboQuantCache(model.config, 3, codec=codec, residual_length=32, block_length=16)
    with torch.inference_mode():
        for i in range(0, prompt.shape[1] - 1, CHUNK):
            logits = model(prompt[:, i : i + CHUNK], past_key_values=cache).logits
        answer = []
        for _ in range(8):
            answer.append(logits[:, -1:].argmax(dim=2))
            logits = model(answer[-1], past_key_values=cache).logits
    assert cache.layers[0].past[0].compressed_length > 800
    assert tokenizer.decode(torch.cat(answer, dim=1)[0]).strip().startswith("48213")
