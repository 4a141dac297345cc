"""`dpok-trl evaluate`: what it loads, what it prints and leaves, and what it refuses."""

import json
import re
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from tiny import nudge, stable_diffusion
from walks import image

from dpok_trl import DPOKConfig, DPOKTrainer, cli, evaluate, load_tuned
from dpok_trl.commands import evaluate as command
from dpok_trl.policy.saved import find_model
from dpok_trl.policy.saved_policy import load_policy


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)), {}


def args_of(*argv):
    return cli.build_parser().parse_args(["evaluate", *map(str, argv)])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, and what four runs on it have left; by the kind of what was trained."""
    folder = tmp_path_factory.mktemp("evaluate")
    stable_diffusion().save_pretrained(folder / "base")
    runs = {}
    for kind, settings in {
        "lora": {},
        "text": {"train_text_encoder": True},
        "full": {"train_use_lora": False},
    }.items():
        for state in (AcceleratorState, PartialState):
            state._reset_state()
        GradientState._reset_state()
        config = DPOKConfig(
            output_dir=str(folder / kind),
            num_epochs=1,
            sample_grid_freq=0,
            sample_num_steps=2,
            sample_guidance_scale=3.0,
            sample_eta=0.5,
            negative_prompts="blurry",
            sample_batch_size=2,
            sample_num_batches_per_epoch=1,
            train_batch_size=2,
            **settings,
        )
        trainer = DPOKTrainer(config, red, ["a cat"], str(folder / "base"))
        trainer.pipeline.set_progress_bar_config(disable=True)
        nudge(trainer.policy.networks, 0.1)
        trainer.train()
        trainer.save_model(folder / f"{kind}-model")
        runs[kind] = trainer
    return folder, runs


@pytest.mark.parametrize("kind", ["lora", "text", "full"])
@pytest.mark.parametrize("of", ["model", "run"])
def test_what_a_run_left_is_evaluated_as_the_run_itself(world, tmp_path, capsys, kind, of):
    folder, runs = world
    model = folder / (f"{kind}-model" if of == "model" else kind)
    argv = [
        model,
        "--base",
        folder / "base",
        "--prompts",
        "a cat",
        "a dog",
        "--held-out-reward",
        "jpeg-compressibility",
    ]
    assert cli.main(["evaluate", *map(str, argv), "--images", "2", "--output", str(tmp_path / "out"), "--debug"]) == 0
    expected = evaluate(
        runs[kind].policy, {"training": ["a cat", "a dog"]}, held_out_rewards="jpeg-compressibility", images_per_prompt=2
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert f"\n{expected.table()}\n" in printed and str(tmp_path / "out") in printed
    assert expected.sets["training"].kl.mean > 0
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["call"] == {"num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "blurry"}
    about = {name: value for name, value in written["about"].items() if name not in ("date", "versions")}
    checkpoint = {} if of == "model" else {"checkpoint": "checkpoint-1", "epoch": 1, "step": 1}
    assert about == {"model": model.name, "base": "base", **checkpoint}
    table = (tmp_path / "out" / "evaluation.md").read_text()
    assert f"* model: {model.name}{', checkpoint-1, epoch 1, step 1' if checkpoint else ''}\n" in table
    assert str(folder) not in table + json.dumps(written)  # no folders of this machine


def test_options_win_over_the_settings_of_the_run(world, tmp_path):
    folder, _ = world
    argv = [folder / "lora-model", "--base", folder / "base", "--prompts", "a", "--reward", "jpeg-incompressibility"]
    argv += ["--steps", "3", "--guidance-scale", "1", "--seed", "9", "--images", "1", "--output", tmp_path]
    assert cli.main(["evaluate", *map(str, argv)]) == 0
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert (written["call"]["num_inference_steps"], written["call"]["guidance_scale"]) == (3, 1.0)
    assert written["sets"]["training"]["seeds"] == [9]
    # without the settings of a run, those of the pipeline
    plain = tmp_path / "plain"
    shutil.copytree(folder / "lora-model", plain)
    (plain / "dpok_config.json").unlink()
    policy = load_policy(folder / "base", plain, torch.device("cpu"))
    assert policy.call_kwargs == {} and policy.eta == 1.0
    with_settings = load_policy(folder / "base", folder / "lora-model", torch.device("cpu"))
    assert with_settings.eta == 0.5


@pytest.mark.parametrize("kind", ["lora", "text", "full"])
def test_without_a_base_it_is_what_the_run_was_trained_on(world, tmp_path, capsys, kind):
    folder, _ = world
    rest = ["--prompts", "a", "--reward", "jpeg-compressibility", "--images", "1", "--output"]
    assert cli.main(["evaluate", *map(str, [folder / kind, *rest, tmp_path / "one"])]) == 0
    assert f"Loading {folder / 'base'} and " in capsys.readouterr().out
    assert (
        cli.main(["evaluate", *map(str, [folder / f"{kind}-model", *rest, tmp_path / "two"])]) == 2
    )  # a card names no folder
    assert "says which pipeline this was trained on: give it with --base" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lora", "text", "full"])
def test_load_tuned_gives_the_pipeline_of_the_run(world, kind):
    folder, runs = world
    for loaded in (load_tuned(folder / kind), load_tuned(folder / f"{kind}-model", base=folder / "base")):
        assert torch.equal(image(loaded), image(runs[kind].pipeline))
    if kind == "full":  # a whole pipeline
        assert torch.equal(image(load_tuned(folder / "full-model")), image(runs[kind].pipeline))


def test_prompts_are_texts_files_and_shipped_lists(tmp_path):
    (tmp_path / "mine.txt").write_text("one\ntwo\n")
    (tmp_path / "more.csv").write_text("prompt,category\nthree,odd\n")
    argv = ["x", "--base", "y", "--prompts", "zero", tmp_path / "mine.txt", "--held-out", tmp_path / "more.csv", "--paraphrased", "demo"]  # fmt: skip
    sets = command.prompt_sets(args_of(*argv))
    assert sets["training"] == [("zero", {}), ("one", {}), ("two", {})]
    assert sets["held-out"] == [("three", {"category": "odd"})]
    assert "a green triangle" in dict(sets["paraphrased"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--reward", "demo-soft"], "no prompts were given: give those that were trained on with --prompts"),
        (["--prompts", "a"], "no reward was given: .* There are: image-reward, "),
        (["--prompts", "a", "--reward", "demo-sof"], "there is no reward named 'demo-sof'. Did you mean 'demo-soft'"),
        (["--prompts", "a", "--held-out", "a", "b"], "1 of the 2 prompts of the set 'held-out' are trained on: 'a'"),
        (["--prompts", "mine.txt"], "there is no file mine.txt"),
        (["--prompts", "a", "a", "--reward", "demo-soft"], "'a' stands 2 times in the set 'training'"),
        (["--prompts", "a", "--reward", "demo-soft", "--images", "0"], "--images = 0, but an evaluation needs a whole number of at least 1"),
        (["--prompts", "a", "--reward", "demo-soft", "demo-soft"], "the reward demo-soft is given 2 times"),
        (["--prompts", "a", "--reward", "demo-soft", "--held-out-reward", "demo-soft"], "the reward demo-soft is given 2 times"),
        (["--prompts", "a", "--reward", "demo-soft"], "there is no folder nowhere, and a Hub id has the form owner/name"),
    ],
)  # fmt: skip
def test_errors_are_one_line(capsys, argv, message):
    assert cli.main(["evaluate", "nowhere", "--base", "demo", *argv]) == 2
    assert re.match(f"dpok-trl evaluate: error: {message}", capsys.readouterr().err)


@pytest.mark.parametrize("file", ["evaluation.json", "evaluation.md", "grid.png", "samples/x.png"])
def test_another_evaluation_is_not_overwritten(tmp_path, capsys, file):
    (tmp_path / "out" / file).parent.mkdir(parents=True)
    (tmp_path / "out" / file).write_text("precious")
    argv = ["evaluate", "nowhere", "--prompts", "a", "--reward", "demo-soft", "--output", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert f"out holds another evaluation ({file.partition('/')[0]}). Give a new folder with --output" in error
    assert (tmp_path / "out" / file).read_text() == "precious"


def test_folders_without_weights_and_of_another_model(world, tmp_path, capsys):
    folder, _ = world
    with pytest.raises(
        FileNotFoundError, match="holds no model: no pytorch_lora_weights.safetensors, .* and no whole checkpoint"
    ):
        find_model(str(tmp_path))
    (tmp_path / "adapter.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="is a file. Give the folder"):
        find_model(str(tmp_path / "adapter.safetensors"))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "adapter_model.safetensors").touch()
    argv = [tmp_path, "--base", folder / "base", "--prompts", "a", "--reward", "jpeg-compressibility"]
    assert cli.main(["evaluate", *map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert (
        "nothing that was trained of this StableDiffusionPipeline: looked for pytorch_lora_weights.safetensors"
        in error
    )


def test_the_newest_checkpoint_of_a_run_is_taken(world):
    folder, _ = world
    assert find_model(str(folder / "lora")) == folder / "lora" / "checkpoint-1"
    assert find_model(str(folder / "full")) == folder / "full" / "checkpoint-1"
    assert find_model(str(folder / "full-model")) == folder / "full-model"


@pytest.mark.slow
def test_the_lora_of_a_demo(tmp_path, capsys):
    argv = ["demo", "--epochs", "2", "--images", "8", "--output", str(tmp_path / "run")]
    assert cli.main(argv) == 0
    first = json.loads((tmp_path / "run" / "evaluation.json").read_text())["sets"]["training"]
    lora = tmp_path / "run" / "lora"
    argv = [
        lora,
        "--base",
        "demo",
        "--prompts",
        "a green triangle",
        "--held-out",
        "demo-unseen",
        "--reward",
        "demo-soft",
    ]
    argv += ["--held-out-reward", "demo-exact", "--images", "8", "--batch-size", "64", "--output", tmp_path / "again"]
    assert cli.main(["evaluate", *map(str, argv)]) == 0
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())["sets"]
    assert again["training"]["rewards"]["demo-soft"]["tuned_values"] == first["rewards"]["soft"]["tuned_values"]
    assert again["training"]["path_kl"]["values"] == pytest.approx(first["path_kl"]["values"], rel=1e-4)
    assert again["held-out"]["categories"] is not None
