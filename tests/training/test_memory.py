"""The memory that a run takes at least: the sums of docs/configuration.md, and the warning of a GPU that is too small."""

import logging

import pytest
import torch
from tiny import stable_diffusion

from dpok_trl import DPOKConfig
from dpok_trl.training import memory
from dpok_trl.training.memory import least_memory, warn_of_memory


def parameters(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize(
    ("settings", "dtype", "unet_bytes"),
    [
        ({}, torch.float32, 4),
        ({}, torch.bfloat16, 2),
        ({"train_use_lora": False}, torch.float32, 20),
        ({"train_use_lora": False}, torch.bfloat16, 18),
        ({"train_use_lora": False, "train_use_8bit_adam": True}, torch.bfloat16, 12),
    ],
)
def test_the_sums_of_the_documentation(settings, dtype, unet_bytes):
    pipe = stable_diffusion().to(dtype)
    stored = 4 if dtype == torch.float32 else 2
    expected = unet_bytes * parameters(pipe.unet) + stored * parameters(pipe.vae, pipe.text_encoder)
    config = DPOKConfig()
    for name, value in settings.items():  # bitsandbytes need not be installed
        setattr(config, name, value)
    assert least_memory(config, pipe) == expected


def test_a_gpu_that_is_too_small_is_told_and_one_that_is_not_is_not(monkeypatch, caplog):
    pipe, config = stable_diffusion(), DPOKConfig(train_use_lora=False)
    needed = least_memory(config, pipe)
    monkeypatch.setattr(memory, "total_memory", lambda device: needed)
    with caplog.at_level(logging.WARNING):
        warn_of_memory(config, pipe, torch.device("cuda"))
    assert not caplog.records
    monkeypatch.setattr(memory, "total_memory", lambda device: needed - 1)
    monkeypatch.setattr(memory, "GIB", needed)
    warn_of_memory(config, pipe, torch.device("cuda"))
    [record] = caplog.records
    said = record.getMessage()
    assert "weights, gradients and optimizer take at least 1.0 GiB, and cuda has 1.0 GiB" in said
    assert "train_use_lora = True or model_dtype = 'bf16' or train_use_8bit_adam = True" in said


def test_a_trainer_says_it_before_anything_is_moved(monkeypatch, caplog, tmp_path):
    from dpok_trl import DPOKTrainer

    pipe = stable_diffusion()
    monkeypatch.setattr(memory, "total_memory", lambda device: 1000)

    def moved(self, *args, **kwargs):
        raise RuntimeError("moved")

    monkeypatch.setattr(type(pipe), "to", moved)
    with pytest.raises(RuntimeError, match="moved"):
        DPOKTrainer(DPOKConfig(output_dir=str(tmp_path)), "jpeg-compressibility", ["a cat"], pipe)
    assert any("this will run out of memory" in record.getMessage() for record in caplog.records)


def test_a_cpu_has_no_such_limit():
    assert memory.total_memory(torch.device("cpu")) is None
