"""docs/rewards.md against the code: its tables, and its marked blocks."""

import re
from pathlib import Path

import pytest

from dpok_trl.rewards.binding import NAMES
from dpok_trl.rewards.registry import SHIPPED, shipped_rewards


REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "rewards.md").read_text(encoding="utf-8")
MARKED = re.findall(r"^<!-- test: rewards -->\n```python\n(.*?)^```", PAGE, re.S | re.M)


def rows(first_header):
    """The cells of the tables whose first two columns begin so."""
    found = re.findall(rf"^\| {re.escape(first_header)} .*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for table in found for line in table.splitlines()]


def test_the_shipped_rewards_say_the_same_of_themselves():
    expected = [[f"`{i.name}`", i.range, i.weights, i.licence, i.input] for i in shipped_rewards()]
    assert rows("name | range") == expected


def test_every_shipped_reward_has_its_weaknesses_told():
    named = [name for first, *_ in rows("name | from") for name in re.findall(r"`([\w.-]+)`", first)]
    assert sorted(named) == sorted(SHIPPED)


def test_the_parameters_are_those_that_are_bound():
    named = {name for first, *_ in rows("parameter |") for name in re.findall(r"`(\w+)`", first)}
    assert named == set(NAMES)


def test_there_are_marked_blocks():
    assert len(MARKED) == 3


@pytest.mark.parametrize(
    ("block", "printed"),
    zip(MARKED, ["redness: ok\n", "asked: ok\n", "clipped(standardized(pickscore))\n"], strict=True),
)
def test_marked_block_runs(block, printed, capsys):
    exec(compile(block, "docs/rewards.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.startswith(printed)


def test_the_readme_names_all_but_those_of_the_demo():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert [name for name in SHIPPED if f"`{name}`" not in readme] == ["demo-exact", "demo-soft", "demo-greenness"]
