"""The demo world: its grammar, its painter, and a checker that must never be wrong on clean pictures."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dpok_trl.demo.scenes import Placed, draw
from dpok_trl.demo.world import (
    COLORS,
    IMAGE_SIZE,
    REWARDS,
    SHAPES,
    TASKS,
    Scene,
    Thing,
    check,
    corrupt_scene,
    exact_reward,
    fidelity,
    greenness_reward,
    parse_prompt,
    render,
    sample_prompt,
    sample_scene,
    soft_reward,
)


LIGHT = (235, 235, 235)
CATEGORIES = ("single", "count", "pair", "relation")
FIDELITY_OF_REAL_MEAN = 0.97  # at least
FIDELITY_OF_REAL_MIN = 0.80
FIDELITY_OF_FAKE_MAX = 0.25


def picture(*things: tuple[str, str, float, float, float], ground: tuple[int, int, int] = LIGHT) -> Image.Image:
    """A hand-made picture from (colour, shape, x, y, radius)."""
    return draw([Placed(shape, COLORS[color], x, y, r) for color, shape, x, y, r in things], ground)


def tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])


@pytest.fixture(scope="module")
def renders() -> list[tuple[Scene, Image.Image]]:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, category) for category in CATEGORIES for _ in range(250)]
    return [(scene, render(scene, rng)) for scene in scenes]


# --- grammar


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("a green triangle", Scene((Thing("triangle", "green"),))),
        ("an orange cross", Scene((Thing("cross", "orange"),))),
        ("four circles", Scene((Thing("circle"),) * 4)),
        ("three red crosses", Scene((Thing("cross", "red"),) * 3)),
        ("a red square and a blue circle", Scene((Thing("square", "red"), Thing("circle", "blue")))),
        ("a circle above a square", Scene((Thing("circle"), Thing("square")), relation="above")),
        (
            "a yellow triangle left of an orange circle",
            Scene((Thing("triangle", "yellow"), Thing("circle", "orange")), relation="left of"),
        ),
    ],
)
def test_prompts_are_read_and_said(prompt: str, scene: Scene) -> None:
    assert parse_prompt(prompt) == scene
    assert scene.prompt == prompt


def test_every_sampled_prompt_comes_back() -> None:
    rng = np.random.default_rng(3)
    categories = collections.Counter()
    for _ in range(2000):
        scene = sample_scene(rng)
        assert parse_prompt(scene.prompt) == scene
        categories[scene.category] += 1
    assert set(categories) == set(CATEGORIES)
    assert min(categories.values()) > 400  # of 500 expected: five standard deviations


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_category_asked_for_is_sampled(category: str) -> None:
    rng = np.random.default_rng(4)
    assert {parse_prompt(sample_prompt(rng, category)).category for _ in range(50)} == {category}


def test_sampling_refuses_an_unknown_category() -> None:
    with pytest.raises(ValueError, match="'pairs'"):
        sample_scene(np.random.default_rng(0), "pairs")


def test_sampling_is_seeded() -> None:
    first, second = ([sample_prompt(np.random.default_rng(seed)) for seed in range(20)] for _ in range(2))
    assert first == second


def test_reading_forgives_case_spaces_and_full_stop() -> None:
    assert parse_prompt("  A Green  triangle. ") == parse_prompt("a green triangle")


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("", "empty"),
        ("a green rabbit", "'rabbit' is not a shape"),
        ("a pink circle", "'pink' is not a colour"),
        ("five circles", "'five circles'"),
        ("four circle", "'circle'"),
        ("two pink circles", "'pink' is not a colour"),
        ("green triangle", "'green triangle'"),
        ("a circle over a square", "is not 'a \\[colour\\] shape'"),
        ("a circle and a circle", "two circles"),
        ("a circle and a square and a cross", "is not 'a \\[colour\\] shape'"),
    ],
)
def test_other_sentences_are_refused_in_words(prompt: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        parse_prompt(prompt)
    for known in ("triangle", "orange", "four", "left of"):
        assert known in str(error.value)


def test_scenes_without_a_sentence_are_refused() -> None:
    circle, square = Thing("circle"), Thing("square")
    with pytest.raises(ValueError, match="got 5"):
        Scene((circle,) * 5)
    with pytest.raises(ValueError, match="must be alike"):
        Scene((circle, circle, square))
    with pytest.raises(ValueError, match="'on top of'"):
        Scene((circle, square), relation="on top of")


# --- painter and checker


def test_a_thousand_clean_renders_are_all_exact(renders: list[tuple[Scene, Image.Image]]) -> None:
    wrong = [(scene.prompt, result) for scene, image in renders if not (result := check(image, scene.prompt)).exact]
    assert wrong == []
    assert len(renders) == 1000


def test_exact_means_full_soft_credit(renders: list[tuple[Scene, Image.Image]]) -> None:
    assert {check(image, scene.prompt).soft for scene, image in renders[::5]} == {1.0}


def test_corrupted_scenes_are_never_exact(renders: list[tuple[Scene, Image.Image]]) -> None:
    rng = np.random.default_rng(1)
    for scene, _ in renders:
        result = check(render(corrupt_scene(scene, rng), rng), scene.prompt)
        assert not result.exact
        assert 0.0 <= result.soft < 1.0


def test_rendering_is_seeded_and_rgb() -> None:
    scene = parse_prompt("three crosses")
    first, second = (render(scene, np.random.default_rng(5)) for _ in range(2))
    assert first.mode == "RGB"
    assert first.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != render(scene, np.random.default_rng(6)).tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_colour_and_shape_are_told_apart(color: str, shape: str) -> None:
    image = picture((color, shape, 15.3, 16.8, 6.4))
    (found,) = check(image, f"a {color} {shape}").detected
    assert (found.color, found.shape) == (color, shape)
    # Sub-pixel centre and size come from area moments; the painter's own grid is a quarter of a pixel.
    assert found.x == pytest.approx(15.3, abs=0.25)
    assert found.y == pytest.approx(16.8, abs=0.25)
    assert found.radius == pytest.approx(6.4, abs=0.4)
    for other in COLORS:
        assert check(image, f"a {other} {shape}").exact == (other == color)
    for other in SHAPES:
        assert check(image, f"a {color} {other}").exact == (other == shape)


@pytest.mark.parametrize(
    ("prompt", "things", "soft"),
    [
        # wrong colour, wrong shape, both, nothing there
        ("a green triangle", [("red", "triangle", 16, 16, 6)], 0.5),
        ("a green triangle", [("green", "square", 16, 16, 6)], 0.5),
        ("a green triangle", [("red", "square", 16, 16, 6)], 0.0),
        ("a triangle", [("red", "square", 16, 16, 6)], 0.0),
        ("a green triangle", [], 0.0),
        # one too many: half the objects are not wanted
        ("a green triangle", [("green", "triangle", 9, 16, 5), ("red", "circle", 23, 16, 5)], 0.5),
        # counts
        ("four circles", [("red", "circle", 7 + 9 * i, 16, 3) for i in range(3)], 0.75),
        ("two circles", [("red", "circle", 7 + 9 * i, 16, 3) for i in range(3)], 2 / 3),
        ("three circles", [("red", "circle", 7, 16, 3), ("red", "circle", 16, 16, 3), ("red", "square", 25, 16, 3)], 2 / 3),
        # composition: colours swapped, one missing, one colour twice
        ("a red square and a blue circle", [("blue", "square", 8, 16, 4), ("red", "circle", 24, 16, 4)], 0.5),
        ("a red square and a blue circle", [("red", "square", 8, 16, 4)], 0.5),
        ("a red square and a blue circle", [("red", "square", 8, 16, 4), ("red", "circle", 24, 16, 4)], 0.75),
        # location: right objects in the wrong place keep 60 %, one wrong object half of that
        ("a circle above a square", [("red", "circle", 16, 24, 4), ("red", "square", 16, 8, 4)], 0.6),
        ("a circle above a square", [("red", "circle", 8, 16, 4), ("red", "square", 24, 16, 4)], 0.6),
        ("a circle above a square", [("red", "circle", 16, 8, 4), ("red", "cross", 16, 24, 4)], 0.5),
        ("a circle above a square", [("red", "circle", 16, 16, 4)], 0.3),
        # diagonally below right is neither above nor left of
        ("a circle left of a square", [("red", "circle", 22, 25, 4), ("red", "square", 8, 8, 4)], 0.6),
    ],
)  # fmt: skip
def test_wrong_pictures_get_the_credit_computed_by_hand(prompt: str, things: list, soft: float) -> None:
    result = check(picture(*things), prompt)
    assert not result.exact
    assert result.soft == pytest.approx(soft, abs=1e-12)
    assert len(result.detected) == len(things)


@pytest.mark.parametrize("relation", ["above", "below", "left of", "right of"])
def test_relations_point_the_right_way(relation: str) -> None:
    x, y = {"above": (16, 6), "below": (16, 26), "left of": (6, 16), "right of": (26, 16)}[relation]
    image = picture(("red", "circle", x, y, 4), ("blue", "square", 16, 16, 4))
    for other in ("above", "below", "left of", "right of"):
        assert check(image, f"a red circle {other} a blue square").exact == (other == relation)
    inverse = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}[relation]
    assert check(image, f"a blue square {inverse} a red circle").exact


def test_alike_objects_may_stand_in_a_relation() -> None:
    image = picture(("red", "circle", 16, 7, 4), ("blue", "circle", 16, 24, 4))
    assert check(image, "a circle above a circle").exact
    assert check(image, "a red circle above a circle").exact
    assert not check(image, "a blue circle above a circle").exact


def test_crowds_are_wrong_and_stay_cheap() -> None:
    things = [("red", "circle", 4 + 8 * (i % 4), 4 + 8 * (i // 4), 2.6) for i in range(16)]
    result = check(picture(*things), "four circles")
    assert len(result.detected) == 16
    assert result.soft == pytest.approx(4 / 16)


def test_specks_are_not_objects() -> None:
    image = picture(("green", "triangle", 16, 18, 6))
    image.putpixel((2, 2), (0, 0, 0))
    assert check(image, "a green triangle").exact


def test_images_may_be_pil_tensors_or_arrays() -> None:
    image = picture(("green", "triangle", 16, 18, 6))
    array = np.asarray(image)
    results = [check(form, "a green triangle") for form in (image, array, tensor([image])[0], array / 255.0)]
    for result in results:
        assert result.exact
        assert result.detected[0].x == pytest.approx(results[0].detected[0].x, abs=1e-4)
    with pytest.raises(ValueError, match=r"\(32, 32, 3\)"):
        check(torch.from_numpy(array.copy()), "a green triangle")
    with pytest.raises(ValueError, match=r"\(3, 32, 32\)"):
        check(array.transpose(2, 0, 1), "a green triangle")


# --- fidelity


def test_fidelity_is_high_on_real_renders(renders: list[tuple[Scene, Image.Image]]) -> None:
    scores = [fidelity(image, scene.prompt) for scene, image in renders]
    assert np.mean(scores) > FIDELITY_OF_REAL_MEAN
    assert min(scores) > FIDELITY_OF_REAL_MIN
    assert max(scores) <= 1.0


def test_fidelity_does_not_ask_for_obedience() -> None:
    image = picture(("red", "square", 16, 16, 6))
    assert fidelity(image, "a green triangle") == fidelity(image, "a red square") > FIDELITY_OF_REAL_MEAN


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [10.5, 12.0, 14.0, 18.0])
def test_giants_score_low(shape: str, radius: float) -> None:
    image = picture(("green", shape, 16, 16, radius))
    assert fidelity(image, "a green triangle") < FIDELITY_OF_FAKE_MAX
    assert fidelity(image, "four circles") < FIDELITY_OF_FAKE_MAX


def test_washed_out_smudged_dark_and_empty_pictures_score_low() -> None:
    image = picture(("green", "triangle", 16, 18, 6))
    pale = Image.blend(image, Image.new("RGB", image.size, LIGHT), 0.6)
    noise = np.random.default_rng(0).normal(0, 40, (32, 32, 3))
    fakes = {
        "washed out": pale,
        "noisy": Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)),
        "blurred": image.filter(ImageFilter.GaussianBlur(3)),
        "dark ground": picture(("green", "triangle", 16, 18, 6), ground=(120, 120, 120)),
        "tinted ground": picture(("red", "triangle", 16, 18, 6), ground=(180, 240, 180)),
        "empty": Image.new("RGB", (32, 32), LIGHT),
        "all green": Image.new("RGB", (32, 32), COLORS["green"]),
        "dust": picture(*[("red", "square", 4 + 8 * (i % 4), 4 + 8 * (i // 4), 1.2) for i in range(16)]),
    }
    for name, fake in fakes.items():
        assert fidelity(fake, "a green triangle") < FIDELITY_OF_FAKE_MAX, name


# --- rewards


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_have_ddpo_form(name: str) -> None:
    rng = np.random.default_rng(0)
    prompts = list(TASKS.values())
    images = tensor([render(parse_prompt(prompt), rng) for prompt in prompts])
    rewards, info = REWARDS[name](images, prompts, [{} for _ in prompts])
    assert rewards.shape == (4,)
    assert rewards.dtype == torch.float32
    assert isinstance(info, dict)
    assert bool(((rewards >= 0) & (rewards <= 1)).all())


def test_exact_and_soft_rewards_follow_the_checker() -> None:
    prompts = ["a green triangle"] * 3
    images = tensor([picture((color, shape, 16, 16, 6)) for color, shape in
                     [("green", "triangle"), ("red", "triangle"), ("red", "cross")]])  # fmt: skip
    exact, info = exact_reward(images, prompts, None)
    assert exact.tolist() == [1.0, 0.0, 0.0]
    assert info == {"objects": [1, 1, 1]}
    soft, info = soft_reward(images, prompts, None)
    assert soft.tolist() == [1.0, 0.5, 0.0]
    assert info == {"exact": [True, False, False]}


@pytest.mark.parametrize("reward", [exact_reward, soft_reward])
def test_rewards_refuse_other_shapes(reward) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\) and 1"):
        reward(torch.zeros(2, 3, 32, 32), ["a circle"], None)
    with pytest.raises(ValueError, match=r"\(3, 32, 32\)"):
        reward(torch.zeros(3, 32, 32), ["a circle"], None)


def test_greenness_is_the_mean_excess_of_green_and_can_be_hacked() -> None:
    images = torch.zeros(4, 3, 2, 2)
    images[1, 1] = 1.0  # all green: 1
    images[2] = 0.7  # grey: 0
    images[3, :, 0, 0] = torch.tensor([0.2, 0.8, 0.4])  # one pixel in four: (0.8 - 0.3) / 4
    rewards, _ = greenness_reward(images, ["a circle"] * 4, None)
    torch.testing.assert_close(rewards, torch.tensor([0.0, 1.0, 0.0, 0.125]), atol=1e-7, rtol=0)
    honest = picture(("green", "triangle", 16, 16, 6))
    giant = picture(("green", "square", 16, 16, 15))
    small, large = greenness_reward(tensor([honest, giant]), ["a green triangle"] * 2, None)[0]
    assert large > 4 * small
    assert fidelity(giant, "a green triangle") < FIDELITY_OF_FAKE_MAX


def test_the_tasks_are_the_papers_four() -> None:
    assert list(TASKS) == ["color", "count", "composition", "location"]
    assert [parse_prompt(prompt).category for prompt in TASKS.values()] == list(CATEGORIES)
