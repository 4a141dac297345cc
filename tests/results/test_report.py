import io
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from dpok_trl.results.curves import DARK, LIGHT, column, draw_curves, draw_panels, panels_of, standard_errors
from dpok_trl.results.drawing import ModelSamples
from dpok_trl.results.evaluation import Comparison, Evaluation
from dpok_trl.results.evaluation_files import best_of_rows
from dpok_trl.results.report import render_report, write_report
from dpok_trl.results.runlog import RunLog, read_metrics
from dpok_trl.results.samples import Samples


ASSETS = {"src", "srcset", "poster", "data", "background"}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.assets, self.links, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.assets += [value for name, value in attributes if name in ASSETS]
        self.links += [value for name, value in attributes if name == "href" and tag != "a"]

    def handle_data(self, data):
        self.text += data


def make_evaluation(n: int = 20, size: int = 8, prompts: int = 1, sets: tuple[str, ...] = ("one",)) -> Evaluation:
    generator = torch.Generator().manual_seed(0)
    shown = [index * n // min(n, 16) for index in range(min(n, 16))]

    def drawn(scores: torch.Tensor, kl: torch.Tensor | None) -> ModelSamples:
        pictures = (255 * torch.rand(len(shown), 3, size, size, generator=generator)).to(torch.uint8)
        return ModelSamples({"judge": scores}, {"judge": 0}, torch.rand(n, 5, generator=generator), kl, pictures)

    comparison = Comparison(
        prompts=[f"prompt <{index * prompts // n}>" for index in range(n)],
        seeds=list(range(n)),
        images_per_prompt=n // prompts,
        categories=None,
        held_out=(),
        shown=shown,
        base=drawn(torch.linspace(0, 1, n), None),
        tuned=drawn(torch.linspace(0.5, 1, n), torch.full((n,), 12.5)),
    )
    return Evaluation(dict.fromkeys(sets, comparison), {})


def log_a_run(folder, epochs: int = 3) -> None:
    log = RunLog(folder)
    for epoch in range(epochs):
        log.log(
            {
                "epoch": epoch,
                "reward": 0.25 * epoch,
                "reward_std": 0.1,
                "images": 16 * (epoch + 1),
                "time/rollout": 1.0,
                "time/reward": 0.5,
            },
            2 * epoch,
        )
        for step in (1, 2):
            metrics = {
                "epoch": epoch,
                "kl": 0.1 * step,
                "policy/clip_fraction": 0.2,
                "policy/ratio_deviation_max": 0.3,
            }
            log.log({**metrics, "grad_norm": math.nan}, 2 * epoch + step)
        log.log({"epoch": epoch, "time/update": 2.0, "kl_path": 3.0}, 2 * epoch + 2)


def log_samples(folder, epochs: int) -> None:
    for epoch in range(epochs):
        pictures = [Image.new("RGB", (8, 8), (epoch, 0, 0))] * 16
        RunLog(folder).log_samples(
            Samples(pictures, ["<i>"] * 16, [float(epoch)] * 16, {}, [0] * 16, [None] * 16, epoch, step=0)
        )


def test_the_page_needs_nothing_but_itself(tmp_path):
    log_a_run(tmp_path)
    page = write_report(
        tmp_path,
        "Title & <b>",
        evaluation=make_evaluation(),
        summary="Two sentences.",
        command="dpok-trl demo --prompt 'a <b>'",
        config={"kl_weight": 0.02, "sample_call_kwargs/height": 64},
        facts={"Wall time": "74 s"},
        reduction="sum",
        device="cpu",
    )
    assert page == tmp_path / "report.html"
    text = page.read_text()
    parsed = Page(text)
    assert len(parsed.assets) == 2 * 16  # pairs; curves are drawn in the page itself
    assert parsed.tags.count("svg") == 7
    assert all(asset.startswith("data:image/png;base64,") for asset in parsed.assets)
    assert parsed.links == [] and "script" not in parsed.tags and "link" not in parsed.tags
    assert not re.search(
        r"url\((?!#)|@import|href=\"(?!#|https://arxiv)", text
    )  # nothing but parts of itself, and a link
    assert "prefers-color-scheme: dark" in text
    comparison = make_evaluation().sets["one"]
    for number in (
        str(comparison.base_reward("judge")),
        str(comparison.tuned_reward("judge")),
        str(comparison.best_of("judge", 16)),
        str(comparison.diversity()[0]),
        str(comparison.kl),
        "12.5 nats",
        "0.50 → 0.75",
    ):
        assert number in parsed.text
    for words in (
        "Title & <b>",
        "prompt <0>",
        "--prompt 'a <b>'",
        "sample_call_kwargs/height",
        "74 s",
        "torch 2",
        "1 thread); ",
    ):
        assert words in parsed.text
    assert "16 of the 20 pairs, evenly spaced, not selected" in parsed.text
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["curves.png", "grid.png"]


def test_a_page_of_a_log_alone_and_of_a_comparison_alone(tmp_path):
    log_a_run(tmp_path / "log")
    parsed = Page(write_report(tmp_path / "log", "t").read_text())
    assert (
        parsed.assets == [] and "Scores" not in parsed.text and "3 epochs, 6 optimizer steps, 48 images" in parsed.text
    )
    (tmp_path / "evaluation").mkdir()
    parsed = Page(write_report(tmp_path / "evaluation", "t", evaluation=make_evaluation(n=4, prompts=2)).read_text())
    assert len(parsed.assets) == 8 and "svg" not in parsed.tags and "prompt <1>" in parsed.text


def test_the_page_is_made_again_from_the_folder_alone(tmp_path):
    log_a_run(tmp_path)
    log_samples(tmp_path, epochs=3)
    given = {"summary": "s", "command": "c", "config": {"kl_weight": 0.5}, "facts": {"Time": "7 s"}, "device": "cpu"}
    page = write_report(tmp_path, "A title", evaluation=make_evaluation(), **given)
    first = page.read_text()
    page.unlink()
    assert render_report(tmp_path, tmp_path / "other.html").read_text() == first
    assert not page.exists()
    # what is not said again stays as it was, and what is said is newer
    later = write_report(tmp_path, summary="another summary").read_text()
    assert later == first.replace("<p>s</p>", "<p>another summary</p>") != first


def test_samples_of_the_first_and_the_last_epoch_are_on_the_page(tmp_path):
    log_samples(tmp_path, epochs=3)
    log_a_run(tmp_path)
    parsed = Page(render_report(tmp_path).read_text())
    assert len(parsed.assets) == 2 * 8
    assert "Epoch 0" in parsed.text and "Epoch 2" in parsed.text and "Epoch 1" not in parsed.text
    assert "0.00 <i>" in parsed.text and "2.00 <i>" in parsed.text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no run: it holds neither metrics\.jsonl nor report\.json"):
        render_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is no run: there is no such folder"):
        render_report(tmp_path / "nowhere")


def test_every_set_is_on_the_page(tmp_path):
    parsed = Page(
        write_report(tmp_path, "t", evaluation=make_evaluation(n=4, sets=("training", "held-out"))).read_text()
    )
    assert len(parsed.assets) == 2 * 8
    for heading in ("Scores: training", "Scores: held-out", "Before and after: held-out"):
        assert heading in parsed.text
    assert (tmp_path / "evaluation.json").exists()
    header = best_of_rows(make_evaluation(n=256).sets["one"])[0]  # as many columns as the page has room for
    assert header == ["pretrained, best of n", "tuned is equal to", "n = 2", "n = 4", "n = 16", "n = 64"]


def test_pictures_on_the_page_are_not_larger_than_they_are_shown(tmp_path):
    small = len(write_report(tmp_path, "t", evaluation=make_evaluation(n=2, size=256)).read_text())
    large = len(write_report(tmp_path, "t", evaluation=make_evaluation(n=2, size=512)).read_text())
    assert large <= 1.05 * small


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_curves_are_a_picture_on_the_page_s_own_colour(tmp_path, theme):
    log_a_run(tmp_path)
    picture = Image.open(io.BytesIO(draw_curves(read_metrics(tmp_path), "sum", theme)))
    assert picture.size == (round(3 * 3.5 * 170), round(3 * 2.5 * 170))
    assert "#{:02x}{:02x}{:02x}".format(*picture.convert("RGB").getpixel((1, 1))) == theme.paper


def test_curves_draw_what_there_is():
    one = Image.open(io.BytesIO(draw_curves([{"step": 1, "epoch": 0, "kl": 0.5}])))
    assert one.size == (round(3.5 * 170), round(2.5 * 170))
    with pytest.raises(ValueError, match="none of the 1 lines holds a metric that is drawn"):
        draw_curves([{"step": 1, "learning_rate": 0.1}])


def test_every_kind_of_metric_has_its_panel():
    lines = [
        {"step": 0, "epoch": 0, "reward": 0.5, "value/explained_variance": -0.1},
        {"step": 1, "epoch": 0, "policy/mask_fraction": 0.5, "sft/mse": 1.0, "kl_o": 0.1},
        {"step": 1, "epoch": 0, "eval/held-out/clip/score/base": 0.2, "eval/held-out/clip/score/tuned": 0.4,
         "eval/held-out/clip/score/difference": 0.2, "eval/held-out/kl": 3.0, "eval/held-out/diversity": 0.5},
        {"step": 2, "epoch": 1, "eval/held-out/clip/score/base": 0.2, "eval/held-out/clip/score/tuned": 0.5, "eval/held-out/kl": 4.0},
    ]  # fmt: skip
    assert [panel.title for panel in panels_of(lines)] == [
        "Reward while training", "clip/score on held-out", "Path KL to the pretrained model", "Masked transitions",
        "Squared error", "Distance from the pretrained output", "Value function",
    ]  # fmt: skip


def test_a_single_evaluation_is_no_curve():
    training = [{"step": step, "epoch": step, "reward": 0.5} for step in range(2)]
    one = {"step": 2, "epoch": 1, "eval/new/clip/base": 0.2, "eval/new/clip/tuned": 0.4, "eval/new/kl": 3.0}
    assert [panel.title for panel in panels_of([*training, one])] == ["Reward while training"]
    titles = [panel.title for panel in panels_of([*training, {**one, "kl_path": 2.5}])]
    assert titles == ["Reward while training", "Path KL to the pretrained model"]  # a curve to compare it with
    two = [*training, one, {**one, "step": 3, "epoch": 2}]
    assert len(panels_of(two)) == 3


def test_the_epochs_of_a_run_that_went_on_in_another_folder(tmp_path):
    log = RunLog(tmp_path)
    for epoch in (3, 4):
        log.log({"epoch": epoch, "reward": 0.5, "images": 8 * epoch, "time/rollout": 2.0}, 2 * epoch)
    text = Page(render_report(tmp_path).read_text()).text
    assert (
        "5 epochs (epochs 3 to 4 are in this folder, the first of the run is 0), 8 optimizer steps, 32 images" in text
    )
    assert "Time in all phases of these epochs" in text


def test_panels_say_their_values_in_words():
    lines = [{"step": step, "kl": value} for step, value in enumerate([1.0, math.nan, 4.0, 2.0])]
    (panel,) = panels_of(lines)
    assert panel.in_words() == "KL to the reference: from 1 to 2, between 1 and 4."
    assert 'role="img" aria-label="KL to the reference: from 1 to 2, between 1 and 4."' in draw_panels(lines)[0]
    (panel,) = panels_of([{"step": 1, "kl": math.nan}])
    assert panel.in_words() == "KL to the reference: no value is finite."


def test_panels_take_the_colours_of_the_page(tmp_path):
    log_a_run(tmp_path)
    panels = draw_panels(read_metrics(tmp_path))
    text = "".join(panels)
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) >= {"--paper", "--ink", "--faint", "--line", "--series-1"}
    assert not re.search(r"#[0-9a-f]{6}\b(?!\w)", re.sub(r'(href="#\w+"|url\(#\w+\))', "", text))
    ids = [found for panel in panels for found in set(re.findall(r'\bid="([^"]*)"', panel))]
    assert len(ids) == len(set(ids))  # they stand in one page


