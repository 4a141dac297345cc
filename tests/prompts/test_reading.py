"""Prompts as they are written on a command line."""

import datasets
import pytest

from dpok_trl.prompts import reading
from dpok_trl.prompts.reading import read_prompts


@pytest.mark.parametrize(
    "text", ["A green colored rabbit.", "cats/dogs and birds", "a photo.png of a cat", "rabbit", "../x"]
)
def test_what_looks_like_a_prompt_is_one(text):
    assert read_prompts([text]) == [(text, {})]


def test_files_and_lists_bring_their_columns(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,weight\na cat,2\na dog,1\n")
    assert read_prompts([str(tmp_path / "p.csv"), "a bird"]) == [
        ("a cat", {"weight": 2}),
        ("a dog", {"weight": 1}),
        ("a bird", {}),
    ]
    assert read_prompts(["demo"])[1] == ("four circles", {"category": "count"})


@pytest.mark.parametrize("name", ["drawbench", "owner/name"])
def test_names_of_the_hub_are_loaded(monkeypatch, name):
    asked = []

    def load(item):
        asked.append(item)
        return datasets.Dataset.from_dict({"prompt": ["x"]})

    monkeypatch.setattr(reading, "load_prompts", load)
    assert read_prompts([name]) == [("x", {})] and asked == [name]


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="there is no file nowhere.csv."):
        read_prompts(["nowhere.csv"])
