import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from datasets import Image as ImageFeature
from datasets import load_dataset
from PIL import Image

from dpok_trl.results.pictures import fit_cell, font, picture_grid, shorten, to_pil, wrap
from dpok_trl.results.runlog import RunLog, format_reward, read_metrics
from dpok_trl.results.samples import Samples, read_samples, sampled_epochs


def test_what_is_logged_is_read_back(tmp_path):
    log = RunLog(tmp_path / "run")
    log.log({"loss": 0.1, "epoch": 0}, step=1)
    log.log({"loss": np.float32(0.25), "epoch": np.int64(1), "step": 2}, step=2)
    assert read_metrics(tmp_path / "run") == [
        {"step": 1, "loss": 0.1, "epoch": 0},
        {"step": 2, "loss": 0.25, "epoch": 1},
    ]


def test_nan_stays_nan(tmp_path):
    RunLog(tmp_path).log({"loss": math.nan, "kl": math.inf}, step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": NaN, "kl": Infinity}\n'
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["loss"]) and line["kl"] == math.inf


def test_values_that_are_no_numbers_are_refused(tmp_path):
    log = RunLog(tmp_path)
    with pytest.raises(TypeError, match="the metric loss must be a number.*Tensor"):
        log.log({"loss": torch.zeros(2)}, step=1)
    with pytest.raises(ValueError, match="say step 3, but they are logged for step 1"):
        log.log({"step": 3}, step=1)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path):
    RunLog(tmp_path).log({"loss": 1.0}, step=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    RunLog(tmp_path).log({"loss": 2.0}, step=2)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', "[1]", '{"loss": 3}', ""])
def test_a_torn_line_in_the_middle_is_an_error_with_its_number(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + torn + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not"):
        read_metrics(tmp_path)


def test_keep_epochs_drops_later_epochs(tmp_path):
    log = RunLog(tmp_path)
    log.keep_epochs(5, step=10)  # nothing there yet
    for epoch in (0, 1, 2):
        log.log({"reward": 0.5, "epoch": epoch}, step=2 * epoch)  # at the step at which the epoch before ended
        log.log({"of a hook": 1.0}, step=2 * epoch)
        log.log({"loss": math.nan, "epoch": epoch}, step=2 * epoch + 1)
        log.log({"loss": math.nan, "epoch": epoch}, step=2 * epoch + 2)
    log.keep_epochs(2, step=4)
    assert [(line.get("epoch"), line["step"]) for line in read_metrics(tmp_path)] == [
        (0, 0), (None, 0), (0, 1), (0, 2), (1, 2), (None, 2), (1, 3), (1, 4)
    ]  # fmt: skip
    assert math.isnan(read_metrics(tmp_path)[2]["loss"])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def make_samples(pictures, prompts, rewards, epoch=0, **each) -> Samples:
    count = len(pictures)
    return Samples(pictures, prompts, rewards, each, list(range(count)), [None] * count, epoch, step=0)


def test_grid_of_small_pictures(tmp_path):
    first = Image.new("RGB", (32, 32))
    first.putpixel((0, 0), (255, 0, 0))
    pictures = [first] + [Image.new("RGB", (32, 32))] * 15
    samples = make_samples(pictures, ["a circle"] * 16, [float(n) for n in range(16)], epoch=7)
    grid = RunLog(tmp_path).log_samples(samples)
    assert Image.open(tmp_path / "samples" / "epoch-0007.png").size == grid.size
    # 2 rows of 8 pictures of 4 * 32 pixels, 10 apart; a title, and one caption line
    assert grid.size == (10 + 8 * 138, 36 + 2 * (128 + 17 + 10))
    pixels = np.asarray(grid)
    assert (pixels[36:40, 10:14] == (255, 0, 0)).all() and (pixels[40, 10] == 0).all()


def test_grid_with_several_prompts_has_them_in_the_captions(tmp_path):
    pictures = [Image.new("RGB", (48, 64))] * 2
    grid = RunLog(tmp_path).log_samples(make_samples(pictures, ["a", "two words" * 20], [0.5, math.nan]))
    # pictures of 96x128 (twice their size), a headline and two lines of text
    assert grid.size == (10 + 2 * 106, 36 + 128 + 3 * 17 + 10)
    with pytest.raises(ValueError, match="there are 2 pictures and 1 prompts"):
        make_samples(pictures, ["a"], [0.5, 0.5])


def test_samples_are_read_back(tmp_path):
    picture = Image.new("RGB", (6, 4), (255, 0, 0))
    samples = Samples(
        [picture, Image.new("RGB", (6, 4))], ["a cat", "„zwei“ dogs"], [0.5, math.nan],
        {"clip": [0.25, None], "ocr.v2": [1.0, math.nan]}, [2**63 - 1, 0], ["animals", None], epoch=3, step=12,
    )  # fmt: skip
    RunLog(tmp_path).log_samples(samples)
    assert [path.name for path in (tmp_path / "samples.parquet").iterdir()] == ["epoch-0003.parquet"]
    first, second = read_samples(tmp_path, 3)
    assert np.array_equal(np.asarray(first.pop("image")), np.asarray(picture))
    assert first == {
        "epoch": 3, "step": 12, "prompt": "a cat", "reward": 0.5, "rewards/clip": 0.25, "rewards/ocr.v2": 1.0,
        "seed": 2**63 - 1, "category": "animals",
    }  # fmt: skip
    assert second["prompt"] == "„zwei“ dogs" and second["category"] is None
    # what does not apply is nothing, and what failed is NaN
    assert math.isnan(second["reward"]) and second["rewards/clip"] is None and math.isnan(second["rewards/ocr.v2"])
    with pytest.raises(FileNotFoundError):
        read_samples(tmp_path, 4)


def test_samples_load_as_a_dataset_and_as_a_frame(tmp_path):
    for epoch in (0, 1, 10):
        picture = Image.new("RGB", (8, 8), (epoch, 0, 0))
        RunLog(tmp_path).log_samples(make_samples([picture] * 2, ["a", "b"], [0.0, 1.0], epoch))
    folder = str(tmp_path / "samples.parquet")
    dataset = load_dataset("parquet", data_dir=folder, split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset["epoch"] == [0, 0, 1, 1, 10, 10] and dataset["prompt"] == ["a", "b"] * 3
    assert dataset.features["image"] == ImageFeature()
    assert [row["image"].getpixel((0, 0))[0] for row in dataset] == [0, 0, 1, 1, 10, 10]
    assert pd.read_parquet(folder)["reward"].tolist() == [0.0, 1.0] * 3


def test_large_samples_are_kept_smaller(tmp_path):
    RunLog(tmp_path).log_samples(make_samples([Image.new("RGB", (1024, 512))], ["a"], [1.0]))
    (row,) = read_samples(tmp_path, 0)
    assert row["image"].size == (512, 256)


def test_a_file_that_was_being_written_is_no_sample(tmp_path):
    log = RunLog(tmp_path)
    log.log_samples(make_samples([Image.new("RGB", (8, 8))], ["a"], [1.0]))
    (tmp_path / "samples.parquet" / ".epoch-0001.unfinished").write_bytes(b"PAR1 and no more")
    assert sampled_epochs(tmp_path) == [0]
    assert len(pd.read_parquet(tmp_path / "samples.parquet")) == 1


def test_keep_epochs_drops_later_samples(tmp_path):
    log = RunLog(tmp_path)
    for epoch in range(4):
        log.log_samples(make_samples([Image.new("RGB", (8, 8))], ["a"], [1.0], epoch))
    (tmp_path / "samples" / "epoch-of-my-own.png").touch()
    log.keep_epochs(2, step=4)
    assert sampled_epochs(tmp_path) == [0, 1]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "epoch-0000.png", "epoch-0001.png", "epoch-of-my-own.png"
    ]  # fmt: skip


def test_config_has_no_secrets(tmp_path):
    RunLog(tmp_path).write_config(
        {
            "kl_weight": 0.02,
            "hub_token": "hf_abc",
            "tracker_kwargs": {"wandb": {"entity": "me", "API_KEY": "xyz"}, "swanlab": {"settings": {"apikey": "s3"}}},
            "sample_call_kwargs": {"max_token_length": 77},
        }
    )
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {
        "kl_weight": 0.02,
        "tracker_kwargs": {"wandb": {"entity": "me"}, "swanlab": {"settings": {}}},
        "sample_call_kwargs": {"max_token_length": 77},
    }


def test_cells():
    assert fit_cell(Image.new("RGB", (32, 16))).size == (128, 64)
    assert fit_cell(Image.new("RGB", (100, 200))).size == (100, 200)
    assert fit_cell(Image.new("RGB", (1024, 512))).size == (384, 192)
    with pytest.raises(ValueError, match="1 pictures, 0 captions"):
        picture_grid([Image.new("RGB", (8, 8))], [], 4)


def test_shortened_text_fits():
    assert shorten("a  green\ntriangle", 500, font(13)) == "a green triangle"
    cut = shorten("a very long prompt " * 9, 96, font(13))
    assert cut.endswith("…") and font(13).getlength(cut) <= 96 < font(13).getlength(cut[:-1] + "xx…")


def test_captions_wrap_between_words_and_lose_nothing_that_fits():
    lines = wrap("a red square and a blue circle", 128, font(13))
    assert " ".join(lines) == "a red square and a blue circle" and len(lines) == 2
    assert wrap("", 128, font(13)) == []
    (cut,) = wrap("x" * 99, 128, font(13))
    assert cut.endswith("…")


def test_pixels_are_rounded():
    images = torch.tensor([0.0, 1.0, 0.5, 127.4 / 255, 127.6 / 255, 1.5]).reshape(1, 1, 2, 3).expand(1, 3, 2, 3)
    assert np.asarray(to_pil(images)[0])[:, :, 0].tolist() == [[0, 255, 128], [127, 128, 255]]
    with pytest.raises(ValueError, match="3 of 3 pixel values are not finite"):
        to_pil(torch.full((1, 3, 1, 1), math.nan))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(3, 2, 2\)"):
        to_pil(torch.zeros(3, 2, 2))


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.00"), (0.826, "0.83"), (-1.378, "-1.38"), (0.00412, "0.00412"), (23456.0, "2.35e+04")]
)
def test_rewards_are_readable(value, text):
    assert format_reward(value) == text
    assert format_reward(math.nan) == "nan"


def test_a_ddpo_image_hook_works_without_a_tracker(tmp_path):
    log = RunLog(tmp_path)
    log.log_images(
        {"a cat / 7 | 0.50": torch.rand(1, 3, 8, 8), "two": torch.rand(2, 3, 8, 8), "a b": torch.rand(3, 8, 8)},
        step=12,
    )
    log.log_images({"x": torch.rand(3, 8, 8)})
    assert sorted(path.name for path in (tmp_path / "samples" / "hook").iterdir()) == [
        "00-x.png",
        "step-000012-00-a-cat-7-0.50.png",
        "step-000012-01-two-00.png",
        "step-000012-01-two-01.png",
        "step-000012-02-a-b.png",
    ]


def test_a_hook_may_log_arrays_and_pictures(tmp_path):
    tensor = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    last = tensor.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(one) for one in last]
    log = RunLog(tmp_path)
    given = {
        "tensors": tensor, "first": tensor.numpy(), "last": last, "floats": last / 255, "one": last[0], "list": list(last),
        "pil": pictures[0], "pils": pictures, "mixed": [pictures[0], tensor[1]],
    }  # fmt: skip
    log.log_images(given)
    folder = tmp_path / "samples" / "hook"
    for index, name in enumerate(given):
        paths = sorted(folder.glob(f"{index:02d}-{name}*.png"))
        assert len(paths) == (1 if name in ("one", "pil") else 2)
        for path, expected in zip(paths, last, strict=False):
            assert np.array_equal(np.asarray(Image.open(path)), expected), name
    for wrong, words in [
        (torch.rand(5, 5), r"a Tensor of shape \(5, 5\) and torch.float32 for 'x'"),
        (np.zeros((4, 5, 3), dtype=np.int64), r"a ndarray of shape \(4, 5, 3\) and int64"),
        ("a.png", "a str for 'x'"),
        ([pictures[0], None], "a NoneType for 'x'"),
    ]:
        with pytest.raises(TypeError, match=f"log_images got {words}.* and lists of these"):
            log.log_images({"x": wrong})


def test_lines_are_plain_json_when_finite(tmp_path):
    RunLog(tmp_path).log({"time/rollout": 1.5}, step=1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "time/rollout": 1.5}


def test_objects_that_no_file_can_hold_are_named_in_the_config(tmp_path):
    settings = {"seed": 3, "sample_call_kwargs": {"height": 64, "image": Image.new("RGB", (4, 4))}}
    RunLog(tmp_path).write_config(settings)
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert text.startswith(
        "# Not in this file, which cannot hold them: sample_call_kwargs.image. Give them in Python.\n"
    )
    assert yaml.safe_load(text) == {"seed": 3, "sample_call_kwargs": {"height": 64}}
