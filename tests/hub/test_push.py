"""`dpok-trl push`: what goes up, and what is told if it may not, cannot, or does not at once."""

import json
import os
import re

import pytest

from dpok_trl.policy.saved import find_model
from dpok_trl.results.hub import card_for, checkpoint_files, newest_model


LORA = "pytorch_lora_weights.safetensors"
CARD = """---
base_model: someone/base
tags: [lora]
---

# rabbit

```python
pipe = DiffusionPipeline.from_pretrained("someone/base")
pipe.load_lora_weights("rabbit")
```
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model, as far as a push looks at it."""
    folder = tmp_path_factory.mktemp("models") / "rabbit"
    (folder / "card").mkdir(parents=True)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    (folder / LORA).write_bytes(bytes(range(256)) * 40)
    (folder / "README.md").write_text(CARD)
    (folder / "dpok_config.json").write_text('{"seed": 0}')
    (folder / "card" / "1.png").write_bytes(b"one")
    return folder


@pytest.fixture(scope="module")
def checkpoint(model):
    """One of a run, with what is no part of the model."""
    folder = model.parent / "run" / "checkpoint-7"
    folder.mkdir(parents=True)
    (folder / LORA).write_bytes(b"lora of step 7")
    (folder / "optimizer.bin").write_bytes(b"moments")
    state = {"files": {LORA: 14, "optimizer.bin": 7}, "config": {"seed": 0}, "base_model": "someone/base"}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture(scope="module")
def answers(hub, client, model, checkpoint):
    """By name, what each command answered; all in one process."""
    hub.create("you/theirs")
    hub.create("me/edited", files={"card/0.png": b"old", "notes.txt": b"mine"})
    hub.fail("POST /api/repos/create", status=503, times=2)  # the first push
    hub.fail("POST /api/models/me/flaky/commit", status=500, times=2)
    hub.fail("POST /api/models/me/cut/preupload", status=None, times=1)
    hub.fail("POST /api/models/me/down/commit", status=502)
    push = ["push", str(model)]
    commands = {
        "first": ([*push, "me/rabbit", "--private", "--message", "One rabbit"], "hf_me"),
        "again": ([*push, "me/rabbit"], "hf_me"),
        "without an owner": ([*push, "hare"], "hf_me"),
        "edited": ([*push, "me/edited"], "hf_me"),
        "flaky": ([*push, "me/flaky"], "hf_me"),
        "cut": ([*push, "me/cut"], "hf_me"),
        "down": ([*push, "me/down"], "hf_me"),
        "run": (["push", str(checkpoint.parent), "me/run"], "hf_me"),
        "no token": ([*push, "me/x"], None),
        "bad token": ([*push, "me/x"], "hf_wrong"),
        "somebody's": ([*push, "you/theirs"], "hf_me"),
        "in somebody's name": ([*push, "you/new"], "hf_me"),
        "bad name": ([*push, "me/rabbit lora"], "hf_me"),
        "no folder": (["push", str(model / "no"), "me/x"], "hf_me"),
        "no model": (["push", str(model / "card"), "me/x"], "hf_me"),
        "read by nobody": (["evaluate", "me/rabbit", "--base", "x", "--prompts", "a", "--reward", "demo-soft"], None),
    }
    asked = json.dumps([{"argv": argv, "token": token} for argv, token in commands.values()])
    done = client("run_commands.py", asked)
    assert done.returncode == 0, done.stderr[-5000:]
    return dict(zip(commands, json.loads(done.stdout.splitlines()[-1]), strict=True))


def refused(answer) -> str:
    assert answer["code"] == 2 and "Traceback" not in answer["err"]
    return answer["err"]


def test_a_push_brings_all_of_the_model_and_prints_where_it_is(hub, answers, model):
    assert answers["first"]["code"] == 0, answers["first"]["err"]
    url = f"{hub.url}/me/rabbit/commit/{hub.repositories['me/rabbit'].at('main').oid}"
    assert answers["first"]["out"].splitlines()[-1] == url
    files = {path: (model / path).read_bytes() for path in (LORA, "dpok_config.json", "card/1.png")}
    card = CARD.replace("# rabbit", "# me/rabbit").replace('("rabbit")', '("me/rabbit")').encode()
    assert hub.files("me/rabbit") == {**files, "README.md": card}
    assert (model / "README.md").read_text() == CARD
    assert hub.repositories["me/rabbit"].private
    assert answers["first"]["waits"] == [1.0, 2.0]  # the Hub was busy twice


