"""What the documentation tells people to run does run."""

import os
import re
from pathlib import Path

import pytest
import torch

from layerskip import SkipSet, generate
from tests.layerskip.test_transformers_integration import profile_for
from tests.models import tiny_llama, tiny_tokenizer

DOCS = Path(__file__).parents[2] / "docs"
LAYERS = 8  # as many as the pages name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model with its tokenizer, and a profile for it in the current folder."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128, num_hidden_layers=LAYERS)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    profile_for(model, SkipSet(LAYERS, (2,), (1,))).save(tmp_path / "draft_profile.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "model"


def snippets_of(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_first_snippet_decodes_with_a_profile(folder, capsys, page):
    names = {"folder": folder}
    exec(snippets_of(DOCS.parent / page)[0].replace('"smollm2"', "folder"), names)
    plain = generate(names["model"], names["ids"], max_new_tokens=100)
    assert names["generation"].tokens == plain.tokens
    assert tiny_tokenizer().decode(plain.tokens) in capsys.readouterr().out


def test_the_snippet_without_a_profile_makes_a_drafter_with_bridges(folder):
    first, without_a_profile, _ = snippets_of(DOCS / "python.md")
    names = {"folder": folder, "written": [f"the {number}th of some texts" for number in range(40)]}
    exec(first.replace('"smollm2"', "folder"), names)
    exec(without_a_profile, names)
    arguments = {"prompt": [1, 2, 3], "max_new_tokens": 20}
    drafted = generate(names["model"], drafter=names["drafter"], **arguments)
    assert drafted.stats.drafted > 0
    assert drafted.tokens == generate(names["model"], **arguments).tokens


def test_the_snippets_of_the_page_on_transformers_run_in_turn(folder, capsys):
    snippets = snippets_of(DOCS / "transformers.md")
    assert len(snippets) == 6
    names = {"folder": folder}
    for snippet in snippets:
        exec(snippet, names)
        if torch.is_tensor(names.get("output")):
            expected = names["model"].generate(**names["inputs"], max_new_tokens=40)
            assert names["output"].tolist() == expected.tolist()
    assert "Once upon a time" in capsys.readouterr().out
    assert list((Path(os.environ["XDG_CACHE_HOME"])).rglob("costs-*.json"))
