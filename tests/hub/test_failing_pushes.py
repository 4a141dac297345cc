"""Runs with push_to_hub: a push that fails loses and stops nothing; what can be known before is told before."""

import json

import pytest

from dpok_trl.results.hub import TRIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(hub, client, folder):
    hub.create("you/theirs")
    hub.fail("POST /api/models/me/down/commit", status=503)
    hub.fail("POST /api/repos/create", status=500, times=TRIES)  # of the first run, before it trains
    done = client("run_and_push.py", folder)
    assert done.returncode == 0, done.stderr[-5000:]
    hub.mend()
    return json.loads(done.stdout.splitlines()[-1])


def test_a_hub_that_stays_down_stops_no_run(runs, folder):
    run = runs["down"]
    assert run["epochs"] == 2
    model = folder / "down" / "model"
    told = f"It is saved in {model}. To push it: dpok-trl push {model} me/down"
    assert [told in message for message in run["said"]] == [True] and run["said"][0].endswith("Training goes on.")
    assert run["said"][0].startswith("the model of step 1 was not pushed: the Hub does not answer as it should")
    assert run["raised"].startswith("HubError: training is done, but the model of step 2 was not pushed: the Hub")
    assert told in run["raised"]
    assert {path.name for path in (folder / "down").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.slow
def test_the_command_that_was_told_pushes_it(hub, runs, client, folder):
    model = folder / "down" / "model"
    asked = json.dumps([{"argv": ["push", str(model), "me/down"], "token": "hf_me"}])
    done = client("run_commands.py", asked)
    assert json.loads(done.stdout.splitlines()[-1])[0]["code"] == 0, done.stdout
    files = hub.files("me/down")
    assert {path: files[path] for path in files if path != "README.md"} == {
        path.relative_to(model).as_posix(): path.read_bytes()
        for path in model.rglob("*")
        if path.is_file() and path.name != "README.md"
    }


def test_a_hub_that_is_down_at_the_start_is_tried_again_at_the_end(hub, runs):
    run = runs["late"]
    assert run["raised"] is None and run["epochs"] == 2
    assert len(run["said"]) == 1 and "Training begins all the same" in run["said"][0]
    assert hub.messages("me/late") == ["End of training"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-token", "HubError: there is no token to push to me/x with. Run `hf auth login`"),
        ("bad-token", "HubError: the Hub does not accept the token that was to push to me/x."),
        ("theirs", "HubError: this account, or its token, may not write to you/theirs."),
        ("bad-name", "HubError: 'me/rabbit lora' cannot be the name of a repository: "),
    ],
)
def test_what_the_hub_will_not_take_is_told_before_training(runs, folder, name, words):
    assert runs[name]["raised"].startswith(words) and runs[name]["epochs"] == 0
    assert not list((folder / name).glob("checkpoint-*")) and runs[name]["said"] == []


def test_a_run_goes_on_from_the_hub_as_if_it_had_never_stopped(hub, runs):
    assert runs["resumed"] == {"raised": None, "said": [], "epochs": 3, "identical": True}
    training = "Training in progress, step 1"
    assert hub.messages("me/resumed") == [training, "End of training", "End of training"]
