import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

with warnings.catch_warnings():  # transformers imports hqq where it is installed, and hqq warns
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers.cache_utils")
scipy_stats = pytest.importorskip("scipy.stats")

from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.kvcache import (  # noqa: E402
    build,
    calibrated,
    codecs,
    configurations,
    documents,
    figures,
    greedy,
    likelihood,
    merge,
    moments,
    needle,
    product,
    results,
    run,
    simulated,
    storage,
    summary,
)
from benchmarks.kvcache.language_model import add_large_key_bias  # noqa: E402
from tqsearch.errors import InvalidInputError  # noqa: E402

WORDS = ["[UNK]", "Question", "Answer", "the", "secret", "number", "of", "is", ":", "?", ".", "river", "falcon"]


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(4)
    settings = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 8192,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(8))


class Keep:
    """A codec that loses nothing."""

    def round_trip(self, states: torch.Tensor) -> torch.Tensor:
        return states.clone()

    def bytes_per_vector(self) -> float:
        return 10.0


class AddOne(Keep):
    def round_trip(self, states: torch.Tensor) -> torch.Tensor:
        return states + 1.0


class Scripted:
    """A model whose logits are looked up: (documents, positions, vocabulary), by the cache that it is given."""

    def __init__(self, tables: dict[str, torch.Tensor]) -> None:
        self.tables, self.config, self.place = tables, LlamaConfig(num_hidden_layers=1), 0

    def __call__(self, piece: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        table = self.tables[past_key_values if isinstance(past_key_values, str) else "dense"]
        start = self.place
        self.place = (start + piece.shape[1]) % table.shape[1]
        return type("Output", (), {"logits": table[: len(piece), start : start + piece.shape[1]]})


def test_documents_do_not_overlap() -> None:
    texts = {"a": torch.arange(1000), "b": torch.arange(2000, 3500)}
    rows, names = documents.measured(texts, 6, 50)
    training = documents.held_out(texts, 4, 6, 50)
    assert rows.shape == (6, 50)
    assert names == ["a", "b"] * 3
    assert all((row < 1000).all() == (name == "a") for row, name in zip(rows, names, strict=True))
    everything = torch.cat([rows, training]).flatten()
    assert len(everything.unique()) == len(everything)
    with pytest.raises(InvalidInputError, match="no room"):
        documents.held_out(texts, 4, 22, 50)


def test_agreement_against_scipy() -> None:
    generator = torch.Generator().manual_seed(1)
    dense, ours = (torch.randn(2, 10, 7, generator=generator) * 2 for _ in range(2))
    read = torch.randint(0, 7, (2, 10), generator=generator)
    model = Scripted({"dense": dense, "ours": ours})
    found = likelihood.compare(model, read, {"ours": lambda: "ours"}, 4, 2)["ours"]
    p, q = (np.exp(part.double().numpy()) for part in (dense, ours))
    p, q = (part / part.sum(axis=2, keepdims=True) for part in (p, q))
    for document in range(2):
        for position in range(9):
            here = (document, position)
            following = int(read[document, position + 1])
            assert float(found.kl[here]) == pytest.approx(scipy_stats.entropy(p[here], q[here]), rel=1e-4, abs=1e-6)
            assert float(found.nll[here]) == pytest.approx(-math.log(q[here][following]), rel=1e-4, abs=1e-6)
            assert float(found.dense_nll[here]) == pytest.approx(-math.log(p[here][following]), rel=1e-4, abs=1e-6)
            assert bool(found.top1[here]) == (p[here].argmax() == q[here].argmax())
    assert found.kl.shape == (2, 9)


def test_a_lossless_cache_agrees_and_has_the_models_likelihood() -> None:
    model, read = llama(), tokens(3, 100)
    make = lambda: simulated.simulated_cache(model.config, [(Keep(), Keep())] * 2, residual=8, sinks=2, block=4)  # noqa: E731
    found = likelihood.compare(model, read, {"kept": make}, 16, 2)["kept"]
    with torch.no_grad():
        whole = torch.nn.functional.cross_entropy(
            model(read).logits[:, :-1].flatten(0, 1), read[:, 1:].flatten(), reduction="none"
        )
    torch.testing.assert_close(found.nll, whole.view(3, 99), rtol=1e-4, atol=1e-4)
    assert float(found.kl.abs().max()) < 1e-5
    assert float(found.top1.min()) == 1.0


def test_what_the_simulated_cache_compresses_and_when() -> None:
    config = llama(num_hidden_layers=1).config
    cache = simulated.simulated_cache(config, [(AddOne(), AddOne())], residual=5, sinks=2, block=4, remove_offset=False)
    states = torch.randn(1, 1, 30, 16, generator=torch.Generator().manual_seed(0))
    expected = states.clone()
    length = done = 0
    for step in (3, 9, 1, 1, 10, 6):
        fresh = states[:, :, length : length + step]
        keys, values = cache.update(fresh, fresh, 0)
        length += step
        # What is read now is what was compressed before; new tokens and the recent ones are exact.
        for read in (keys, values):
            assert torch.equal(read, expected[:, :, :length])
        while length - (2 + done) - 5 >= 4:
            expected[:, :, 2 + done : 6 + done] += 1.0
            done += 4
    assert done == 20
    codec = codecs.TurboCodec(16, 3)
    found = simulated.formula_bytes([(codec, Keep())] * 2, 3, 16, 100, 20)
    assert found["per_token"] == 2 * 3 * (6 + 2 + 10)
    assert found["total"] == 80 * 108 + 20 * 2 * 2 * 3 * 16 * 2


def test_offset_removal_leaves_a_constant_exact() -> None:
    class Zero(Keep):
        def round_trip(self, states: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(states)

    config = llama(num_hidden_layers=1).config
    states = torch.full((1, 1, 40, 16), 7.0)
    for removed, left in ((True, 7.0), (False, 0.0)):
        cache = simulated.simulated_cache(
            config, [(Zero(), Keep())], residual=0, sinks=0, block=4, remove_offset=removed
        )
        cache.update(states, states, 0)
        keys, _ = cache.update(states[:, :, :1], states[:, :, :1], 0)
        assert float(keys[0, 0, 0, 0]) == left


def test_prod_codec_is_unbiased_and_counts_its_signs() -> None:
    codec = codecs.TurboCodec(64, 3, "prod")
    assert codec.bytes_per_vector() == 16 + 2 + 8 + 2
    states = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(2))
    estimates = torch.cat([codecs.TurboCodec(64, 3, "prod", seed=seed).round_trip(states) for seed in range(60)])
    products = (estimates * states).sum(dim=3).flatten()
    truth = float(states.square().sum())
    assert abs(float(products.mean()) - truth) < 5 * float(products.std()) / math.sqrt(60)


def test_product_quantization_is_that_of_faiss() -> None:
    pytest.importorskip("faiss")
    from tqsearch.faiss_pq import faiss_pq

    generator = torch.Generator().manual_seed(3)
    for size in (4, 5):  # 5 does not divide 16: zeros are put between
        vectors = torch.randn(600, 16, generator=generator)
        index = faiss_pq(16, size, "l2", iterations=5)
        index.train(vectors.numpy())
        fresh = torch.randn(40, 16, generator=generator)
        expected = index.sa_decode(index.sa_encode(fresh.numpy()))
        codec = product.PQCodec([product.trained(vectors, size, 5)])
        found = codec.round_trip(fresh.view(2, 1, 20, 16)).view(40, 16)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
        assert codec.bytes_per_vector() == size


def test_bytes_are_those_of_the_storages() -> None:
    whole = torch.zeros(100, dtype=torch.float32)
    holder = {"a": [whole, whole[:10]], "b": (whole.view(10, 10), torch.zeros(3, dtype=torch.uint8)), "c": "text"}
    assert storage.storage_bytes(holder) == 400 + 3
    model = llama()
    recorded = storage.states(model, tokens(1, 128)[0], torch.bfloat16)
    found = storage.measured_bytes(recorded, lambda: DynamicCache(config=model.config), 32, 64, 128)
    # Two layers, keys and values, one head of 16 numbers of two bytes.
    assert (found["per_token"], found["total"], found["dense_per_token"]) == (128.0, 128 * 128, 128)
    assert found["ratio_per_token"] == 1.0


def test_bytes_of_the_compressed_cache() -> None:
    model = llama()
    recorded = storage.states(model, tokens(1, 164)[0], torch.bfloat16)
    one = configurations.Configuration(configurations.OURS, 4, 2, residual=32)
    made = build.build(one, build.Subject(model, tokens(1, 8), 0))
    found = storage.measured_bytes(recorded, made.make, 32, 100, 164)
    assert found["per_token"] == 2 * ((8 + 2) + (4 + 2))


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = [*WORDS, *needle.ADJECTIVES, *(noun for noun in needle.NOUNS if noun not in WORDS)]
    raw = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")


def test_needles_stand_at_their_depth() -> None:
    words = tokenizer()
    prose = torch.full((400,), 60)
    made = needle.prompts(words, prose, 100, [0.0, 0.5, 1.0], 2, seed=1)
    assert made.tokens.shape == (6, 100)
    assert made.depths == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert all(len(number) == 5 for number in made.numbers)
    asked = words(needle.QUESTION.format(name="brave falcon", number=""))["input_ids"]
    fact = words(needle.FACT.format(name="brave falcon", number="12345"))["input_ids"]
    room = 100 - len(asked) - len(fact)
    starts = [int((row != 60).nonzero()[0]) for row in made.tokens]
    assert starts == [0, 0, room // 2, room // 2, room, room]
    assert all(int((row == 60).sum()) == room for row in made.tokens)


@pytest.mark.parametrize(
    ("text", "right"),
    [(" 48213.", True), ("48213", True), (" 4 8213", False), (" 482130", False), (" no", False), (" 48,213", True)],
)
def test_answers_are_exact_or_wrong(text: str, right: bool) -> None:
    assert needle.exact(text, "48213") is right


def test_continuation_is_the_models_own() -> None:
    model, read = llama(), tokens(2, 30)
    found = needle.continuation(model, read, DynamicCache(config=model.config), 7, 6)
    expected = read
    for _ in range(6):
        with torch.no_grad():
            following = model(expected, use_cache=False).logits[:, -1].argmax(dim=1, keepdim=True)
        expected = torch.cat([expected, following], dim=1)
    assert torch.equal(found, expected[:, 30:])
    other = torch.tensor([[1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 9, 4]])
    lengths = greedy.match_lengths(torch.tensor([[1, 2, 3, 4]] * 3), other)
    assert lengths.tolist() == [4, 0, 2]


def test_summary_is_students_interval_of_the_late_positions() -> None:
    generator = torch.Generator().manual_seed(6)
    parts = [torch.rand(5, 20, generator=generator) for _ in range(4)]
    found = summary.summarize(likelihood.Agreement(*parts), ["a", "b", "a", "b", "a"], 8)
    kl = parts[2][:, 8:].double().mean(dim=1).numpy()
    low, high = scipy_stats.t.interval(0.95, 4, loc=kl.mean(), scale=scipy_stats.sem(kl))
    assert found["kl"]["mean"] == pytest.approx(kl.mean(), rel=1e-5)
    assert found["kl"]["plus_minus"] == pytest.approx((high - low) / 2, rel=1e-5)
    ratio = math.exp(float((parts[1] - parts[0])[:, 8:].mean()))
    assert found["perplexity_percent"]["mean"] == pytest.approx(100 * (ratio - 1), rel=1e-4)
    assert found["perplexity"] / found["dense_perplexity"] == pytest.approx(ratio, rel=1e-5)
    assert found["kl_p99"] == pytest.approx(float(np.quantile(parts[2][:, 8:].numpy(), 0.99)), rel=1e-4)
    assert found["by_text"]["b"]["kl"]["mean"] == pytest.approx(kl[[1, 3]].mean(), rel=1e-5)
    assert found["positions"] == 60


def test_a_large_key_bias_changes_no_prediction() -> None:
    # With a large base of the rotary embedding its lowest frequencies do not turn within 60 tokens.
    model = llama(attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 1e9})
    read = tokens(1, 60)
    with torch.no_grad():
        before = model(read).logits
        add_large_key_bias(model)
        cache = DynamicCache(config=model.config)
        after = model(read, past_key_values=cache).logits
    assert float(cache.layers[0].keys.norm(dim=3).mean()) > 100
    torch.testing.assert_close(after, before, rtol=0.0, atol=2e-2)
    with pytest.raises(InvalidInputError, match="has a bias"):
        add_large_key_bias(llama())


def test_names_are_unique_and_rivals_have_notes() -> None:
    catalogue = configurations.catalogue()
    names = [one.name for one in catalogue]
    assert len(set(names)) == len(names)
    assert "TurboQuant K4V3" in names
    assert "TurboQuant K3V3, residual 32" in names
    families = {one.family for one in catalogue}
    assert families - {configurations.DENSE, configurations.OURS} == set(configurations.NOTES)
    assert {one.key_bits for one in configurations.quick(catalogue)} == {16, 4, 2}


def test_results_are_added_to_and_merged(tmp_path: Path) -> None:
    model = {"name": "tiny", "layers": 1}
    first, second = (results.empty(model) for _ in range(2))
    results.add(first, {"name": "b", "quality": 1})
    results.add(first, {"name": "b", "bytes": 2})
    second["left_out"] = {"b": "no faiss", "c": "no hqq"}
    results.add(second, {"name": "dense", "quality": 3})
    for name, result in (("1.json", first), ("2.json", second)):
        results.save(result, tmp_path / name, ["dense", "b"])
    assert merge.main([str(tmp_path / "all.json"), str(tmp_path / "1.json"), str(tmp_path / "2.json")]) == 0
    whole = json.loads((tmp_path / "all.json").read_text())
    assert {run["name"]: run for run in whole["runs"]} == {
        "dense": {"name": "dense", "quality": 3},
        "b": {"name": "b", "quality": 1, "bytes": 2},
    }
    assert whole["left_out"] == {"c": "no hqq"}
    with pytest.raises(SystemExit, match="another model"):
        results.load(tmp_path / "all.json", {"name": "huge"})


def test_a_run_of_a_tiny_model_fills_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, root = tmp_path / "tiny-llama", tmp_path / "project"
    llama(max_position_embeddings=512, initializer_range=0.2).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    generator = np.random.default_rng(0)
    text = tmp_path / "prose.txt"
    text.write_text(" ".join(generator.choice(WORDS[3:], 4500)))
    output = root / "benchmarks" / "results" / "kvcache-tiny-llama.json"
    monkeypatch.setattr(run, "TRAINING_DOCUMENTS", 2)
    common = ["--model", str(folder), "--text", str(text), "--tokens", "1200", "--length", "400", "--steps", "8"]
    common += ["--output", str(output), "--parts", "quality,greedy,bytes"]
    assert run.main([*common, "--only", "^TurboQuant K[28]V[28]$"]) == 0
    assert run.main([*common, "--only", "^TurboQuant, prod keys K4V4$"]) == 0
    found = {one["name"]: one for one in json.loads(output.read_text())["runs"]}
    wide, narrow = found["TurboQuant K8V8"]["quality"], found["TurboQuant K2V2"]["quality"]
    assert wide["documents"] == 3
    assert wide["positions"] == 3 * (399 - wide["measured_from"])
    assert 0.0 < wide["kl"]["mean"] < narrow["kl"]["mean"] / 20
    assert "quality" in found["TurboQuant, prod keys K4V4"]
    (root / "README.md").write_text("<!-- table:kvcache-tiny-llama -->\n<!-- end -->\n")
    (root / "docs").mkdir()
    (root / "docs" / "more.md").write_text("<!-- table:kvcache-tiny-llama.choices -->\n<!-- end -->\n")
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    readme = (root / "README.md").read_text()
    # Two layers of one head: keys and values of 16 coordinates and a float16 scale each, of 128 bytes dense.
    assert "| **TurboQuant K8V8** | **72** | **0.562** |" in readme
    assert "prod keys" not in readme
    assert "TurboQuant, prod keys K4V4" in (root / "docs" / "more.md").read_text()
    for name in figures.names(json.loads(output.read_text())):
        assert (root / "docs" / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_widths_are_those_of_least_error() -> None:
    # Every way of giving 3 groups 0 to 4 bits each, 5 in all: the least total error, by exhaustion.
    powers = [16.0, 3.0, 0.25]
    errors = [1.0, 0.3634, 0.1175, 0.03454, 0.009497]  # Max (1960), of N(0, 1)
    ways = [(a, b, 5 - a - b) for a in range(5) for b in range(5) if 0 <= 5 - a - b <= 4]
    best = min(ways, key=lambda way: sum(power * errors[width] for power, width in zip(powers, way, strict=True)))
    found = calibrated.allotted(torch.tensor(powers).repeat_interleave(8) / 8, 5 / 3)
    assert found.tolist() == [width for width in best for _ in range(8)]


def test_a_calibrated_codec_serves_the_queries_it_knows() -> None:
    generator = torch.Generator().manual_seed(9)
    mixing, asking = (torch.randn(32, 32, generator=generator) for _ in range(2))
    spread = torch.logspace(0.5, -1.5, 32)
    keys = (torch.randn(1, 1, 4000, 32, generator=generator) * spread) @ mixing
    queries = (torch.randn(500, 32, generator=generator) * spread) @ asking
    covariance = (keys[0, 0].T @ keys[0, 0] / 4000).double()
    weight = (queries.T @ queries / 500).double()

    def logit_error(codec: Any) -> float:
        return float((queries @ (codec.round_trip(keys) - keys)[0, 0].T).square().mean())

    wide = calibrated.CalibratedCodec([calibrated.head_transform(covariance, weight, 6)])
    power = float((queries @ keys[0, 0].T).square().mean())
    assert logit_error(wide) < 0.002 * power  # 6 bits leave 0.0006 of a normal variable's power
    known = calibrated.CalibratedCodec([calibrated.head_transform(covariance, weight, 2)])
    principal = calibrated.CalibratedCodec([calibrated.head_transform(covariance, None, 2)])
    assert known.bytes_per_vector() == codecs.TurboCodec(32, 2).bytes_per_vector() == 10
    assert logit_error(known) < logit_error(principal) < logit_error(codecs.TurboCodec(32, 2))


def test_moments_are_those_of_the_caches_keys() -> None:
    model, read = llama(num_key_value_heads=2, num_attention_heads=4), tokens(2, 30)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(read, past_key_values=cache)
    found = moments.moments(model, read)
    assert len(found) == 2
    for layer, (queries, keys) in zip(cache.layers, found, strict=True):
        for head in range(2):
            rows = [layer.keys[document, head].double().numpy() for document in range(2)]
            expected = sum(np.cov(part, rowvar=False, bias=True) for part in rows) / 2
            np.testing.assert_allclose(keys[head].numpy(), expected, rtol=1e-4, atol=1e-8)
        assert float(queries.diagonal(dim1=1, dim2=2).min()) > 0
    # Of the first layer's queries the norm survives the rotary embedding: it is that of the projection.
    block = model.model.layers[0]
    with torch.no_grad():
        asked = block.self_attn.q_proj(block.input_layernorm(model.model.embed_tokens(read)))
    norms = asked.view(2, 30, 2, 2, 16).double().square().sum(dim=4).mean(dim=(0, 1, 3))
    torch.testing.assert_close(found[0][0].diagonal(dim1=1, dim2=2).sum(dim=1), norms, rtol=1e-5, atol=0.0)
