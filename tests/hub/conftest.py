"""Clients of a Hub on this machine, each in a process of its own: huggingface_hub reads its address when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer


HERE = Path(__file__).parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """`client("script.py", *args)` with the token of "me", on an empty cache; `processes=2` launches it by torchrun."""

    def run(script, *args, token="hf_me", processes=1) -> subprocess.CompletedProcess:
        home = tmp_path_factory.mktemp("home")
        paths = os.pathsep.join(str(HERE.parent.parent / name) for name in ("tests", "tools"))
        environment = hub.environment(home, token) | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}
        command = [sys.executable, *(TORCHRUN if processes == 2 else []), str(HERE / script), *map(str, args)]
        return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=300)

    return run
