"""`dpok-trl sample`: the pictures are those of the two models, and the file is a picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from dpok_trl import Policy, cli, load_tuned
from dpok_trl.commands import sample as command
from dpok_trl.policy.saved_policy import load_policy
from dpok_trl.results.pictures import to_pil


CPU = torch.device("cpu")


def same(one, other):
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one, other, strict=True))


def test_pictures_are_those_of_the_tuned_and_of_the_base_model(trained):
    base, output = trained
    policy = load_policy(base, output / "model", CPU)
    assert policy.call_kwargs == {"num_inference_steps": 2, "guidance_scale": 1.0}
    seeds = [3, 8, 5]
    tuned = command.draw(policy, "a cat", seeds, 2)
    before = command.draw(policy, "a cat", seeds, 2, pretrained=True)
    again = Policy(load_tuned(output / "model", base=base), call_kwargs=policy.call_kwargs)
    assert same(tuned[:2], to_pil(again.rollout(["a cat"] * 2, seeds[:2]).images))
    with again.pretrained():
        assert same(before[:2], to_pil(again.rollout(["a cat"] * 2, seeds[:2]).images))
    assert not same(tuned, before)


def test_options_win_over_the_settings_of_the_run(trained):
    base, output = trained
    policy = load_policy(base, output / "model", CPU, num_inference_steps=5, guidance_scale=None)
    assert policy.call_kwargs == {"num_inference_steps": 5, "guidance_scale": 1.0}


@pytest.mark.parametrize("of", ["run", "checkpoint-1"])
def test_the_grid(trained, tmp_path, capsys, of):
    base, output = trained
    model = output if of == "run" else output / of
    argv = ["sample", str(model), "--prompts", "a cat", "two dogs", "--seeds", "3", "4", "5", "--output"]
    assert cli.main([*argv, str(tmp_path / "new" / "grid.png"), "--base", str(base), "--debug"]) == 0
    assert "Drawing 6 images of each of the two models on cpu" in capsys.readouterr().out
    with Image.open(tmp_path / "new" / "grid.png") as grid:
        assert grid.width > 3 * 128 and grid.height > 4 * 128  # two prompts of two rows, three columns


def test_the_base_is_what_the_checkpoint_says(trained, tmp_path, capsys):
    base, output = trained
    argv = ["sample", str(output), "--prompts", "a cat", "--images", "1", "--output", str(tmp_path / "grid.jpg")]
    assert cli.main([*argv, "--debug"]) == 0
    assert f"Loading {base} and " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], "nowhere"),
        (
            ["RUN/model"],
            "RUN/model says which pipeline this was trained on: give it with --base (--base demo for the one",
        ),
        (["RUN", "--output", "grid.pdff"], "--output grid.pdff is no name of a picture: give one that ends in .png"),
        (["RUN", "--prompts", "nowhere.csv"], "there is no file nowhere.csv."),
    ],
)
def test_mistakes(trained, capsys, argv, words):
    run = str(trained[1])
    argv = [word.replace("RUN", run) for word in argv]
    assert cli.main(["sample", argv[0], "--prompts", "a cat", *argv[1:]]) == 2
    assert words.replace("RUN", run) in capsys.readouterr().err


def test_without_a_base_the_name_that_was_typed_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dpok_trl.policy.saved.snapshot_download", lambda *args, **kwargs: str(tmp_path))
    for name in ("sample", "evaluate"):
        more = [] if name == "sample" else ["--reward", "jpeg-incompressibility", "--output", str(tmp_path / "out")]
        assert cli.main([name, "me/rabbit", "--prompts", "a cat", *more]) == 2
        error = capsys.readouterr().err
        assert " in me/rabbit says which pipeline this was trained on" in error and str(tmp_path) not in error


@pytest.mark.parametrize("option", [["--images", "0"], ["--seeds", "-1"], ["--images", "2", "--seeds", "1"]])
def test_wrong_numbers(option):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "x", "--prompts", "a cat", *option])
    assert stop.value.code == 2
