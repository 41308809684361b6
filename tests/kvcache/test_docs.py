"""The examples of docs/kvcache.md run as they stand, on a tiny model in a folder."""

import inspect
import re
from pathlib import Path

import families
import pytest
import torch
import transformers

from tqsearch.kvcache import TurboQuantCache

PAGE = Path(__file__).parents[2] / "docs" / "kvcache.md"


class Letters:
    """Enough of a tokenizer: a letter is a token. Tokenizers need files that models made from configurations lack."""

    def __call__(self, text, return_tensors):
        return {"input_ids": torch.tensor([[ord(letter) % families.VOCABULARY for letter in text]])}


def test_examples_run(tmp_path, monkeypatch, capsys):
    families.make("llama").save_pretrained(tmp_path / "model")
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: Letters())
    names = {"path": str(tmp_path / "model")}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert isinstance(names["cache"], TurboQuantCache)
    assert "2 layers compressed, 0 left alone" in capsys.readouterr().out
    assert "generate" not in vars(names["model"])
    assert (tmp_path / "prefix.tq").exists()
    assert names["prefix"].get_seq_length() == len("Once upon a time")  # branches did not touch it


@pytest.mark.parametrize(
    "name", ["key_bits", "codec", "residual_length", "sink_length", "protect_layers", "block_length", "seed"]
)
def test_the_table_gives_the_defaults(name):
    default = inspect.signature(TurboQuantCache.__init__).parameters["bits" if name == "key_bits" else name].default
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith("| `") and f"`{name}`" in line)
    assert row.split("|")[2].strip() == str(default)
