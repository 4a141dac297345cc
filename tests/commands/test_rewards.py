"""`dpok-trl rewards`: the list, the check and the scores; exit codes; JSON."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from dpok_trl import cli
from dpok_trl.demo.world import greenness_reward
from dpok_trl.rewards.checking import sample_pictures
from dpok_trl.rewards.registry import SHIPPED, shipped_rewards


MODULE = """
import math

def text_length(images, text):
    return [None if one is None else float(len(one)) for one in text]

def half_broken(images, prompts):
    return [math.nan if place else 1.0 for place in range(len(images))]

class Width:
    def __call__(self, images, prompts):
        return [float(image.width) for image in images]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a module of the user and three pictures."""
    (tmp_path / "mine_for_the_cli.py").write_text(MODULE)
    (tmp_path / "no_python_for_the_cli.py").write_text("def f(:\n")
    for name, picture in zip(("a", "b", "c"), sample_pictures(), strict=False):
        picture.save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine_for_the_cli", None)


def printed(capsys, *argv):
    code = cli.main(["rewards", *argv])
    return code, capsys.readouterr().out


# --- list -------------------------------------------------------------------------------------------------------------


def test_list_has_every_shipped_reward_in_columns(capsys):
    code, out = printed(capsys, "list")
    header, *rows = out.splitlines()
    assert code == 0 and [row.split()[0] for row in rows] == list(SHIPPED)
    for column in ("needs", "weights", "licence", "range", "input"):
        start = header.index(column)
        for row, info in zip(rows, shipped_rewards(), strict=True):
            assert row[start:].startswith(getattr(info, column))


def test_list_as_json(capsys):
    code, out = printed(capsys, "list", "--json")
    assert code == 0 and json.loads(out) == [dataclasses.asdict(info) for info in shipped_rewards()]


def test_list_loads_no_models():
    code = (
        "import sys\nfrom dpok_trl import cli\ncli.main(['rewards', 'list'])\n"
        "print(sorted({'transformers', 'diffusers', 'accelerate', 'huggingface_hub'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("\n[]\n") and result.stderr == ""


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom dpok_trl import cli\ntry: cli.main(['rewards', 'score', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("[]\n") and "--prompt" in result.stdout


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_of_a_good_reward(capsys):
    code, out = printed(capsys, "check", "demo-soft")
    assert code == 0 and out.startswith("demo-soft: ok\n")


def test_check_as_json(capsys):
    code, out = printed(capsys, "check", "demo-exact", "--json")
    report = json.loads(out)
    assert code == 0 and report["ok"] and report["values"] == [1.0] * 3 + [0.0] * 3


def test_check_of_a_bad_reward_of_the_user(capsys, folder):
    code, out = printed(capsys, "check", "mine_for_the_cli:half_broken", "--json")
    report = json.loads(out, parse_constant=pytest.fail)  # no NaN: other languages could not read it
    assert code == 1 and not report["ok"] and report["values"] == [1.0] + ["nan"] * 5
    assert "5 of 6 rewards are not finite" in report["problems"][0]


def test_check_with_metadata_and_pictures(capsys, folder):
    name = "mine_for_the_cli:text_length"
    code, out = printed(capsys, "check", name)
    assert code == 1 and "asks for text, and the prompts come with no such columns" in out
    code, out = printed(capsys, "check", name, "--metadata", '{"text": "four"}')
    assert code == 0 and "note: all sample images got 4." in out
    code, out = printed(capsys, "check", "mine_for_the_cli:Width", "a.png", "b.png", "--prompt", "x", "--prompt", "y")
    assert code == 0 and "with 2 images as PIL pictures" in out
    code, out = printed(capsys, "check", "demo-soft", "--prompt", "two crosses")
    assert code == 0 and "with 6 images" in out
    code, out = printed(capsys, "check", "demo-soft", "--prompt", "two crosses", "--prompt", "a square")
    assert code == 0 and "with 2 images" in out


# --- score ------------------------------------------------------------------------------------------------------------


def test_scores_equal_those_of_the_function(capsys, folder):
    files = ["a.png", "b.png", "c.png"]
    code, out = printed(capsys, "score", "demo-greenness", *files, "--prompt", "four circles", "--json")
    rows = json.loads(out)
    pixels = torch.stack(
        [torch.tensor(list(picture.getdata())).T.reshape(3, 64, 64) / 255 for picture in sample_pictures()[:3]]
    )
    assert code == 0
    assert [row["reward"] for row in rows] == greenness_reward(pixels, ["four circles"] * 3)[0].tolist()
    assert [(row["image"], row["prompt"], row["applies"]) for row in rows] == [
        (file, "four circles", True) for file in files
    ]


def test_scores_as_a_table_with_a_prompt_each(capsys, folder):
    prompts = ["--prompt", "a green triangle", "--prompt", "a red square"]
    code, out = printed(capsys, "score", "demo-exact", "a.png", "b.png", *prompts)
    assert code == 0
    assert [line.split(maxsplit=2) for line in out.splitlines()] == [
        ["reward", "image", "prompt"],
        ["1", "a.png", "a green triangle"],
        ["0", "b.png", "a red square"],
    ]


def test_pictures_of_several_sizes(capsys, folder):
    Image.new("L", (7, 9)).save("small.png")
    code, out = printed(capsys, "score", "mine_for_the_cli:Width", "a.png", "small.png", "--prompt", "x", "--json")
    assert code == 0 and [row["reward"] for row in json.loads(out)] == [64.0, 7.0]


@pytest.mark.parametrize("argv", [["check", "demo-greenness"], ["score", "diversity", "--prompt", "x"]])
def test_pictures_of_several_sizes_in_one_call(capsys, folder, argv):
    Image.new("L", (7, 9)).save("small.png")
    assert cli.main(["rewards", *argv[:2], "a.png", "small.png", *argv[2:]]) == 2
    words = "pictures that are scored in one call must be of one size; there are 7 x 9 and 64 x 64."
    assert capsys.readouterr().err.startswith(f"dpok-trl rewards: error: {words}")


def test_what_does_not_apply_and_what_fails(capsys, folder):
    code, out = printed(capsys, "score", "diversity", "a.png", "--prompt", "x")
    assert code == 0 and "does not apply" in out
    code, out = printed(capsys, "score", "mine_for_the_cli:half_broken", "a.png", "b.png", "--prompt", "x", "--json")
    assert code == 1 and [row["reward"] for row in json.loads(out)] == [1.0, "nan"]


# --- errors of the user -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["check", "demo-sotf"], "there is no reward named 'demo-sotf'. Did you mean 'demo-soft'?"),
        (["check", "no_such_module:f"], "there is no module 'no_such_module'"),
        (["check", "mine_for_the_cli:math"], "of type module: a reward is something to call"),
        (
            ["score", "mine_for_the_cli:math", "a.png", "--prompt", "x"],
            "of type module: a reward is something to call",
        ),
        (["check", "clip-score", "--device", "cuda:99"], "'cuda:99' is no device of this machine"),
        (["check", "no_python_for_the_cli:f"], "the module 'no_python_for_the_cli' is no Python: "),
        (["check", ".m:f"], "'.m:f' is no module and function"),
        (["check", "clip-score", "--device", "nonsense"], "'nonsense' is no device of this machine"),
        (["check", "demo-soft", "--device", "cpu"], "has no method `to`, so --device cpu would do nothing"),
        (["score", "demo-soft", "missing.png", "--prompt", "x"], "No such file or directory: 'missing.png'"),
        (["score", "demo-soft", "mine_for_the_cli.py", "--prompt", "x"], "cannot identify image file"),
        (["score", "demo-soft", "a.png", "--prompt", "x", "--prompt", "y"], "given 2 times for 1 pictures"),
        (["score", "demo-soft", "a.png", "--prompt", "a cat"], "demo-soft raised ValueError: Cannot read the prompt"),
    ],
)
def test_one_line_on_stderr(capsys, folder, argv, words):
    assert cli.main(["rewards", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("dpok-trl rewards: error: ") and words in captured.err


@pytest.mark.parametrize("argv", [["--debug", "check", "nope"], ["check", "nope", "--debug"]])
def test_debug_at_either_place(argv):
    with pytest.raises(ValueError, match="no reward named"):
        cli.main(["rewards", *argv])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: list | check | score"),
        (["score", "demo-soft", "a.png"], "--prompt"),
        (["check", "demo-soft", "--metadata", "text"], "'text' is not JSON"),
        (["check", "demo-soft", "--metadata", "[1]"], "'[1]' is not a JSON object"),
    ],
)
def test_wrong_arguments(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(["rewards", *argv])
    assert stop.value.code == 2 and words in capsys.readouterr().err
