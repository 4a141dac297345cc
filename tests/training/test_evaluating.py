"""Evaluation in a run: its numbers, what it costs, what it warns of, and that the training is the same with and without it."""

import dataclasses
import math
import os
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import nudge, stable_diffusion

from dpok_trl import DPOKSFTConfig, DPOKSFTTrainer, RewardError
from dpok_trl.results.drawing import EvaluationSampler, ModelSamples
from dpok_trl.results.evaluation import Comparison, Evaluation, evaluate
from dpok_trl.results.runlog import read_metrics
from dpok_trl.rewards.wrappers import Clipped, Standardized
from dpok_trl.training.overoptimisation import Snapshot, over_optimisation, stronger_kl


SETS = {"training": ["a cat"], "held-out": ["a fox", "an owl"]}
EVALUATED = {"eval_prompts": SETS, "eval_freq": 1, "eval_num_images_per_prompt": 2, "sample_num_steps": 2}


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)), {}


def green(images, prompts, metadata):
    return images[:, 1].mean((1, 2)), {}


def restless(images, prompts, metadata):
    """Draws from every global generator."""
    torch.rand(7), np.random.rand(7), random.random()
    return images[:, 1].mean((1, 2))


def random_prompt():
    return random.choice(["a cat", "two dogs", "3 birds"]), {}


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_a_run_logs_every_set_and_reward(make_trainer, lines):
    trainer = make_trainer(eval_reward_function=green, num_epochs=3, **{**EVALUATED, "eval_freq": 2})
    trainer.train()
    logged = lines(trainer, "eval/training/kl")
    assert [line["epoch"] for line in logged] == [1, 2]  # every second one, and the end
    assert [line["step"] for line in logged] == [2, 3]
    assert logged[1].keys() - {"step", "epoch", "time/evaluation"} == {
        *(f"eval/{where}/{reward}/{part}" for where in SETS for reward in ("red", "green") for part in ("base", "tuned", "difference")),
        *(f"eval/{where}/{name}" for where in SETS for name in ("kl", "diversity")),
    }  # fmt: skip
    again = trainer.evaluate()
    assert {name: value for name, value in logged[1].items() if name.startswith("eval/")} == again.metrics()
    alone = evaluate(
        trainer.policy, SETS, trainer.reward_fn, held_out_rewards=green, images_per_prompt=2, batch_size=4
    )
    assert alone.metrics() == again.metrics() and alone.table() == again.table()
    assert logged[0]["eval/held-out/green/base"] == logged[1]["eval/held-out/green/base"]
    assert logged[1]["eval/training/kl"] > 0
    files = sorted(path.name for path in (trainer.output_dir / "evaluation").iterdir())
    assert files == ["evaluation.json", "evaluation.md", "grid.png", "samples"]


def test_the_pretrained_model_is_drawn_once(make_trainer, monkeypatch):
    drawn, sample = [], EvaluationSampler.sample
    monkeypatch.setattr(
        EvaluationSampler,
        "sample",
        lambda self, prompts, **kwargs: drawn.append((prompts.name, kwargs["pretrained"])) or sample(self, prompts, **kwargs),
    )  # fmt: skip
    trainer = make_trainer(num_epochs=2, **EVALUATED)
    trainer.train()
    tuned = [("training", False), ("held-out", False)]
    assert sorted(drawn) == sorted([*tuned, *tuned, ("training", True), ("held-out", True)])
    drawn.clear()
    trainer.evaluate(sets=["held-out"])
    assert drawn == [("held-out", False)]
    trainer.reward_fn = green  # which the kept images were not asked about
    assert list(trainer.evaluate(sets=["training"]).sets["training"].base.scores) == ["green"]
    drawn.clear()
    trainer.evaluate(["a hen"])
    assert drawn == [("prompts", False), ("prompts", True)]


