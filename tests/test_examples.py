"""Each example runs, by its own command, with tiny settings."""

import math
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dpok_trl.results.runlog import read_metrics
from dpok_trl.rewards.demo import DemoGreenness
from dpok_trl.rewards.server import RewardServer, about, reward_scorer


EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
TINY = ["--epochs", "2", "--batch-size", "4", "--steps", "2"]
LONGEST = 100  # lines


def run(name, folder, *arguments):
    """What it prints, and the metrics of its rounds of sampling."""
    [script] = [path for path in EXAMPLES if path.stem == name]
    command = [sys.executable, script, *TINY, "--output", "out", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rounds = [line for line in read_metrics(folder / "out") if "reward" in line]
    assert len(rounds) == 2 and all(math.isfinite(line["reward"]) for line in rounds)
    return result.stdout, rounds


def test_custom_reward(tmp_path):
    printed, rounds = run("custom_reward", tmp_path)
    assert printed.startswith("mean_colour: ok\n")
    assert rounds[0]["reward"] == rounds[0]["rewards/mean_colour/mean"] <= 1
    assert (tmp_path / "out" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_multi_reward(tmp_path):
    printed, rounds = run("multi_reward", tmp_path, "--group-size", "2")
    for name in ("right", "clean", "diverse"):
        values = [line[f"rewards/{name}/mean"] for line in rounds]
        assert f"{name}: {values[0]:.3f} -> {values[1]:.3f}\n" in printed
    assert all(line["rewards/clean/mean"] <= -0.9 + 1e-6 for line in rounds)


def test_remote_reward(tmp_path):
    printed, rounds = run("remote_reward", tmp_path)
    assert printed.startswith("remote: ok\n")
    assert 0 <= rounds[0]["rewards/remote/mean"] <= 1 and rounds[0]["rewards/remote/nonfinite"] == 0


def test_remote_reward_elsewhere(tmp_path):
    reward = DemoGreenness()
    with RewardServer(("127.0.0.1", 0), reward_scorer(reward), about(reward)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run("remote_reward", tmp_path, "--url", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_form(path):
    text = path.read_text()
    assert text.count("\n") < LONGEST
    header = re.match(r"# /// script\n((?:# .*\n)+?)# ///\n", text)
    assert header and 'dependencies = ["dpok-trl"]' in header[1] and "requires-python" in header[1]
