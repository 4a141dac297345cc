"""`dpok-trl env`: the versions that a bug report needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform

from dpok_trl import __version__


HELP = "print the versions of everything, for a bug report"

PACKAGES = ("diffusers", "transformers", "accelerate", "peft", "trl", "datasets", "huggingface_hub")
PACKAGES += ("safetensors", "numpy", "Pillow")
OPTIONAL = ("bitsandbytes", "torchao", "torchvision")
TRACKERS = ("tensorboard", "wandb", "trackio", "swanlab", "comet_ml", "aim", "mlflow", "clearml", "dvclive")
# Settings by name, so that nothing private can be among them.
VARIABLES = ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
VARIABLES += ("OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "WORLD_SIZE")
LAUNCHER = ("compute_environment", "distributed_type", "num_machines", "num_processes", "mixed_precision", "use_cpu")

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    found = environment()
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(f"- {name}: {value}" for name, value in found.items()))
    return 0


def environment() -> dict[str, str]:
    """What is installed and what it runs on, without names of folders, users or tokens."""
    import torch

    found = {
        "dpok-trl": __version__,
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "Platform": platform.platform(),
        "torch": f"{torch.__version__} ({_built_for()})",
        "Devices": "; ".join(_devices()),
    }
    found |= {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}
    installed = [f"{name} {_version(name)}" for name in TRACKERS if _version(name) != "not installed"]
    found["Trackers"] = ", ".join(installed) or "none installed"
    found["accelerate config"] = _launcher_config()
    found["Environment"] = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "-"
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _built_for() -> str:
    import torch

    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "built without CUDA"


def _devices() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    gpus = [f"cuda:{i} {one.name}, {one.total_memory / GIB:.1f} GiB" for i, one in enumerate(properties)]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*gpus, *mps, f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]


def _launcher_config() -> str:
    """What `accelerate config` has left: the settings that matter here."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if not os.path.isfile(default_config_file):
        return "none"
    config = load_config_from_file(None).to_dict()
    return ", ".join(f"{name}={config[name]}" for name in LAUNCHER if name in config)
