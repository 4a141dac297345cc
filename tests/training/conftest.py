"""A trainer in a line: the tiny Stable Diffusion, four steps, one small batch."""

import dataclasses
import json

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from tiny import stable_diffusion

from dpok_trl import DPOKConfig, DPOKTrainer
from dpok_trl.results.runlog import read_metrics


PROMPTS = ["a cat", "two dogs", "3 birds"]
SMALL = {
    "num_epochs": 1,
    "save_freq": 0,
    "sample_grid_freq": 0,
    "sample_num_steps": 4,
    "sample_guidance_scale": 3.0,
    "sample_batch_size": 4,
    "sample_num_batches_per_epoch": 1,
    "train_batch_size": 4,
}


def red(images, prompts, metadata):
    """The mean of the red channel: a reward that depends on every pixel."""
    return images[:, 0].mean((1, 2)), {}


@dataclasses.dataclass
class Calls:
    """What a module was called with: rows of the batch, whether gradients were on, whether the adapter was off."""

    rows: list = dataclasses.field(default_factory=list)
    grad: list = dataclasses.field(default_factory=list)
    reference: list = dataclasses.field(default_factory=list)

    def __len__(self):
        return len(self.rows)

    def rows_where(self, *, grad: bool, reference: bool = False) -> list:
        kinds = zip(self.rows, self.grad, self.reference, strict=True)
        return [rows for rows, g, r in kinds if (g, r) == (grad, reference)]


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate keeps its state in singletons, and remembers mixed precision in the environment."""
    for name in ("ACCELERATE_MIXED_PRECISION", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    _forget()
    yield
    _forget()


def _forget():
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def no_page(request, monkeypatch):
    """The page of a run takes a quarter of a second to draw, and some thousand runs are trained here. test_tracking.py is about it."""
    if request.path.stem != "test_tracking":
        for module in ("trainer", "evaluating"):
            monkeypatch.setattr(f"dpok_trl.training.{module}.report", lambda trainer, *evaluation: None)


@pytest.fixture
def make_config(tmp_path):
    def make(**kwargs) -> DPOKConfig:
        return DPOKConfig(**{"output_dir": str(tmp_path / "run"), **SMALL, **kwargs})

    return make


@pytest.fixture
def make_trainer(make_config):
    """`make_trainer(**config)`: the arguments of the trainer itself are reward, prompts, pipe, hook and those in `own`."""

    def make(reward=red, prompts=PROMPTS, pipe=None, hook=None, **kwargs) -> DPOKTrainer:
        _forget()  # a test may make several trainers, of different precision
        pipe = stable_diffusion() if pipe is None else pipe
        names = ("peft_config", "pipeline_hooks", "eval_prompts", "eval_reward_function", "callbacks")
        own = {name: kwargs.pop(name) for name in names if name in kwargs}
        return DPOKTrainer(make_config(**kwargs), reward, prompts, pipe, hook, **own)

    return make


@pytest.fixture
def watch():
    """Records the calls of a module in [`Calls`]."""

    def start(module: torch.nn.Module) -> Calls:
        from dpok_trl.policy.lora import adapter_layers

        calls = Calls()

        def hook(module, args, kwargs):
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            calls.rows.append(tensors[0].shape[0])
            calls.grad.append(torch.is_grad_enabled())
            calls.reference.append(any(layer.disable_adapters for layer in adapter_layers(module)))

        module.register_forward_pre_hook(hook, with_kwargs=True)
        return calls

    return start


@pytest.fixture
def record_to():
    """Records where a module is sent: the list of the arguments of its `.to`, in order."""

    def start(module: torch.nn.Module) -> list:
        sent, to = [], module.to

        def recorded(*args, **kwargs):
            sent.append(torch.device(args[0]) if isinstance(args[0], str) else args[0])
            return to(*args, **kwargs)

        module.to = recorded
        return sent

    return start


@pytest.fixture
def adapter():
    """The trainable tensors of a trainer, copied."""

    def copy(trainer: DPOKTrainer) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in trainer.policy.named_parameters() if p.requires_grad}

    return copy


@pytest.fixture
def lines():
    """The lines of a run's metrics.jsonl that have all the given keys."""

    def read(trainer: DPOKTrainer, *keys: str) -> list[dict]:
        return [line for line in read_metrics(trainer.output_dir) if all(key in line for key in keys)]

    return read


@pytest.fixture
def write_json(tmp_path):
    def write(name: str, content) -> str:
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name)

    return write