def test_a_second_push_sends_nothing(hub, answers):
    assert answers["again"]["code"] == 0 and hub.messages("me/rabbit") == ["One rabbit"]
    assert answers["again"]["out"].splitlines()[-1] == answers["first"]["out"].splitlines()[-1]


def test_a_name_without_an_owner_is_the_tokens(hub, answers):
    assert (
        answers["without an owner"]["code"] == 0
        and b'load_lora_weights("me/hare")' in hub.files("me/hare")["README.md"]
    )
    assert not hub.repositories["me/hare"].private


def test_pictures_of_the_card_are_replaced_and_other_files_are_left_alone(hub, answers):
    files = hub.files("me/edited")
    assert answers["edited"]["code"] == 0 and files["notes.txt"] == b"mine"
    assert [path for path in files if path.startswith("card/")] == ["card/1.png"]


@pytest.mark.parametrize("name", ["flaky", "cut"])
def test_what_fails_by_chance_is_tried_again(hub, answers, model, name):
    assert answers[name]["code"] == 0, answers[name]["err"]
    assert answers[name]["waits"] and hub.files(f"me/{name}")[LORA] == (model / LORA).read_bytes()


def test_a_hub_that_stays_down(hub, answers):
    assert "the Hub does not answer as it should (HfHubHTTPError: Server error '502" in refused(answers["down"])
    assert hub.messages("me/down") == []  # nothing half-done


def test_of_a_checkpoint_the_weights_go_up_with_a_card(hub, answers):
    files = hub.files("me/run")
    assert answers["run"]["code"] == 0 and set(files) == {LORA, "README.md"}
    card = files["README.md"].decode()
    assert "base_model: someone/base\n" in card and 'load_tuned("me/run")' in card and "- lora\n" in card


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no token", "there is no token to push to me/x with. Run `hf auth login`"),
        ("bad token", "the Hub does not accept the token that was to push to me/x. Run `hf auth login`"),
        ("somebody's", "this account, or its token, may not write to you/theirs. Choose a repository under a name of"),
        ("in somebody's name", "this account, or its token, may not write to you/new."),
        ("bad name", "'me/rabbit lora' cannot be the name of a repository: "),
        ("no folder", "there is no folder "),
        ("no model", "holds no model: no pytorch_lora_weights.safetensors"),
        ("read by nobody", "there is no folder me/rabbit here, and as a Hub id: 401 .* `hf auth login`"),
    ],
)
def test_what_is_refused_is_told_in_words(hub, answers, name, words):
    assert re.search(words, refused(answers[name])), answers[name]["err"]
    assert hub.messages("you/theirs") == [] and not {"me/x", "you/new"} & set(hub.repositories)


# --- without a Hub ----------------------------------------------------------------------------------------------------


def test_of_a_run_the_newer_of_checkpoint_and_saved_model_is_taken(checkpoint):
    run = checkpoint.parent
    assert newest_model(run) == checkpoint
    saved = run / "model"
    saved.mkdir()
    (saved / LORA).write_bytes(b"lora")
    state = checkpoint / "trainer_state.json"
    os.utime(saved / LORA, (1, 1))
    assert newest_model(run) == checkpoint and newest_model(saved) == saved and newest_model(checkpoint) == checkpoint
    os.utime(saved / LORA, (state.stat().st_mtime + 1,) * 2)
    assert newest_model(run) == saved
    state.rename(checkpoint / "away")  # a half-written checkpoint is none
    assert find_model(run) == saved


def test_a_card_that_names_the_repository_stays_as_it_is():
    card = CARD.replace("rabbit", "me/rabbit")
    assert card_for(card, "me/rabbit") == card
    assert card_for(card, "you/rabbit") == CARD.replace("rabbit", "you/rabbit")
    assert card_for("no code\n", "me/rabbit") == "no code\n"


def test_of_a_checkpoint_nothing_of_this_machine_goes_up(tmp_path):
    state = {
        "epoch": 3,
        "config": {"seed": 0, "output_dir": str(tmp_path), "tracker_kwargs/wandb/entity": "my-team"},
        "base_model": str(tmp_path),
        "callbacks": {"best_metric": 0.5, "best_model_checkpoint": str(tmp_path / "checkpoint-2")},
    }
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "optimizer.bin").write_bytes(b"moments")
    files = checkpoint_files(tmp_path)
    assert files.keys() == {"trainer_state.json", "optimizer.bin"}
    assert json.loads(files["trainer_state.json"]) == {
        "epoch": 3,
        "config": {"seed": 0},
        "base_model": None,
        "callbacks": {"best_metric": 0.5, "best_model_checkpoint": None},
    }
