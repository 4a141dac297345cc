import io
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from dpok_trl.results.curves import DARK, LIGHT, column, draw_curves
from dpok_trl.results.drawing import Drawn
from dpok_trl.results.evaluation import Comparison, Evaluation
from dpok_trl.results.report import write_report
from dpok_trl.results.runlog import RunLog


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

    def drawn(scores: torch.Tensor, kl: torch.Tensor | None) -> Drawn:
        pictures = (255 * torch.rand(len(shown), 3, size, size, generator=generator)).to(torch.uint8)
        return Drawn({"judge": scores}, {"judge": 0}, torch.rand(n, 5, generator=generator), kl, pictures)

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
            {"epoch": epoch, "reward": 0.25 * epoch, "reward_std": 0.1, "time/rollout": 1.0, "time/reward": 0.5},
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
        log.log({"epoch": epoch, "time/update": 2.0}, 2 * epoch + 2)


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
    )
    assert page == tmp_path / "report.html"
    text = page.read_text()
    parsed = Page(text)
    assert len(parsed.assets) == 2 * 16 + 2  # pairs, and the curves for light and dark readers
    assert all(asset.startswith("data:image/png;base64,") for asset in parsed.assets)
    assert parsed.links == [] and "script" not in parsed.tags and "link" not in parsed.tags
    assert not re.search(r"url\(|@import", text)
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
        "CPU, 1 thread;",
    ):
        assert words in parsed.text
    assert "16 of the 20 pairs, evenly spaced, not selected" in parsed.text
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["curves.png", "grid.png"]


def test_a_page_of_a_log_alone_and_of_a_comparison_alone(tmp_path):
    log_a_run(tmp_path / "log")
    parsed = Page(write_report(tmp_path / "log", "t").read_text())
    assert len(parsed.assets) == 2 and "Scores" not in parsed.text
    (tmp_path / "evaluation").mkdir()
    parsed = Page(write_report(tmp_path / "evaluation", "t", evaluation=make_evaluation(n=4, prompts=2)).read_text())
    assert len(parsed.assets) == 8 and "Training" not in parsed.text
    assert "prompt <1>" in parsed.text


def test_every_set_is_on_the_page(tmp_path):
    parsed = Page(
        write_report(tmp_path, "t", evaluation=make_evaluation(n=4, sets=("training", "held-out"))).read_text()
    )
    assert len(parsed.assets) == 2 * 8
    for heading in ("Scores: training", "Scores: held-out", "Before and after: held-out"):
        assert heading in parsed.text
    assert (tmp_path / "evaluation.json").exists()


def test_pictures_on_the_page_are_not_larger_than_they_are_shown(tmp_path):
    small = len(write_report(tmp_path, "t", evaluation=make_evaluation(n=2, size=256)).read_text())
    large = len(write_report(tmp_path, "t", evaluation=make_evaluation(n=2, size=512)).read_text())
    assert large <= 1.05 * small


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_curves_are_a_picture_on_the_page_s_own_colour(tmp_path, theme):
    log_a_run(tmp_path)
    from dpok_trl.results.runlog import read_metrics

    picture = Image.open(io.BytesIO(draw_curves(read_metrics(tmp_path), "sum", theme)))
    assert picture.size == (round(3 * 3.5 * 170), round(2 * 2.5 * 170))
    assert "#{:02x}{:02x}{:02x}".format(*picture.convert("RGB").getpixel((1, 1))) == theme.paper


def test_curves_draw_what_there_is():
    one = Image.open(io.BytesIO(draw_curves([{"step": 1, "epoch": 0, "kl": 0.5}])))
    assert one.size == (round(3.5 * 170), round(2.5 * 170))
    with pytest.raises(ValueError, match="none of the 1 lines holds a metric that is drawn"):
        draw_curves([{"step": 1, "learning_rate": 0.1}])


def test_column_keeps_lines_with_both():
    x, y = column([{"step": 1, "kl": 0.5}, {"step": 2}, {"step": 3, "kl": math.nan}], "step", "kl")
    assert x.tolist() == [1, 3] and y[0] == 0.5 and math.isnan(y[1])
    assert column([], "step", "kl")[0].shape == (0,)
