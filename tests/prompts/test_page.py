"""docs/prompts.md against the code: its tables, and its marked blocks."""

import re
from pathlib import Path

import datasets
import pytest

from dpok_trl import load_prompts
from dpok_trl.prompts.datasets import HUB_PROMPTS, shipped_lists


PAGE = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")
MARKED = re.findall(r"^<!-- test: prompts -->\n```python\n(.*?)^```", PAGE, re.S | re.M)
PRINTED = [
    "Four wolves in the park. | count\n20\n",
    "{'prompt': 'a heron at dusk', 'category': 'water'}\n2\n",
]


def rows(first_header):
    """The cells of the table whose first columns begin so."""
    (table,) = re.findall(rf"^\| {re.escape(first_header)} .*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_shipped_lists_are_told_with_their_counts():
    told = {name.strip("`"): int(count) for name, count, *_ in rows("name | prompts")}
    assert told == {name: len(load_prompts(name)) for name in shipped_lists()}


def test_the_categories_that_are_told_are_those_of_the_lists():
    previous = None
    for name, _, told, _ in rows("name | prompts"):
        listed = load_prompts(name.strip("`"))
        categories = set(listed["category"]) if "category" in listed.column_names else {"none"}
        previous = previous if told == "the same" else set(told.split(", "))
        assert previous == categories, name


def test_the_benchmarks_are_told_with_their_columns():
    told = {
        name.strip("`"): tuple(re.match(r"`?([\w/.-]+)", cell)[1] for cell in cells)
        for name, *cells in rows("name | dataset")
    }
    assert told == {name: (h.repo, h.split, h.prompt, h.category or "none") for name, h in HUB_PROMPTS.items()}


@pytest.mark.parametrize(("block", "printed"), zip(MARKED, PRINTED, strict=True))
def test_marked_block_runs(block, printed, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/prompts.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == printed
