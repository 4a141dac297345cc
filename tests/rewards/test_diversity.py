"""Diversity: known distances, invariances, groups of one, and features of other kinds."""

import pytest
import tiny_clip
import torch
from PIL import Image

from dpok_trl.rewards.base import RewardError, score_batch
from dpok_trl.rewards.binding import BoundReward, RewardInputs
from dpok_trl.rewards.combining import RewardSet
from dpok_trl.rewards.diversity import PairwiseDiversity, thumbnails


BLACK, WHITE, GREY = (Image.new("RGB", (16, 16), (level,) * 3) for level in (0, 255, 51))
EXACT = {"rtol": 0, "atol": 1e-6}


def diversity(images, reward=None):
    return (reward or PairwiseDiversity())(images, ["a cat"] * len(images))


# --- known answers ----------------------------------------------------------------------------------------------------


def test_two_equal_and_one_different():
    torch.testing.assert_close(diversity([BLACK, BLACK, WHITE]), torch.tensor([0.5, 0.5, 1.0]), **EXACT)
    # grey is 51/255 = 0.2 from black and 0.8 from white
    torch.testing.assert_close(diversity([BLACK, GREY, WHITE]), torch.tensor([0.6, 0.5, 0.9]), **EXACT)


def test_equal_images_are_at_no_distance_at_all():
    noise = Image.effect_noise((32, 32), 90).convert("RGB")
    assert diversity([noise] * 30).tolist() == [0.0] * 30  # by scalar products it would be about 1e-4


def test_one_channel_of_three_is_a_third_of_the_square():
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    torch.testing.assert_close(diversity([BLACK, red]), torch.full((2,), (1 / 3) ** 0.5), **EXACT)


def test_the_size_of_the_pictures_does_not_matter_and_modes_are_converted():
    large, palette = WHITE.resize((40, 24)), BLACK.convert("P")
    torch.testing.assert_close(diversity([palette, BLACK, large]), torch.tensor([0.5, 0.5, 1.0]), **EXACT)


def test_permutation():
    images = [Image.new("RGB", (8, 8), colour) for colour in ((9, 8, 7), (200, 3, 90), (0, 0, 255), (120, 120, 0))]
    order = [2, 0, 3, 1]
    scores = diversity(images)
    torch.testing.assert_close(diversity([images[index] for index in order]), scores[order], **EXACT)


def test_thumbnails_are_mean_colours():
    halves = Image.new("RGB", (16, 16))
    halves.paste((255, 255, 255), (0, 0, 16, 1))  # one row of sixteen: half of the first row of the thumbnail
    row = thumbnails([halves])[0].view(8, 8, 3) * 192**0.5
    torch.testing.assert_close(row[0], torch.full((8, 3), 128 / 255), **EXACT)
    assert not row[1:].any()


# --- groups -----------------------------------------------------------------------------------------------------------


def inputs(colours, prompts):
    pixels = torch.tensor(colours, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    return RewardInputs(pixels, tuple(prompts), ({},) * len(prompts))


def test_each_prompt_by_itself_and_none_for_one_alone():
    scored = score_batch(BoundReward(PairwiseDiversity()), inputs([0, 1, 0, 1, 1], "abaaa"))
    assert scored.applies.tolist() == [True, False, True, True, True]
    # images 0, 2, 3, 4 of prompt a are black, black, white, white
    torch.testing.assert_close(scored.values[scored.applies], torch.tensor([2 / 3] * 4), **EXACT)


def test_an_image_alone_is_left_out_of_the_sum():
    rewards = RewardSet({"even": lambda images, prompts: [2.0] * len(images), "diversity": PairwiseDiversity()})
    batch = inputs([0, 1, 1], "aab")
    scores = rewards.score(batch)
    total, counts = rewards.total(scores.values, scores.applies, batch.prompts)
    torch.testing.assert_close(total, torch.tensor([3.0, 3.0, 2.0]), **EXACT)
    assert counts.all()


def test_several_prompts_in_one_call_are_refused():
    with pytest.raises(ValueError, match="of one prompt; got 2 prompts"):
        PairwiseDiversity()([BLACK, WHITE], ["a", "b"])


# --- features ---------------------------------------------------------------------------------------------------------


def test_features_of_the_user_and_scale():
    scale = 3.0
    reward = PairwiseDiversity(lambda images: scale * torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]))
    assert diversity([BLACK, WHITE, BLACK], reward).tolist() == [7.5, 15.0, 7.5]


@pytest.mark.parametrize("shape", [(2,), (3, 4), (2, 4, 4)])
def test_features_of_another_shape(shape):
    batch = inputs([0, 1], "aa")
    with pytest.raises(RewardError, match=r"must be of shape \(B, D\), one vector for each of the 2 pictures"):
        score_batch(BoundReward(PairwiseDiversity(lambda images: torch.zeros(shape))), batch)


def test_only_a_clip_model_can_be_moved():
    assert PairwiseDiversity("some/clip").device is None
    assert PairwiseDiversity("some/clip").to("meta").device == torch.device("meta")
    for reward in (PairwiseDiversity(), PairwiseDiversity(lambda images: torch.zeros(2, 2))):
        assert not hasattr(reward, "to") and not RewardSet(reward).have_networks


def test_wrong_arguments():
    with pytest.raises(TypeError, match="features must be a function of pictures, or the Hub id or folder"):
        PairwiseDiversity(3)
    with pytest.raises(ValueError, match="must be at least 1; got 0"):
        PairwiseDiversity(batch_size=0)


def test_a_clip_model_by_its_folder(tmp_path):
    tiny_clip.model().save_pretrained(tmp_path)
    tiny_clip.tokenizer().save_pretrained(tmp_path)
    pictures = [*tiny_clip.pictures(3), tiny_clip.pictures(1)[0]]
    reward = PairwiseDiversity(tmp_path, batch_size=3)
    scores = diversity(pictures, reward)
    vectors = reward._clip.embed_images(pictures)
    # between unit vectors: the square of the distance is 2 - 2 cos
    distances = (2 - 2 * vectors.double() @ vectors.double().T).clamp(min=0).sqrt()
    distances.fill_diagonal_(0)
    torch.testing.assert_close(scores, distances.sum(1).float() / 3, rtol=0, atol=1e-4)
    assert reward.to("cpu") is reward and reward.device == torch.device("cpu")
    assert RewardSet(reward).have_networks
    again = PairwiseDiversity(tmp_path)
    diversity(pictures, again)
    assert again._clip is reward._clip  # loaded once
