"""The servers for other environments, docs/reward_servers: with stand-ins of the packages that they serve, whose calls are the real ones'."""

import contextlib
import http.client
import importlib
import json
import math
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpok_trl.rewards.remote import RemoteReward


SERVERS = Path(__file__).parents[2] / "docs" / "reward_servers"

IMAGE_REWARD = """
def load(name="ImageReward-v1.0", device="cpu", download_root=None, med_config=None):
    assert (name, device, med_config) == ("ImageReward-v1.0", "cpu", None)
    return Model()

class Model:
    def score(self, prompt, image):
        if prompt == "broken":
            raise RuntimeError("CUDA error")
        return len(prompt) + image.getpixel((0, 0))[0] / 1000
"""

HPSV3 = """
import torch

class HPSv3RewardInferencer:
    def __init__(self, config_path=None, checkpoint_path=None, device="cuda", differentiable=False):
        assert (config_path, checkpoint_path, device) == (None, None, "cpu")

    def reward(self, image_paths, prompts):
        means = [len(prompt) + image.getpixel((0, 0))[0] / 1000 for prompt, image in zip(prompts, image_paths)]
        return torch.tensor([[mean, 9.0] for mean in means], requires_grad=True)
"""

# Its functions read the globals that its main program sets.
GENEVAL = """
import mmdet
from PIL import Image

def load_models(args):
    assert args.options == {} and args.model_path == "weights" and args.model_config.endswith("8x2_50e_coco.py")
    return "detector", ("clip", "transform", "tokenizer"), ["cat", "dog"]

def evaluate_image(filepath, metadata):
    assert (object_detector, clip_model, transform, tokenizer) == ("detector", "clip", "transform", "tokenizer")
    assert (THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS, NMS_THRESHOLD, POSITION_THRESHOLD) == (0.3, 0.9, 16, 1.0, 0.1)
    assert metadata["prompt"] and metadata["tag"] == "single_object"
    red = Image.open(filepath).getpixel((0, 0))[0] > 100
    return {"correct": red and metadata["include"][0]["class"] in classnames, "reason": ""}
"""


@pytest.fixture
def other_environment(tmp_path, monkeypatch):
    """A path with the servers and the stand-ins; their modules are forgotten afterwards."""
    for name, source in (("ImageReward", IMAGE_REWARD), ("hpsv3", HPSV3), ("mmdet", "")):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    (tmp_path / "geneval" / "evaluation").mkdir(parents=True)
    (tmp_path / "geneval" / "evaluation" / "evaluate_images.py").write_text(GENEVAL)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # docs/ is published as it lies
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(SERVERS))
    yield tmp_path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith((str(tmp_path), str(SERVERS))):
            del sys.modules[name]


@contextlib.contextmanager
def running(recipe, *argv):
    module = importlib.import_module(recipe)
    score = module.make_score(module.parser().parse_args(argv))
    server = importlib.import_module("serve").make_server(score, recipe, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    with server:
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def pictures(*reds):
    return [Image.new("RGB", (3, 2), (red, 0, 0)) for red in reds]


@pytest.mark.parametrize("recipe", ["image_reward_server", "hpsv3_server"])
def test_scores_come_back_in_order(other_environment, recipe):
    with running(recipe, "--device", "cpu") as url:
        rewards = RemoteReward(url, batch_size=2)(pictures(1, 2, 3), ["a", "bb", "cc c"])
    np.testing.assert_allclose(rewards, [1.001, 2.002, 4.003], rtol=1e-6)


def test_geneval_takes_the_metadata_of_its_prompts(other_environment):
    row = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    other = {**row, "include": [{"class": "bird", "count": 1}]}
    folder = str(other_environment / "geneval")
    with running("geneval_server", "--geneval", folder, "--weights", "weights") as url:
        rewards = RemoteReward(url)(pictures(200, 0, 200, 200), ["a photo of a dog"] * 4, [row, row, other, {}])
    assert rewards == [1.0, 0.0, 0.0, None]


def test_errors_are_sentences(other_environment, caplog):
    with running("image_reward_server", "--device", "cpu") as url:
        assert math.isnan(RemoteReward(url, retries=0)(pictures(1), ["broken"])[0])
        assert re.search(r"status 500.*RuntimeError: CUDA error", caplog.text)
        for body, words in (
            (b"{}", 'the request has no list "images"'),
            (b"[]", 'the request has no list "images"'),
            (b'{"images": [], "prompts": ["a"]}', "images, prompts and metadata must be equally many"),
            (b'{"images": ["AAAA"], "prompts": ["a"]}', "cannot identify image file"),
            (b"nonsense", "Expecting value"),
        ):
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
            with contextlib.closing(connection):
                connection.request("POST", "/", body)
                response = connection.getresponse()
                assert response.status == 400 and words in json.loads(response.read())["error"]
        assert RemoteReward(url)(pictures(0), ["still there"]) == [11.0]


def test_it_runs_as_a_program_that_needs_nothing_of_ours(other_environment):
    """Started as the page says; dpok_trl cannot be imported there."""
    (other_environment / "dpok_trl.py").write_text("raise ImportError")
    command = [sys.executable, "-u", str(SERVERS / "image_reward_server.py"), "--port", "0", "--device", "cpu"]
    environment = {"PYTHONPATH": str(other_environment), "PATH": "/usr/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("Serving image-reward at http://127.0.0.1:")
            url = line.split()[3]
            assert RemoteReward(url)(pictures(4), ["abc"]) == [3.004]
        finally:
            process.terminate()
