import argparse
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

from tiny_llama import llama, tokens  # noqa: E402
from transformers import DynamicCache, LlamaConfig, PreTrainedTokenizerFast  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.kvcache import (  # noqa: E402
    build,
    configurations,
    documents,
    figures,
    greedy,
    likelihood,
    measures,
    merge,
    needle,
    results,
    run,
    storage,
    summary,
    tables,
)
from benchmarks.kvcache.language_model import add_large_key_bias  # noqa: E402
from tqsearch.errors import InvalidInputError  # noqa: E402

WORDS = ["[UNK]", "Question", "Answer", "the", "secret", "number", "of", "is", ":", "?", ".", "river", "falcon"]


class Scripted:
    """A model whose logits are looked up: (documents, positions, vocabulary), by the cache that it is given."""

    def __init__(self, tables: dict[str, torch.Tensor]) -> None:
        self.tables, self.config, self.place = tables, LlamaConfig(num_hidden_layers=1), 0
        self.calls: list[str] = []

    def __call__(self, piece: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        name = past_key_values if isinstance(past_key_values, str) else "dense"
        self.calls.append(name)
        table = self.tables[name]
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
    found = likelihood.Reference(model, read, 4, 2).agreement(lambda: "ours")
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


def test_the_dense_reference_is_kept_as_far_as_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    table, read = torch.randn(1, 10, 7, generator=generator), torch.randint(0, 7, (3, 10), generator=generator)
    group = 10 * 7 * 4  # bytes of a group of one document
    for held, dense_calls in ((3 * group, 3), (2 * group + 1, 4), (0, 6)):
        monkeypatch.setattr(likelihood, "HELD", held)
        model = Scripted({"dense": table, "ours": table.flip(2)})
        reference = likelihood.Reference(model, read, 10, 1)
        first, second = (reference.agreement(lambda: "ours") for _ in range(2))
        assert model.calls.count("ours") == 6
        assert model.calls.count("dense") == dense_calls
        assert torch.equal(first.kl, second.kl)
        assert first.kl.shape == (3, 9)


def test_what_is_measured_is_kept_when_the_next_fails() -> None:
    table = torch.randn(1, measures.MEASURED_FROM + 8, 7, generator=torch.Generator().manual_seed(1))
    model, read = Scripted({"dense": table, "ours": table}), torch.zeros(table.shape[:2], dtype=torch.int64)
    options = argparse.Namespace(chunk=64, batch=1)
    scene = measures.Scene(model, None, {}, read, ["prose"], options)

    def fails() -> Any:
        raise MemoryError

    caches = [configurations.Configuration(configurations.OURS, bits, bits) for bits in (4, 2)]
    group = list(zip(caches, (build.Built(lambda: "ours"), build.Built(fails)), strict=True))
    kept: dict[str, Any] = {}
    with pytest.raises(MemoryError):
        measures.quality(group, lambda one, part, found: kept.update({one.name: found}), scene)
    assert {name: found["top1_percent"]["mean"] for name, found in kept.items()} == {"TurboQuant K4V4": 100.0}


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


def test_a_table_says_which_rows_were_measured_elsewhere() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "kvcache-booklm-25m.json"
    result = json.loads(path.read_text())
    run = next(run for run in result["runs"] if run["name"] == "TurboQuant K4V4")
    other = json.loads(json.dumps({**run, "name": "TurboQuant K3V3"}))
    other["quality"]["effort"]["environment"]["device"] = "an abacus"
    text = tables.quality_table(result, [run, {**run, "name": "TurboQuant K2V2"}, other])
    assert text.count("Measured on Intel") == 1
    assert " TurboQuant K3V3: measured on an abacus; " in text


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
    assert run.main([*common, "--only", "^TurboQuant K([28]V[28]|2V2, codec trellis)$"]) == 0
    assert run.main([*common, "--only", "^TurboQuant, prod keys K4V4$"]) == 0
    found = {one["name"]: one for one in json.loads(output.read_text())["runs"]}
    wide, narrow = found["TurboQuant K8V8"]["quality"], found["TurboQuant K2V2"]["quality"]
    assert wide["documents"] == 3
    assert wide["positions"] == 3 * (399 - wide["measured_from"])
    assert 0.0 < wide["kl"]["mean"] < narrow["kl"]["mean"] / 20
    assert "quality" in found["TurboQuant, prod keys K4V4"]
    assert found["TurboQuant K2V2, codec trellis"]["quality"]["kl"]["mean"] < narrow["kl"]["mean"]
    (root / "README.md").write_text("<!-- table:kvcache-tiny-llama -->\n<!-- end -->\n")
    (root / "docs").mkdir()
    (root / "docs" / "more.md").write_text("<!-- table:kvcache-tiny-llama.choices -->\n<!-- end -->\n")
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    readme = (root / "README.md").read_text()
    # Two layers of one head: keys and values of 16 coordinates and a float16 scale each, of 128 bytes dense.
    assert "| **TurboQuant K8V8** | **72** | **0.562** |" in readme
    assert "| **TurboQuant K2V2, codec trellis** | **24** | **0.188** |" in readme
    assert "prod keys" not in readme
    assert "TurboQuant, prod keys K4V4" in (root / "docs" / "more.md").read_text()
    for name in figures.names(json.loads(output.read_text())):
        assert (root / "docs" / "figures" / name).read_bytes().startswith(b"\x89PNG")
