"""Prompt caching: save, load, fork; damaged files."""

import hashlib
import json
import os
import stat

import families
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_store import read_key_codes, read_row, read_value_codes

from tqsearch.errors import BackendError, CorruptFileError, ForeignFileError, InvalidInputError, NewerFormatError
from tqsearch.kvcache import LayerBits, PerLayer, TurboQuantCache
from tqsearch.plan import BitPlan


def filled(name, bits=4, length=40, **options):
    model = families.make(name)
    cache = TurboQuantCache(model.config, bits, residual_length=8, block_length=8, **options)
    with torch.no_grad():
        model(families.tokens(2, length), past_key_values=cache)
    return model, cache


def states(cache):
    return [
        None if part is None else part.clone()
        for layer in cache.layers
        for part in (getattr(layer, "keys", None), getattr(layer, "values", None))
    ]


def go_on(model, cache):
    with torch.no_grad():
        return model(families.tokens(2, 15, seed=9), past_key_values=cache).logits


NAMES = ["llama", "qwen2-window", "gemma3", "gpt2", "qwen3-next", "falcon-h1", "deepseek-v3"]


@pytest.mark.parametrize(
    ("name", "codec"), [(name, "scalar") for name in NAMES] + [("llama", "trellis"), ("deepseek-v3", "trellis")]
)
def test_a_loaded_cache_goes_on_as_the_saved_one(tmp_path, name, codec):
    model, cache = filled(name, 3.5, codec=codec)
    cache.save(tmp_path / "prefix")
    loaded = TurboQuantCache.load(tmp_path / "prefix", model.config)
    for before, after in zip(states(cache), states(loaded), strict=True):
        assert (before is None and after is None) or torch.equal(before, after)
    for _ in range(2):  # the second crosses blocks that the first filled
        assert torch.equal(go_on(model, cache), go_on(model, loaded))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("llama", "scalar"),
        ("gemma2", "scalar"),
        ("qwen3-next", "scalar"),
        ("falcon-h1", "scalar"),
        ("llama", "trellis"),
    ],
)
def test_branches_of_a_prefix_do_not_meet(name, codec):
    model, cache = filled(name, codec=codec)
    expected = go_on(model, filled(name, codec=codec)[1])
    before = states(cache)
    branches = [cache.fork() for _ in range(3)]
    assert torch.equal(go_on(model, branches[0]), expected)
    branches[1].reset()
    branches[2].batch_repeat_interleave(2)
    if name == "llama":
        branches[2].crop(-31)
        branches[2].fork().crop(-3)
        assert branches[2].get_seq_length() == 9
    for old, new in zip(before, states(cache), strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    assert torch.equal(go_on(model, cache), expected)


def test_an_empty_cache_can_be_saved(tmp_path):
    config = families.CONFIGS["gemma2"]()
    TurboQuantCache(config, 4).save(tmp_path / "empty")
    loaded = TurboQuantCache.load(tmp_path / "empty", config)
    assert loaded.get_seq_length() == 0
    loaded.update(torch.ones((1, 2, 3, 64)), torch.ones((1, 2, 3, 64)), 1)
    assert loaded.layers[1].get_seq_length() == 3


def test_widths_and_lengths_come_from_the_file(tmp_path):
    plan = BitPlan.from_pairs([(8, 8), (56, 2)])
    policy = PerLayer((LayerBits(plan, 2.5), LayerBits(None, None)))
    _, cache = filled("llama", policy=policy, seed=11, sink_length=2)
    cache.save(tmp_path / "file")
    loaded = TurboQuantCache.load(tmp_path / "file", families.CONFIGS["llama"]())
    assert [type(layer).__name__ for layer in loaded.layers] == ["TurboQuantLayer", "DynamicLayer"]
    assert loaded.layers[0].settings == cache.layers[0].settings
    assert loaded.layers[0].settings.bits == LayerBits(plan, 2.5)
    assert torch.equal(loaded.layers[1].keys, cache.layers[1].keys)


def test_half_precision_survives(tmp_path):
    config = families.CONFIGS["llama"]()
    cache = TurboQuantCache(config, 4, residual_length=8, block_length=8)
    keys = torch.randn((1, 2, 40, 64), dtype=torch.bfloat16)
    for layer in range(2):
        cache.update(keys, keys * 2, layer)
    cache.save(tmp_path / "file")
    loaded = TurboQuantCache.load(tmp_path / "file", config)
    assert loaded.layers[0].keys.dtype == torch.bfloat16
    assert torch.equal(loaded.layers[0].values, cache.layers[0].values)


def test_the_file_is_what_its_specification_says(tmp_path):
    _, cache = filled("llama", 3)
    cache.save(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        packed = file.get_tensor("0.values.packed")
    assert metadata.keys() == {"format", "version", "header", "sha256"}
    assert (metadata["format"], metadata["version"]) == ("tqsearch-kvcache", "1")
    header = json.loads(metadata["header"])
    assert {
        key: header[key] for key in ("residual_length", "sink_length", "block_length", "seed", "outlier_channels")
    } == {
        "outlier_channels": 0,
        "residual_length": 8,
        "sink_length": 4,
        "block_length": 8,
        "seed": 0,
    }
    assert header["codec"] == "scalar"
    assert header["layers"][0]["bits"] == [3, 3]
    parts = ("keys.sinks", "keys.recent", "keys.packed", "keys.scales", "keys.offset")
    parts += ("values.sinks", "values.recent", "values.packed", "values.scales")
    assert names == {f"{layer}.{part}" for layer in (0, 1) for part in parts}
    assert tuple(packed.shape) == (2, 2, 3, 64 * 3)


def test_a_file_has_the_planes_of_each_row_together(tmp_path):
    """As the first files of version 1, though in memory the rows of a block lie by planes."""
    _, cache = filled("llama", 3)
    cache.save(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        keys, values = (file.get_tensor(f"0.{side}.packed").numpy() for side in ("keys", "values"))
    kept = [history.compressed.packed for history in cache.layers[0].past]
    assert keys.shape == (2, 2, 24, 64 * 3 // 8)
    codes = np.stack([read_row(row, [(64, 3)]) for row in keys.reshape(-1, 24)])
    assert np.array_equal(codes, read_key_codes(kept[0], [(64, 3)], 8))
    lines = np.stack([read_row(line, [(8, 3)]) for line in values.reshape(-1, 3)])
    codes = lines.reshape(-1, 64, 8).swapaxes(1, 2).reshape(-1, 64)
    assert np.array_equal(codes, read_value_codes(kept[1], [(64, 3)], 8))


def test_trellis_codes_are_of_version_2(tmp_path):
    _, cache = filled("llama", 3, codec="trellis")
    cache.save(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        metadata, packed = file.metadata(), file.get_tensor("0.values.packed")
    assert metadata["version"] == "2"
    assert json.loads(metadata["header"])["codec"] == "trellis"
    assert tuple(packed.shape) == (2, 2, 24, 64 * 3 // 8)  # a token's codes together, as keys
    assert torch.equal(packed, cache.layers[0].past[1].compressed.packed)


def test_the_first_files_of_version_1_name_no_codec(tmp_path):
    _, cache = filled("llama")
    cache.save(tmp_path / "file")

    def without(metadata, tensors):
        header = {key: value for key, value in json.loads(metadata["header"]).items() if key != "codec"}
        digest = hashlib.sha256((text := json.dumps(header)).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {json.dumps(tensor.shape, separators=(',', ':'))}".encode())
            digest.update(tensor.numpy().tobytes())
        metadata.update(header=text, sha256=digest.hexdigest())

    rewritten(tmp_path / "file", without)
    loaded = TurboQuantCache.load(tmp_path / "file", families.CONFIGS["llama"]())
    assert loaded.layers[0].settings == cache.layers[0].settings
    assert torch.equal(loaded.layers[0].keys, cache.layers[0].keys)


def test_writing_replaces_the_file_whole_or_not_at_all(tmp_path, monkeypatch):
    model, cache = filled("llama")
    path = tmp_path / "file"
    cache.save(path)
    os.chmod(path, 0o640)
    first = path.read_bytes()
    go_on(model, cache)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        cache.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["file"]
    cache.save(path)
    assert path.read_bytes() != first
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def fail(*_):
    raise OSError("the disk is full")


def test_a_full_disk_leaves_the_old_file(tmp_path, files_up_to):
    model, cache = filled("llama")
    path = tmp_path / "file"
    cache.save(path)
    before = path.read_bytes()
    go_on(model, cache)
    for limit in (0, 1000, len(before) - 1):
        with files_up_to(limit), pytest.raises(OSError, match="File too large"):
            cache.save(path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="modes and links of files")
def test_files_and_links_are_as_any_others(tmp_path):
    _, cache = filled("llama")
    (tmp_path / "any").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    cache.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "any").stat().st_mode
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"this is a folder: '.*/folder'"):
        cache.save(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match="no such folder to save to; make it first"):
        cache.save(tmp_path / "none" / "file")
    assert sorted(os.listdir(tmp_path)) == ["any", "file", "folder", "link"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_safetensors_reader_opens_it(tmp_path, dtype):
    """Tensors begin at multiples of their element size, whatever bytes the codes take: here 15 a token of a value."""
    config = families._config("LlamaConfig", head_dim=30, num_attention_heads=3, num_key_value_heads=3)
    cache = TurboQuantCache(config, 1, sink_length=1, residual_length=0, block_length=8)
    states = torch.randn(1, 3, 10, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    for layer in range(len(cache.layers)):
        cache.update(states, states, layer)
    cache.save(tmp_path / "file")
    with safe_open(tmp_path / "file", "np" if dtype != torch.bfloat16 else "pt") as file:
        for number, layer in enumerate(cache.layers):
            for side, history in zip(("keys", "values"), layer.past, strict=True):
                for name, tensor in history.tensors().items():
                    read = torch.as_tensor(file.get_tensor(f"{number}.{side}.{name}"))
                    assert read.dtype == tensor.dtype
                    assert torch.equal(read.flatten(), tensor.flatten())  # codes are in other shapes there


def rewritten(path, change):
    """The file with its metadata and tensors changed."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m, t: m.update(version="3"), NewerFormatError, "version 3, this package reads up to 2"),
        (lambda m, t: m.update(version="x"), CorruptFileError, "metadata lack"),
        (lambda m, t: m.pop("sha256"), CorruptFileError, "metadata lack"),
        (lambda m, t: m.update(format="other"), ForeignFileError, "format is 'other'"),
        (lambda m, t: m.update(header=m["header"].replace('"seed":0', '"seed":1')), CorruptFileError, "checksum"),
        (lambda m, t: t["0.keys.packed"].view(-1)[3].bitwise_xor_(4), CorruptFileError, "checksum"),
        (lambda m, t: t.pop("1.values.scales"), CorruptFileError, "checksum"),
    ],
)
def test_altered_files_are_refused(tmp_path, change, error, message):
    _, cache = filled("llama")
    path = tmp_path / "file"
    cache.save(path)
    rewritten(path, change)
    with pytest.raises(error, match=message):
        TurboQuantCache.load(path, families.CONFIGS["llama"]())


def test_truncated_and_foreign_files_are_refused(tmp_path):
    _, cache = filled("llama")
    path = tmp_path / "file"
    cache.save(path)
    whole = path.read_bytes()
    config = families.CONFIGS["llama"]()
    for length in (len(whole) - 1, len(whole) // 2, 4000):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFileError, match="truncated"):
            TurboQuantCache.load(path, config)
    for content in (b"", b"hello", b"\0" * 4096):
        path.write_bytes(content)
        with pytest.raises(ForeignFileError, match="not a tqsearch cache"):
            TurboQuantCache.load(path, config)
    with pytest.raises(FileNotFoundError):
        TurboQuantCache.load(tmp_path / "none", config)


def test_a_device_that_is_not_there_is_named(tmp_path):
    model, cache = filled("llama")
    cache.save(tmp_path / "c.tq")
    with pytest.raises(InvalidInputError, match="device must be one of torch's"):
        TurboQuantCache.load(tmp_path / "c.tq", model.config, device="gpu")
    with pytest.raises(BackendError, match="device must be there"):
        TurboQuantCache.load(tmp_path / "c.tq", model.config, device=f"cuda:{torch.cuda.device_count()}")


def test_a_file_of_another_model_is_refused(tmp_path):
    _, cache = filled("llama")
    cache.save(tmp_path / "file")
    with pytest.raises(InvalidInputError, match="must have the layers of"):
        TurboQuantCache.load(tmp_path / "file", families.CONFIGS["gemma2"]())
    with pytest.raises(InvalidInputError, match="must have the layers of"):
        TurboQuantCache.load(tmp_path / "file", families._config("LlamaConfig", num_hidden_layers=3))
    loaded = TurboQuantCache.load(tmp_path / "file", families.CONFIGS["qwen3"]())
    with pytest.raises(InvalidInputError, match=r"states must have shape \(2, 2, n, 64\)"):
        go_on(families.make("qwen3"), loaded)
