"""`dpok-trl env`: every version, and nothing private."""

import importlib.metadata
import json
import re

import torch

import dpok_trl
from dpok_trl import cli
from dpok_trl.commands import env


def test_versions(capsys):
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dpok-trl"] == dpok_trl.__version__ and found["torch"].startswith(torch.__version__)
    for package in ("diffusers", "transformers", "accelerate", "peft", "trl", "datasets", "huggingface_hub"):
        assert found[package] == importlib.metadata.version(package)
    assert f"tensorboard {importlib.metadata.version('tensorboard')}" in found["Trackers"]
    assert re.search(r"CPU, \d+ cores", found["Devices"])


def test_as_a_list(capsys):
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0].removeprefix("- ") for line in lines] == list(env.environment())


def test_nothing_private(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HOME", "/home/somebody")
    config = tmp_path / "default_config.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 3\n"
        "mixed_precision: bf16\nmain_process_ip: 10.1.2.3\nuse_cpu: false\n"
    )
    for name in ("default_config_file", "default_yaml_config_file"):
        monkeypatch.setattr(f"accelerate.commands.config.config_args.{name}", str(config))
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "OMP_NUM_THREADS=1" in printed and "num_processes=3, mixed_precision=bf16" in printed
    for private in ("secret", "somebody", "10.1.2.3", str(tmp_path)):
        assert private not in printed


def test_what_is_not_installed_is_said(monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    found = env.environment()
    assert found["peft"] == "not installed" and found["Trackers"] == "none installed"


def test_gpus_are_named(monkeypatch):
    class Gpu:
        name, total_memory = "A GPU", 24 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu)
    assert env.environment()["Devices"].startswith("cuda:0 A GPU, 24.0 GiB; ")
