"""JPEG sizes against files on the disk."""

import numpy as np
import pytest
import torch
from PIL import Image

from dpok_trl.rewards.jpeg import JpegCompressibility, JpegIncompressibility


def noise(seed, mode="RGB", amplitude=256):
    array = np.random.default_rng(seed).integers(0, amplitude, (40, 56, 4), dtype=np.uint8)
    return Image.fromarray(array, "RGBA").convert(mode)


PICTURES = [noise(0), noise(1, amplitude=20), Image.new("RGB", (56, 40), "red"), noise(2, "L"), noise(3, "RGBA")]


def kilobytes(image, tmp_path, quality):
    image.convert("RGB").save(tmp_path / "picture.jpg", quality=quality)
    return (tmp_path / "picture.jpg").stat().st_size / 1000


@pytest.mark.parametrize("settings", [{}, {"quality": 50}])
def test_kilobytes(tmp_path, settings):
    expected = torch.tensor([kilobytes(image, tmp_path, settings.get("quality", 95)) for image in PICTURES])
    scores = JpegIncompressibility(**settings)(PICTURES, ["p"] * 5)
    assert torch.equal(scores, expected)
    assert torch.equal(JpegCompressibility(**settings)(PICTURES, ["q"] * 5), -expected)
    assert (scores.dtype, scores.device.type) == (torch.float32, "cpu")


def test_detail_is_what_it_measures():
    detailed, faint, plain = JpegIncompressibility()(PICTURES[:3], ["p"] * 3)
    assert detailed > faint > plain


def test_order_of_the_batch():
    order = [3, 0, 4, 2, 1]
    reward = JpegCompressibility()
    assert torch.equal(reward([PICTURES[index] for index in order], ["p"] * 5), reward(PICTURES, ["p"] * 5)[order])


def test_it_may_run_while_sampling_goes_on():
    assert JpegIncompressibility.overlaps and JpegCompressibility.overlaps
    assert JpegIncompressibility.image_type == JpegCompressibility.image_type == "pil"


@pytest.mark.parametrize("quality", [0, 96, 100])
def test_quality(quality):
    with pytest.raises(ValueError, match=f"jpeg-compressibility: `quality` must be between 1 and 95; got {quality}"):
        JpegCompressibility(quality)


def test_other_inputs():
    with pytest.raises(ValueError, match="got 5 pictures and 2 prompts"):
        JpegIncompressibility()(PICTURES, ["p"] * 2)
    with pytest.raises(ValueError, match="scores PIL pictures; got an object of type Tensor"):
        JpegIncompressibility()(torch.zeros(1, 3, 8, 8), ["p"])