def test_other_settings_for_one_evaluation(make_trainer):
    trainer = make_trainer(**EVALUATED, eval_num_steps=3)
    calls = []
    trainer.policy.networks["unet"].register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    usual = trainer.evaluate(sets=["training"])
    assert usual.call["num_inference_steps"] == 3
    assert (
        calls == [4] * 3 + [4] * 6 + [4] * 3
    )  # guided: the tuned images, two replays for the KL, the pretrained images
    other = trainer.evaluate(["a hen"], {"g": green}, images_per_prompt=3, num_steps=2, batch_size=1, seed=5)
    assert other.call["num_inference_steps"] == 2
    assert other.sets["prompts"].seeds == [5, 6, 7] and other.sets["prompts"].held_out == ("g",)
    assert calls[12:] == [2] * 3 * (2 + 4 + 2)


# --- nothing of the training changes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"mixed_precision": "bf16"}, {"train_use_lora": False}])
def test_the_training_is_bit_for_bit_the_same(make_trainer, adapter, tmp_path, settings):
    ends = []
    common = {"num_epochs": 2, "sample_num_steps": 2, "train_learning_rate": 0.01, **settings}
    for name, evaluation in (
        ("without", {}),
        ("with", {**EVALUATED, "eval_num_steps": 3, "eval_reward_function": {"other": restless}}),
    ):
        random.seed(3)
        trainer = make_trainer(restless, random_prompt, output_dir=str(tmp_path / name), **{**common, **evaluation})
        trainer.train()
        trained = [
            {key: value for key, value in line.items() if not key.startswith("time/") and not key.endswith("seconds")}
            for line in read_metrics(trainer.output_dir)
            if "time/evaluation" not in line
        ]
        ends.append((adapter(trainer), trained, torch.rand(3), np.random.rand(), random.random()))
    without, with_ = ends
    assert all(torch.equal(value, with_[0][key]) for key, value in without[0].items())
    assert without[1] == with_[1]
    assert torch.equal(without[2], with_[2]) and without[3:] == with_[3:]


def test_a_resumed_run_logs_the_same_evaluations(make_trainer, tmp_path):
    logged = {}
    for name, parts in (("whole", [4]), ("resumed", [2, 4])):
        for epochs in parts:
            trainer = make_trainer(output_dir=str(tmp_path / name), num_epochs=4, save_freq=1, **EVALUATED)
            trainer.train(epochs=epochs, resume_from_checkpoint=parts[0] < epochs)
        logged[name] = [
            {key: value for key, value in line.items() if key != "time/evaluation"}
            for line in read_metrics(tmp_path / name)
            if "eval/training/kl" in line
        ]
    assert len(logged["whole"]) == 4 and logged["whole"] == logged["resumed"]
    assert ["eval/over_optimisation" in line for line in logged["whole"]] == [False, False, True, True]


def test_a_moved_reference_is_not_what_is_compared_with(make_trainer, lines):
    trainer = make_trainer(
        num_epochs=2, reference_update_epochs=1, train_learning_rate=0.01, train_num_inner_epochs=2, **EVALUATED
    )
    trainer.train()
    first, second = lines(trainer, "eval/training/kl")
    assert trainer.tuned.moved_reference is not None
    assert first["eval/training/red/base"] == second["eval/training/red/base"]
    assert second["eval/training/kl"] == trainer.evaluate().sets["training"].kl.mean > 0


def test_rewards_that_are_kept_off_the_device_are_on_it_only_to_judge(make_trainer, record_to):
    class Network(torch.nn.Module):
        def forward(self, images, prompts, metadata):
            return images[:, 0].mean((1, 2))

    trained, held_out = Network(), Network()
    trainer = make_trainer(
        {"trained": trained}, eval_reward_function={"other": held_out}, reward_offload=True, **EVALUATED
    )
    sent = record_to(trained), record_to(held_out)
    trainer.evaluate(sets=["training"], batch_size=1)
    device, cpu = trainer.accelerator.device, torch.device("cpu")
    assert sent == ([device, cpu] * 2, [device, cpu] * 2)  # for the tuned images, and for the pretrained ones


