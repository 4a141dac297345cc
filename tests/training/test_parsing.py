"""`DPOKParser`: who wins among flags, file, preset and default, and what it says of mistakes; `ScriptArguments`."""

from dataclasses import dataclass, field

import pytest
import yaml

from dpok_trl import DPOKConfig, DPOKParser, DPOKSFTConfig, ScriptArguments
from dpok_trl.training.parsing import _EachKeyOnce
from dpok_trl.training.presets import PRESETS


BOTH = (ScriptArguments, DPOKConfig)


def parse(*args):
    return DPOKParser(BOTH).parse(args)


@pytest.fixture
def file(tmp_path):
    def write(content, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


# --- who wins ---------------------------------------------------------------------------------------------------------


def test_without_arguments_it_is_the_demo():
    script, config = parse()
    assert script == ScriptArguments("demo", ["demo-soft"], ["a green triangle"], preset="demo")
    assert config == DPOKConfig.preset("demo")


def test_flag_over_file_over_preset_over_default(file):
    path = file({"preset": "sd15-lora", "num_epochs": 7, "kl_weight": 0.5})
    _, config = parse("--model", "a/b", "--reward", "r", "--prompts", "p", "--config", path, "--kl_weight", "0.25")
    expected = DPOKConfig.preset("sd15-lora", num_epochs=7, kl_weight=0.25)
    assert config == expected
    assert PRESETS["sd15-lora"].values()["num_epochs"] != 7 != DPOKConfig().num_epochs  # all four differ
    assert config.sample_num_steps == 20 and config.train_adam_beta2 == DPOKConfig().train_adam_beta2


def test_a_flag_names_another_preset_than_the_file(file):
    _, config = parse("--config", file({"model": "demo", "preset": "ddpo"}), "--preset", "official-code")
    assert config == DPOKConfig.preset("official-code")


def test_settings_that_only_the_preset_makes_possible():
    """32 is no divisor of the default's 1 image: the config is built once, with everything."""
    _, config = parse("--train_batch_size", "32")
    assert (config.train_batch_size, config.sample_batch_size) == (32, 64)


def test_a_flag_turns_off_what_the_preset_turns_on(file):
    assert parse("--preset", "ddpo")[1].per_prompt_stat_tracking
    assert not parse("--preset", "ddpo", "--per_prompt_stat_tracking", "false")[1].per_prompt_stat_tracking
    assert not parse("--preset", "ddpo", "--no_train_adv_scale")[1].train_adv_scale
    assert parse("--preset", "official-code", "--config", file("model: demo\ntrain_adv_scale: true"))[
        1
    ].train_adv_scale


def test_without_a_preset_field_there_is_none(file):
    (config,) = DPOKParser((DPOKConfig,)).parse(["--config", file("num_epochs: 3"), "--seed=4"])
    assert config == DPOKConfig(num_epochs=3, seed=4)
    (config,) = DPOKParser((DPOKSFTConfig,)).parse(["--sft_kl", "kl_o"])
    assert config == DPOKSFTConfig(sft_kl="kl_o")


def test_a_file_may_give_what_a_script_requires(file):
    @dataclass
    class Needs:
        dataset: str = field(metadata={"help": "x"})

    needs, _ = DPOKParser((Needs, DPOKConfig)).parse(["--config", file("dataset: mine")])
    assert needs.dataset == "mine"


# --- files ------------------------------------------------------------------------------------------------------------


def test_values_of_a_file_get_the_type_of_their_field(file):
    path = file(
        "model: demo\ntrain_learning_rate: 1e-4\ntrain_adv_clip_max: .inf\nkl_weight: 1\nmixed_precision: no\nreward: demo-exact\n"
        "reward_weights: 2\nsample_call_kwargs: {height: 32}\ntarget_kl: null\nnum_epochs: '4'\n"
    )
    script, config = parse("--config", path)
    assert script.reward == ["demo-exact"] and config.reward_weights == [2.0]
    assert (config.train_learning_rate, config.train_adv_clip_max) == (1e-4, float("inf"))
    assert (config.mixed_precision, config.target_kl, config.num_epochs) == ("no", None, 4)
    assert config.sample_call_kwargs == {"height": 32} and type(config.kl_weight) is float


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("num_epoch: 3", "recipe.yaml: there is no setting 'num_epoch'. Did you mean num_epochs?"),
        ("qqq: 3", "recipe.yaml: there is no setting 'qqq'."),
        ("num_epochs: ten", "recipe.yaml: num_epochs = 'ten', but it must be a whole number."),
        ("num_epochs: 2.5", "recipe.yaml: num_epochs = 2.5, but it must be a whole number."),
        ("num_epochs: true", "recipe.yaml: num_epochs = True, but it must be a whole number."),
        ("num_epochs:", "recipe.yaml: num_epochs = None, but it must be a whole number."),
        ("train_lora_rank: [4]", "recipe.yaml: train_lora_rank = [4], but it must be a whole number or null."),
        ("train_cfg: 1", "recipe.yaml: train_cfg = 1, but it must be true or false."),
        ("run_name: 7", "recipe.yaml: run_name = 7, but it must be text (in quotes)."),
        ("reward_weights: [1, x]", "reward_weights = [1, 'x'], but it must be a list, each entry a number or null."),
        ("a: [1\nb: }", "recipe.yaml is no YAML: while parsing a flow sequence"),
        ("num_epochs: 1\nkl_weight: 0\nnum_epochs: 2", "recipe.yaml is no YAML: num_epochs stands in it 2 times"),
        ("just text", "recipe.yaml must hold settings as `name: value`, one on each line; it holds 'just text'."),
        ("preset: sd15", "there is no preset 'sd15'. Did you mean 'sd15-lora'?"),
        ("train_objective: dpo", "train_objective = 'dpo', but it must be one of dpok"),
        ("kl_weight: -1", "kl_weight = -1"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(file, content, words):
    with pytest.raises(ValueError) as error:
        parse("--config", file(content))
    assert words in str(error.value)


MERGES = {
    "a key beside the merge wins": "a: &a {height: 16, width: 16}\nb: {<<: *a, width: 32}",
    "whichever stands first": "a: &a {height: 16, width: 16}\nb: {width: 32, <<: *a}",
    "of several the first": "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: [*a, *b], z: 3}",
    "in two lines": "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc:\n  <<: *a\n  <<: *b\n  z: 3",
    "of a merged one": "a: &a {x: 1, y: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b, x: 3}",
    "of one whose own turn comes later": "a: {n: {m: &a {<<: {x: 1, y: 1}, x: 2}}}\nb: {<<: *a, y: 3}",
    "at the top": "<<: {x: 1, y: 1}\ny: 2",
    "a key that is an equals sign": "{=: 1, x: 2}",
}


@pytest.mark.parametrize("which", MERGES)
def test_merge_keys_are_read_as_yaml_reads_them(which):
    assert yaml.load(MERGES[which], _EachKeyOnce) == yaml.safe_load(MERGES[which])


def test_merge_keys_in_a_file_of_settings(file):
    path = file(
        "<<: {model: demo, num_epochs: 3, seed: 7}\nnum_epochs: 4\nsample_call_kwargs: {<<: {height: 16, width: 16}, width: 32}"
    )
    script, config = parse("--config", path)
    assert (script.model, config.num_epochs, config.seed) == ("demo", 4, 7)
    assert config.sample_call_kwargs == {"height": 16, "width": 32}


@pytest.mark.parametrize(
    "content",
    [
        "a: &a {width: 16, width: 16}\nb: {<<: *a}",
        "a: &a {height: 16}\nb: {<<: *a, width: 16, width: 32}",
        "a: {n: {m: &a {width: 1, width: 2}}}\nb: {<<: *a, width: 3}",
        "<<: {height: 16}\nwidth: 1\nwidth: 2",
    ],
)
def test_a_key_that_stands_twice_is_refused_beside_a_merge_too(content):
    with pytest.raises(yaml.YAMLError, match="width stands in it 2 times"):
        yaml.load(content, _EachKeyOnce)


def test_no_file():
    with pytest.raises(FileNotFoundError, match=r"^--config nowhere.yaml: that does not exist. Give a YAML file"):
        parse("--config", "nowhere.yaml")


def test_a_folder_is_no_file_of_settings(tmp_path):
    with pytest.raises(FileNotFoundError, match="that is a folder"):
        parse("--config", str(tmp_path))


def test_settings_without_a_model_are_not_those_of_the_demo(file):
    """What a run that was made in Python leaves."""
    path = file({"output_dir": "run", "num_epochs": 3})
    for more in ([], ["--reward", "ocr", "--prompts", "x"]):
        with pytest.raises(
            ValueError, match=r"recipe.yaml names no model, and neither does --model: give --model, --"
        ):
            parse("--config", path, *more)
    for model in (["--model", "a/b"], ["--model=a/b"]):
        script, config = parse("--config", path, *model, "--reward", "ocr", "--prompts", "x")
        assert (script.model, config.num_epochs) == ("a/b", 3)
    assert parse("--config", path, "--model", "demo")[0].model == "demo"


def test_none_is_no_choice_that_can_be_typed():
    printed = DPOKParser(BOTH).format_help()
    assert "None," not in printed and "{fp32,bf16,fp16}" in printed
    with pytest.raises(ValueError, match=r"invalid choice: 'fp8' \(choose from '?fp32"):
        parse("--model_dtype", "fp8")


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--num_epoch", "3"], "there is no setting --num_epoch. Did you mean --num_epochs?"),
        (["--num-epoch=3"], "there is no setting --num-epoch. Did you mean --num_epochs?"),
        (["3"], "'3' stands there without a setting that it belongs to."),
        (["--num_epochs", "ten"], "argument --num_epochs/--num-epochs: invalid int value: 'ten'"),
        (["--train_lora_rank", "x"], "argument --train_lora_rank/--train-lora-rank: invalid int value: 'x'"),
        (["--preset", "demoo"], "argument --preset: invalid choice: 'demoo'"),
        (["--config"], "argument --config: expected one argument"),
        (["--model", "a/b"], "--model a/b needs --reward, such as --reward image-reward."),
        (["--model", "a/b", "--reward", "ocr"], "--model a/b needs --prompts, such as --prompts"),
        (["--eval_reward", "ocr"], "--eval_reward is of use with --eval_prompts only"),
    ],
)
def test_what_is_wrong_with_flags_is_told(args, words):
    with pytest.raises(ValueError) as error:
        parse(*args)
    assert words in str(error.value)


def test_a_script_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        DPOKParser(BOTH, prog="train.py").parse_args_and_config(["--num_epoch", "3"])
    assert stop.value.code == 2
    line = "train.py: error: there is no setting --num_epoch. Did you mean --num_epochs?\n"
    assert capsys.readouterr() == ("", line)


def test_what_is_unknown_can_be_kept():
    *_, config, unknown = DPOKParser(BOTH).parse_known(["--num_processes", "2", "--num_epochs", "2", "--multi_gpu"])
    assert config.num_epochs == 2 and unknown == ["--num_processes", "2", "--multi_gpu"]


# --- the arguments of a script ----------------------------------------------------------------------------------------


def test_prompts_of_a_script(tmp_path):
    (tmp_path / "more.txt").write_text("a red square\nfour circles\n")
    script = ScriptArguments(prompts=["a blue cross", str(tmp_path / "more.txt")], eval_prompts=["demo"])
    assert script.training_prompts() == [("a blue cross", {}), ("a red square", {}), ("four circles", {})]
    held_out = script.evaluation_prompts()["held-out"]
    assert held_out[0] == ("a green triangle", {"category": "color"}) and len(held_out) == 4
    assert ScriptArguments().evaluation_prompts() is None
