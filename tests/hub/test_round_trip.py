"""Train on a base of the Hub, push, load by name into a stock pipeline: the identical image. A Hub of our own serves it."""

import json

import pytest
import yaml
from hub_families import MAKE


EPOCHS = 2


def last_line(done) -> dict:
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def bases(hub, tmp_path_factory):
    """The pretrained pipelines, as repositories of somebody else."""
    for family, make in MAKE.items():
        folder = tmp_path_factory.mktemp(family)
        make().save_pretrained(folder)
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        hub.create(f"someone/tiny-{family}", files=files)


@pytest.fixture(
    scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one process", "two processes"]
)
def round_trip(request, hub, client, bases, tmp_path_factory):
    """The folder of the runs, the owner of the repositories, and how far the loaded images are from those of the trained pipelines."""
    folder, owner = tmp_path_factory.mktemp("runs"), "me" if request.param == 1 else "you"
    token = f"hf_{owner}"
    done = client("train_and_push.py", folder, owner, EPOCHS, token=token, processes=request.param)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder, owner, last_line(client("load_from_hub.py", folder, owner, token=token))


def test_what_is_loaded_draws_the_identical_image(round_trip):
    _, _, differences = round_trip
    for family, found in differences.items():
        assert found.pop("base") > 1e-3, family  # the training did something
        assert set(found.values()) == {0.0}, family
    assert set(differences) == {"sd", "sdxl", "flux"}


def test_the_repositories(hub, round_trip):
    _, owner, _ = round_trip
    for family in MAKE:
        card = hub.files(f"{owner}/{family}-lora")["README.md"].decode()
        assert yaml.safe_load(card.split("---")[1])["base_model"] == f"someone/tiny-{family}"
        assert f'load_lora_weights("{owner}/{family}-lora")' in card
        assert hub.repositories[f"{owner}/{family}-lora"].private is (family == "sdxl")
    assert hub.messages(f"{owner}/flux-lora") == ["End of training"]
    assert hub.messages(f"{owner}/sd-lora") == ["Training in progress, step 1", "End of training"]


def test_the_newest_checkpoint_goes_along_without_private_settings(hub, round_trip):
    folder, owner, _ = round_trip
    pushed = hub.files(f"{owner}/sd-lora")
    prefix = "last-checkpoint/"
    of_checkpoint = {path.removeprefix(prefix): content for path, content in pushed.items() if path.startswith(prefix)}
    newest = folder / "sd" / f"checkpoint-{EPOCHS}"
    local = {path.relative_to(newest).as_posix(): path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    state, local_state = (json.loads(files.pop("trainer_state.json")) for files in (of_checkpoint, local))
    assert of_checkpoint == local
    private = ("output_dir", "logdir", "resume_from", "tracker_kwargs", "accelerator_kwargs", "project_kwargs")
    kept = {key: value for key, value in local_state["config"].items() if key.split("/")[0] not in private}
    assert state == {**local_state, "config": kept} and state["base_model"] == "someone/tiny-sd"
    everything = b"".join(content for path, content in pushed.items() if path.endswith((".md", ".json")))
    assert str(folder).encode() not in everything and b"a-secret-team" not in everything
    assert not [path for path in hub.files(f"{owner}/flux-lora") if path.startswith(prefix)]
