"""What a process of test_interruption.py does: `python interrupted.py FOLDER MODE`, also under torchrun; not collected by pytest."""

import json
import os
import signal
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401  (offline, one thread)
from tiny import stable_diffusion
from transformers import TrainerCallback

from dpok_trl import DPOKConfig, DPOKTrainer


FOLDER, MODE = Path(sys.argv[1]), sys.argv[2]
RUN = {"save_freq": 0, "sample_grid_freq": 0, "sample_num_steps": 2, "sample_batch_size": 2, "sample_num_batches_per_epoch": 1}  # fmt: skip


class Telling(TrainerCallback):
    """Says where the run is, for the test to send its signal in the middle of an epoch."""

    def on_step_begin(self, args, state, control, **kwargs):
        print(f"in epoch {int(state.epoch)}", flush=True)


class Signalled(TrainerCallback):
    """Process 1 gets a SIGTERM in the second epoch."""

    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 1 and int(state.epoch) == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Asking(TrainerCallback):
    """Process 1 asks for an early end of the second epoch, and of the run in the third."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1:
            control.should_epoch_stop = state.global_step == 3
            control.should_training_stop = state.global_step == 4


class Failing(TrainerCallback):
    """Fails in process 1."""

    def on_epoch_end(self, args, state, control, **kwargs):
        if args.process_index == 1:
            raise KeyError("no such row")


def dying(images, prompts, metadata):
    """A reward in whose second call process 1 is gone, without a word."""
    if trainer.accelerator.process_index == 1 and trainer.first_epoch == 1:
        os._exit(3)
    return images[:, 0].mean((1, 2)), {}


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)), {}


def make(name, reward=red, callbacks=(), **kwargs):
    config = DPOKConfig(output_dir=str(FOLDER / name), num_epochs=10_000, **{**RUN, **kwargs})
    return DPOKTrainer(config, reward, ["a cat", "two dogs"], stable_diffusion(), callbacks=callbacks)


def tell(trainer, **what):
    (FOLDER / f"{trainer.output_dir.name}-{trainer.accelerator.process_index}.json").write_text(json.dumps(what))


def interrupted(trainer):
    """Trains, and tells how it ended."""
    try:
        trainer.train()
    except KeyboardInterrupt as error:
        tell(trainer, message=str(error), epochs=trainer.first_epoch, steps=trainer.global_step)
        return error


if MODE == "dies":
    trainer = make("dies", dying, save_freq=1)
    trainer.train()
elif MODE == "signalled":
    trainer = make("asked", callbacks=[Asking])
    trainer.train()
    tell(trainer, epochs=trainer.first_epoch, steps=trainer.global_step)
    trainer = make("failed", callbacks=[Failing])
    try:
        trainer.train()
    except (KeyError, RuntimeError) as error:
        tell(trainer, error=f"{type(error).__name__}: {error}")
    interrupted(make("by rank 1", callbacks=[Signalled]))
    raise interrupted(make("by the launcher", callbacks=[Telling]))
else:
    make("alone", callbacks=[Telling]).train()
