"""The table of pipelines in the docs: what the tool writes, complete, and nothing passes wrongly."""

import re
from collections import Counter
from functools import wraps
from pathlib import Path

import diffusers
import pytest
import scan_pipelines as scan
import torch
import untouched
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from zoo import build, call_arguments

from dpok_trl import check_pipeline


PAGE = (Path(__file__).parents[1] / "docs" / "pipelines.md").read_text()
ROW = re.compile(
    r"^\| (?P<name>[A-Z]\w+) \| (?P<verdict>.*?) \| (?P<scheduler>\w*) \| (?P<ratio>\S*) \| (?P<path>\S*) \|$"
)
ROWS = [match for line in PAGE.splitlines() if (match := ROW.match(line)) and match["name"] != "Pipeline"]
FEW = (
    "FluxControlPipeline",
    "IFPipeline",
    "KandinskyV22Pipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusionPipelineSafe",
    "StableUnCLIPPipeline",
    "UnCLIPPipeline",
)

other_diffusers = pytest.mark.skipif(
    f"diffusers {diffusers.__version__}," not in PAGE, reason="the table is of another version of diffusers"
)


@pytest.fixture(autouse=True)
def quiet():
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    yield
    diffusers.utils.logging.set_verbosity(before)


@other_diffusers
def test_every_class_has_exactly_one_row():
    assert sorted(row["name"] for row in ROWS) == sorted(scan.exported_pipelines())


def test_the_head_counts_the_rows():
    verdicts = Counter(row["verdict"].replace("*", "").split(":")[0] for row in ROWS)
    assert set(verdicts) <= set(scan.MEANING)
    for verdict in scan.MEANING:
        assert f"| {verdict} | {verdicts[verdict]} |" in PAGE
    prompted = len(ROWS) - verdicts[scan.NO_PROMPT]
    assert f"* {len(ROWS)} classes, {prompted} take a prompt; of these {verdicts[scan.PASSES]} pass" in PAGE


@other_diffusers
@pytest.mark.parametrize("name", FEW)
def test_the_table_is_what_the_tool_writes(name):
    (row,) = [row for row in ROWS if row["name"] == name]
    now = ROW.match(scan.line(scan.examine(scan.exported_pipelines()[name])))
    assert (now["verdict"], now["scheduler"], now["ratio"]) == (row["verdict"], row["scheduler"], row["ratio"])
    assert bool(now["path"]) == bool(row["path"])  # a rounding error, which depends on the processor
    if row["verdict"].startswith(f"**{scan.PASSES}**"):
        assert row["ratio"] == "0" and float(row["path"]) <= untouched.SAME_PATH


# ---------------------------------------------------------------- pipelines that must not pass


class Remembers(StableDiffusionPipeline):
    """Its first latents depend on how often it was called."""

    calls = 0

    def prepare_latents(self, *args, **kwargs):
        self.calls += 1
        return super().prepare_latents(*args, **kwargs) + 0.01 * self.calls


class Detached(StableDiffusionPipeline):
    """Its predictions carry no gradient."""

    @wraps(StableDiffusionPipeline.__call__)  # for the names of its arguments
    def __call__(self, *args, **kwargs):
        with torch.inference_mode():
            return super().__call__(*args, **kwargs)


class NoticesThePolicy(StableDiffusionPipeline):
    """Guides less where its network is watched: the same in every replay, so the ratio is 1, and still not the pipeline's own walk."""

    @property
    def guidance_scale(self):
        return self._guidance_scale if type(self.unet) is UNet2DConditionModel else 1.5


@pytest.mark.parametrize("pipeline_class", [Remembers, Detached, NoticesThePolicy])
def test_a_wrong_pipeline_does_not_pass(pipeline_class):
    row = scan.examine(pipeline_class)
    assert row.verdict in (scan.FAILS, scan.REFUSED) and row.detail


def test_the_ratio_alone_would_let_one_of_them_pass():
    pipe = build(NoticesThePolicy)
    assert check_pipeline(pipe, **call_arguments(pipe)).ok
    assert "differs" in scan.examine(NoticesThePolicy).detail


class DrawsForTheBatch(StableDiffusionPipeline):
    """Its first latents have noise of torch's global generator, one tensor for the whole batch."""

    def prepare_latents(self, *args, **kwargs):
        latents = super().prepare_latents(*args, **kwargs)
        return latents + 0.1 * torch.randn_like(latents)


def test_the_pipeline_they_are_made_from_passes():
    row = scan.examine(StableDiffusionPipeline)
    assert (row.verdict, row.detail, row.ratio_deviation) == (scan.PASSES, "", 0.0)


def test_a_pipeline_that_draws_for_the_batch_passes_with_a_note():
    row = scan.examine(DrawsForTheBatch)
    assert (row.verdict, row.detail) == (scan.PASSES, "replay only in the batches of the rollout")


def test_differences():
    one = {"a": (torch.ones(2), "text", 1), "b": [torch.full((2,), 4.0)]}
    assert untouched.largest_difference(one, {"a": (torch.ones(2), "text", 1), "b": [torch.full((2,), 5.0)]}) == 0.2
    for other in (
        {"a": one["a"]},
        {**one, "b": one["a"]},
        {**one, "b": [torch.ones(3)]},
        {**one, "a": (*one["a"][:2], 2)},
    ):
        assert untouched.largest_difference(one, other) == float("inf")
