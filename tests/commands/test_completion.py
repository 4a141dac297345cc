"""`dpok-trl completion`: the scripts hold what the parser has, and bash completes by them."""

import shutil
import subprocess

import pytest

from dpok_trl import DPOKConfig, cli


def script(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


def completed(source, *words):
    """What bash offers for the last word."""
    line = f'COMP_WORDS=({" ".join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}; _dpok_trl; echo "${{COMPREPLY[@]}}"'
    return subprocess.run(
        ["bash", "-c", f"{source}\n{line}"], capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash(capsys):
    source = script("bash", capsys)
    assert completed(source, "dpok-trl", "") == list(cli.COMMANDS)
    assert completed(source, "dpok-trl", "eva") == ["evaluate"]
    assert completed(source, "dpok-trl", "demo", "--re") == ["--reward"]
    assert completed(source, "dpok-trl", "demo", "--reward", "") == ["exact", "soft", "greenness"]
    assert completed(source, "dpok-trl", "rewards", "sc") == ["score"]
    assert completed(source, "dpok-trl", "train", "--train_obj") == ["--train_objective"]
    assert completed(source, "dpok-trl", "train", "--kl_type", "g") == ["gaussian"]
    offered = completed(source, "dpok-trl", "train", "--")
    assert {f"--{name}" for name in DPOKConfig.__dataclass_fields__} | {"--model", "--config", "--debug"} <= set(
        offered
    )


def test_zsh_reads_that_of_bash(capsys):
    bash = script("bash", capsys)
    assert script("zsh", capsys) == "autoload -U +X bashcompinit && bashcompinit\n" + bash


def test_fish(capsys):
    lines = script("fish", capsys).splitlines()
    assert "complete -c dpok-trl -n __fish_use_subcommand -f -a train" in lines
    choices = "complete -c dpok-trl -n '__fish_seen_subcommand_from train' -l kl_type -x -a 'gaussian noise'"
    assert choices in lines and all(line.startswith("complete -c dpok-trl -n ") for line in lines)
