"""What the documentation tells people to run does run."""

import os
import re
from pathlib import Path

import pytest
import torch

from tests.layerskip.test_transformers_integration import profile_for
from tests.models import tiny_llama, tiny_tokenizer

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model with its tokenizer, and a profile for it in the current folder."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    profile_for(model).save(tmp_path / "draft_profile.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "model"


def test_the_snippets_of_the_page_on_transformers_run_in_turn(folder, capsys):
    text = (DOCS / "transformers.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 6
    names = {"folder": folder}
    for snippet in snippets:
        exec(snippet, names)
        if torch.is_tensor(names.get("output")):
            expected = names["model"].generate(**names["inputs"], max_new_tokens=40)
            assert names["output"].tolist() == expected.tolist()
    assert "Once upon a time" in capsys.readouterr().out
    assert list((Path(os.environ["XDG_CACHE_HOME"])).rglob("costs-*.json"))