def test_over_optimisation_is_marked():
    lines = [{"step": e, "epoch": e, "reward": 0.5, "eval/over_optimisation": float(e == 2)} for e in range(4)]
    (reward,) = draw_panels(lines)
    assert "over-optimisation" in reward
    for line in lines:
        line["eval/over_optimisation"] = 0.0
    assert "over-optimisation" not in draw_panels(lines)[0]


def test_standard_errors_are_of_the_images_that_count():
    lines = [
        {"epoch": 0, "reward": 0.5, "reward_std": 2.0, "images": 16, "images_left_out": 0},
        {"epoch": 0, "kl": 0.5},
        {"epoch": 1, "reward": 0.5, "reward_std": 3.0, "images": 32, "images_left_out": 7},
    ]
    epochs, errors = standard_errors(lines)
    assert epochs.tolist() == [0, 1] and errors.tolist() == [2.0 / 4, 3.0 / 3]
    # resumed in another folder: how many of the images are the first line's is not known
    resumed = [{**line, "epoch": line["epoch"] + 4} for line in lines]
    assert math.isnan(standard_errors(resumed)[1][0]) and standard_errors(resumed)[1][1] == 1.0
    assert standard_errors([{"epoch": 0, "reward": 0.5}])[0].shape == (0,)


def test_column_keeps_lines_with_both():
    x, y = column([{"step": 1, "kl": 0.5}, {"step": 2}, {"step": 3, "kl": math.nan}], "step", "kl")
    assert x.tolist() == [1, 3] and y[0] == 0.5 and math.isnan(y[1])
    assert column([], "step", "kl")[0].shape == (0,)
