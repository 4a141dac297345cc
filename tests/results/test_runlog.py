import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from PIL import Image

from dpok_trl.results import runlog
from dpok_trl.results.pictures import fit_cell, font, picture_grid, shorten, to_pil, wrap
from dpok_trl.results.runlog import RunLog, format_reward, log_images_to, read_metrics


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


def test_grid_of_small_pictures(tmp_path):
    images = torch.zeros(20, 3, 32, 32)
    images[0, 0, 0, 0] = 1.0  # one red pixel in the first
    grid = RunLog(tmp_path).sample_grid(images, ["a circle"] * 20, torch.arange(20.0), epoch=7)
    assert Image.open(tmp_path / "samples" / "epoch-0007.png").size == grid.size
    # 2 rows of 8 pictures of 4 * 32 pixels, 10 apart; a title, and one caption line
    assert grid.size == (10 + 8 * 138, 36 + 2 * (128 + 17 + 10))
    pixels = np.asarray(grid)
    assert (pixels[36:40, 10:14] == (255, 0, 0)).all() and (pixels[40, 10] == 0).all()


def test_grid_with_several_prompts_has_them_in_the_captions(tmp_path):
    grid = RunLog(tmp_path).sample_grid(torch.zeros(2, 3, 64, 48), ["a", "two words" * 20], [0.5, math.nan], epoch=0)
    # pictures of 96x128 (twice their size), a headline and two lines of text
    assert grid.size == (10 + 2 * 106, 36 + 128 + 3 * 17 + 10)
    with pytest.raises(ValueError, match="equally many, got 2, 1 and 2"):
        RunLog(tmp_path).sample_grid(torch.zeros(2, 3, 8, 8), ["a"], [0.5, 0.5], epoch=0)


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


def test_tensorboard_gets_the_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker("run", tmp_path)
    tracker.start()
    log_images_to([tracker], "samples", [Image.new("RGB", (6, 4), (255, 0, 0))] * 2, ["a", "b"], step=3)
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    (event,) = events.Images("samples")
    assert (event.step, event.width, event.height) == (3, 12, 4)  # side by side


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_with_an_image_type_get_a_list_of_it(monkeypatch, name):
    module = types.ModuleType(name)
    module.Image = lambda image, caption: ("Image", image, caption)
    monkeypatch.setitem(sys.modules, name, module)
    calls = []
    tracker = types.SimpleNamespace(name=name, log=lambda values, step: calls.append((values, step)))
    picture = Image.new("RGB", (2, 2))
    log_images_to([tracker], "samples", [picture], ["0.5"], step=4)
    assert calls == [({"samples": [("Image", picture, "0.5")]}, 4)]
    with pytest.raises(ValueError, match="1 images and 2 captions"):
        log_images_to([tracker], "samples", [picture], ["0.5", "0.6"], step=4)


def test_other_trackers_are_warned_about_once(monkeypatch, caplog):
    monkeypatch.setattr(runlog, "_warned", set())
    tracker = types.SimpleNamespace(name="comet_ml")
    for step in (1, 2):
        log_images_to([tracker], "samples", [Image.new("RGB", (2, 2))], ["a"], step=step)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "no pictures are sent to the tracker comet_ml"
    ]


def test_lines_are_plain_json_when_finite(tmp_path):
    RunLog(tmp_path).log({"time/rollout": 1.5}, step=1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "time/rollout": 1.5}
