"""One short run of `dpok-trl train` on a tiny pipeline, for all tests of commands that need what a run leaves."""

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from tiny import stable_diffusion

from dpok_trl import cli


TINY = ["--num_epochs", "1", "--sample_num_steps", "2", "--sample_num_batches_per_epoch", "1"]
TINY += ["--sample_batch_size", "4", "--train_batch_size", "4", "--sample_guidance_scale", "1"]


def forget_accelerate():
    """Accelerate keeps its state in singletons."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(folder of the base pipeline, output folder of a run on it)."""
    folder = tmp_path_factory.mktemp("trained")
    stable_diffusion().save_pretrained(folder / "base")
    forget_accelerate()
    argv = ["train", "--model", str(folder / "base"), "--reward", "jpeg-incompressibility", "--prompts", "a cat"]
    argv += ["--output_dir", str(folder / "run"), "--train_learning_rate", "0.1", "--train_lora_rank", "2", *TINY]
    assert cli.main([*argv, "--debug"]) == 0
    forget_accelerate()
    return folder / "base", folder / "run"