def test_the_supervised_arm_is_evaluated_too(make_config, lines):
    config = DPOKSFTConfig(
        **{
            **dataclasses.asdict(make_config(eval_freq=1, eval_num_images_per_prompt=2)),
            "sample_num_steps": 2,
            "sft_kl": "kl_o",
            "sft_gamma": 0.25,
        }
    )
    trainer = DPOKSFTTrainer(config, red, ["a cat"], stable_diffusion(), eval_prompts=SETS)
    trainer.train()
    (line,) = lines(trainer, "eval/held-out/red/tuned")
    assert line["eval/held-out/kl"] > 0
    assert stronger_kl(trainer) == "raise sft_gamma (now 0.25)"
    trainer.config.sft_kl = "none"
    assert stronger_kl(trainer) == "set sft_kl to 'kl_d' or 'kl_o' (now 'none')"


def test_the_advice_is_of_the_kl_that_the_run_has(make_trainer):
    assert stronger_kl(make_trainer(kl_weight=0.5)) == "raise kl_weight (now 0.5)"
    assert stronger_kl(make_trainer(target_kl=4.0)) == "lower target_kl (now 4)"


PICTURES = 5  # from here on, in what evaluate_two_processes.py keeps of a set


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What one process found, and what each of two did."""
    folder = tmp_path_factory.mktemp("evaluation")
    script = Path(__file__).parent / "evaluate_two_processes.py"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*command, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=150
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    alone, _ = runpy.run_path(str(script))["everything"](folder / "alone")
    return [alone, *(torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1))]


@pytest.mark.parametrize("name", ["alone", "with a group"])
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_find_what_one_does(ranks, name, rank):
    (expected, table), (found, text) = ranks[0][name], ranks[1 + rank][name]
    assert text == table
    for where, values in expected.items():
        for column, (ours, theirs) in enumerate(zip(values, found[where], strict=True)):
            if isinstance(ours, dict):
                assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
            elif column >= PICTURES and rank > 0:
                assert theirs is None  # they are sent to the main process only
            else:
                assert torch.equal(ours, theirs)
    assert (expected["held-out"][2] > 0).all()


def test_both_processes_log_the_same(ranks):
    _, zero, one = ranks
    assert zero["metrics"] == one["metrics"] and "eval/held-out/red/tuned" in zero["metrics"]


def test_a_reward_that_fails_in_one_process_stops_both(ranks):
    _, zero, one = ranks
    message = "the reward function fails_on_the_last raised ConnectionError: no route to host"
    assert one["fails"] == message and zero["fails"] == f"process 1 failed with RewardError: {message}"


# --- over-optimisation ------------------------------------------------------------------------------------------------


def scored(**scores) -> Evaluation:
    """An evaluation of one prompt and four images a set: `set__reward=[four scores]`."""
    sets = {}
    for name in dict.fromkeys(key.split("__")[0] for key in scores):
        found = {
            key.split("__")[1]: torch.tensor(value) for key, value in scores.items() if key.split("__")[0] == name
        }
        nothing = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
        drawn = ModelSamples(found, dict.fromkeys(found, 0), None, torch.zeros(4), nothing)
        held_out = tuple(reward for reward in found if reward != "red")
        sets[name] = Comparison(["a"] * 4, [0, 1, 2, 3], 4, None, held_out, [], drawn, drawn)
    return Evaluation(sets, {})


def snapshot(epoch, **scores) -> Snapshot:
    return Snapshot.of(scored(**scores), epoch, 10 * epoch)


LOW, HIGH = [0.0, 0.1, 0.2, 0.3], [0.5, 0.6, 0.9, 0.8]  # apart by 0.5, 0.5, 0.7 and 0.5


def judged(before, after, weights={"red": 1.0}):  # noqa: B006
    return over_optimisation(snapshot(3, **before), snapshot(9, **after), weights, "raise kl_weight (now 0.02)")


def test_a_held_out_reward_that_falls_while_the_trained_one_rises_is_told():
    message = judged({"x__red": LOW, "x__green": HIGH}, {"x__red": HIGH, "x__green": LOW})
    assert "red on x from 0.150 to 0.700 (by 0.550 ± 0.050)" in message
    assert "green on x from 0.700 to 0.150 (by -0.550 ± 0.050)" in message
    assert (
        "between epoch 3 and epoch 9" in message
        and "Then raise kl_weight (now 0.02), add" in message
        and "step 30" in message
    )


def test_held_out_prompts_count_where_there_are_training_prompts():
    falls = {"training__red": LOW, "other__red": HIGH}, {"training__red": HIGH, "other__red": LOW}
    assert "red on other from 0.700" in judged(*falls)
    # of two sets of which none is trained on, nobody can tell
    names = [{key.replace("training", "third"): value for key, value in one.items()} for one in falls]
    assert judged(*names) is None


@pytest.mark.parametrize(
    ("trained", "held_out", "weight", "found"),
    [
        ((LOW, HIGH), (LOW, HIGH), 1.0, False),  # both rise
        ((HIGH, LOW), (HIGH, LOW), 1.0, False),  # both fall
        ((HIGH, LOW), (HIGH, LOW), -1.0, True),  # it is trained to fall
        ((LOW, LOW), (HIGH, LOW), 1.0, False),
        ((LOW, HIGH), (LOW, [0.0, 0.1, 0.2, 0.29]), 1.0, False),  # by its standard error
        ((LOW, HIGH), (LOW, [-0.01, 0.1, 0.19, 0.28]), 1.0, True),  # by 0.0100 ± 0.0041
        ((LOW, HIGH), (LOW, [value - 0.25 for value in LOW]), 1.0, True),  # all alike: no error
        ((LOW, [value + 1 for value in LOW]), ([math.nan, 0.1, 0.2, 0.3], [9.0, 0.0, 0.0, 0.0]), 1.0, True),
        ((LOW, HIGH), ([math.nan] * 4, LOW), 1.0, False),
    ],
)
def test_both_must_change_by_more_than_their_errors(trained, held_out, weight, found):
    before, after = ({"x__red": red, "x__green": green} for red, green in zip(trained, held_out, strict=True))
    assert (judged(before, after, {"red": weight}) is not None) == found


def test_a_run_warns_once_for_each_event(make_trainer, monkeypatch, caplog, lines):
    good, bad = (scored(x__red=red, x__green=green) for red, green in ((LOW, HIGH), (HIGH, LOW)))
    course = [good, good, bad, bad, bad, good, bad, bad, bad]
    expected = [1, 1, 0, 0, 0, 1, 0]  # each against the one two before
    trainer = make_trainer(num_epochs=len(course), eval_reward_function=green, **EVALUATED)
    monkeypatch.setattr(Evaluation, "save", lambda *args: None)
    monkeypatch.setattr("dpok_trl.training.evaluating.evaluation_grid", lambda evaluation: None)
    shown = iter(course)
    monkeypatch.setattr(trainer.evaluator, "evaluate", lambda: next(shown))
    trainer.train()
    kept = [value for one in trainer.evaluator._history for value in vars(one).values()]
    assert not [value for value in kept if isinstance(value, (Evaluation, Comparison, ModelSamples))]
    assert [line["eval/over_optimisation"] for line in lines(trainer, "eval/over_optimisation")] == expected
    warnings = [record.message for record in caplog.records if "over-optimisation: between" in record.message]
    assert [message[:49] for message in warnings] == [
        "over-optimisation: between epoch 0 and epoch 2 wh",
        "over-optimisation: between epoch 5 and epoch 7 wh",
    ]


def test_every_metric_of_an_evaluation_is_documented(make_trainer):
    trainer = make_trainer(num_epochs=3, eval_reward_function=green, **EVALUATED)
    trainer.train()
    last = read_metrics(trainer.output_dir)[-1]
    names = {
        re.sub("^eval/(training|held-out)/", "eval/<set>/", name) for name in last if name not in ("step", "epoch")
    }
    names = {re.sub("/(red|green)/", "/<reward>/", name) for name in names}
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = page.partition("| evaluation metric |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([^`]+)` \|", table, re.M)) == names


# --- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_freq": 2}, "eval_freq = 2 asks for evaluations while training, and there are no prompts"),
        ({"eval_prompts": {"held-out": ["a fox", "two dogs"]}}, "1 of the 2 prompts of the set 'held-out' are trained on: 'two dogs'"),
        ({"eval_prompts": {"held-out": []}}, "the prompts of the set 'held-out': .*empty"),
        ({**EVALUATED, "eval_reward_function": {"red": green}}, "red is trained on and among the held-out rewards"),
        ({**EVALUATED, "reward": Clipped(Standardized(green), 0, 1)}, "standardised by running statistics"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_at_the_start(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)


def test_evaluate_refuses_what_it_has_not(make_trainer):
    trainer = make_trainer(eval_prompts=SETS)
    with pytest.raises(
        ValueError, match="no set of prompts 'heldout'. Did you mean 'held-out'. There are: training, held-out"
    ):
        trainer.evaluate(sets=["heldout"])
    with pytest.raises(ValueError, match="there are no prompts to evaluate on"):
        make_trainer().evaluate()


def test_the_prompts_of_a_function_are_not_known(make_trainer):
    held_out = {"held-out": ["a cat"]}  # which the function returns now and then
    trainer = make_trainer(prompts=random_prompt, eval_prompts=held_out)
    assert trainer.prompts.listed is None and [one.prompts for one in trainer.evaluator.sets] == [("a cat",)]
    with pytest.raises(ValueError, match="1 of the 1 prompts of the set 'held-out' are trained on"):
        make_trainer(eval_prompts=held_out)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"held-out": ["a fox", "A  cat"]}, "1 of the 2 prompts of the set 'held-out' are trained on: 'A  cat'"),
        ({"training": ["a fox"]}, "no prompt of the set 'training' is trained on"),
    ],
)
def test_prompts_for_one_evaluation_are_checked_too(make_trainer, prompts, message):
    with pytest.raises(ValueError, match=message):
        make_trainer().evaluate(prompts)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"sets": "hold-out"}, ValueError, "no set of prompts 'hold-out'. Did you mean 'held-out'"),
        ({"num_steps": 0}, ValueError, "num_steps = 0, but an evaluation needs a whole number of at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size = 0, but"),
        ({"images_per_prompt": "4"}, ValueError, "images_per_prompt = '4', but"),
        ({"rewards": red}, TypeError, "no argument 'rewards'. Did you mean 'reward_function'. It takes: prompts, reward_function, sets"),
        ({"images": 4}, TypeError, "no argument 'images'. Did you mean 'images_per_prompt'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_told_by_their_names(make_trainer, settings, kind, message):
    with pytest.raises(kind, match=message):
        make_trainer(eval_prompts=SETS).evaluate(**settings)


def test_one_set_by_its_name(make_trainer):
    trainer = make_trainer(eval_prompts=SETS, sample_num_steps=2)
    evaluation = trainer.evaluate(sets="held-out", images_per_prompt=1)
    assert list(evaluation.sets) == ["held-out"]
    assert {name: evaluation.about[name] for name in ("model", "epoch", "step")} == {
        "model": "run",
        "epoch": 0,
        "step": 0,
    }


def test_an_evaluation_of_a_tuned_policy_without_training(make_trainer):
    trainer = make_trainer(sample_num_steps=2)
    nudge(trainer.policy.networks)
    assert trainer.evaluate(["a cat"], images_per_prompt=2).sets["prompts"].kl.mean > 0
    assert trainer.global_step == 0 and not (trainer.output_dir / "metrics.jsonl").exists()


def test_what_was_trained_is_saved_where_an_evaluation_fails(make_trainer):
    def fails(images, prompts, metadata):
        raise ConnectionError("no route to host")

    trainer = make_trainer(save_freq=0, eval_freq=1, eval_prompts=["a dog"], eval_reward_function=fails)
    with pytest.raises(RewardError, match="no route to host"):
        trainer.train()
    assert [path.name for path in trainer.output_dir.glob("checkpoint-*")] == [f"checkpoint-{trainer.global_step}"]
