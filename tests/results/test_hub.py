"""The card, and the upload as huggingface_hub's own client does it, to a stand-in for the Hub on this machine."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from dpok_trl.results.hub import write_model_card


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's API as an upload of small files needs. What comes in is kept on the server object."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = self.server
        if self.headers["Authorization"] != "Bearer secret":
            return self.answer(401, {"error": "who are you?"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            hub.created.append(asked)
            name = f"me/{asked['name']}"
            return self.answer(409 if name in hub.repositories else 200, {"url": f"{hub.url}/{name}", "id": name})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        repository, _, action = self.path.removeprefix("/api/models/").removesuffix("/main").rpartition("/")
        if action == "preupload":
            files = json.loads(body)["files"]
            return self.answer(200, {"files": [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files
            ]})  # fmt: skip
        if action == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            files = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in lines if e["key"] == "file"}
            (header,) = (e["value"]["summary"] for e in lines if e["key"] == "header")
            hub.repositories.setdefault(repository, []).append((header, files))
            return self.answer(200, {"commitUrl": f"{hub.url}/{repository}/commit/1", "commitOid": "1" * 40})
        return self.answer(404, {"error": self.path})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.created, server.repositories = [], {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


PUSH = """
import sys
from dpok_trl.results.hub import push_folder
folder, repo_id, private = sys.argv[1:]
print(push_folder(folder, repo_id, commit_message="Upload DPOK adapter", private={"yes": True, "no": False}.get(private)))
"""


def push(hub, folder: Path, repo_id: str, private: str = "", token: str = "secret") -> subprocess.CompletedProcess:
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder.parent / "home"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, "-c", PUSH, str(folder), repo_id, private]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_lora_weights.safetensors").write_bytes(bytes(range(256)) * 40)
    write(tmp_path / "model")
    return tmp_path / "model"


CARD = {
    "model_name": "me/rabbit",
    "pipeline": "StableDiffusionPipeline",
    "base_model": "someone/base",
    "is_adapter": True,
    "loading_code": lambda base, repository: f'pipe = load("{base}", "{repository}")',
    "reward": "red",
    "config": {"seed": 0, "output_dir": "/home/me/runs", "tracker_kwargs/wandb/entity": "me", "kl_weight": 0.02},
    "epochs": 3,
    "updates": 6,
    "metrics": {"reward": 0.123456, "kl": 1.5e-5, "loss": 7.0},
}


def write(folder, **changes) -> ModelCard:
    write_model_card(folder, **{**CARD, **changes})
    return ModelCard.load(folder / "README.md")


def test_a_push_makes_the_repository_and_uploads_the_files_as_they_are(hub, folder):
    done = push(hub, folder, "rabbit", private="yes")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"{hub.url}/me/rabbit/commit/1"
    (asked,) = hub.created
    assert asked["name"] == "rabbit" and "private" in {asked.get("visibility"), asked.get("private") and "private"}
    ((message, files),) = hub.repositories["me/rabbit"]
    assert message == "Upload DPOK adapter"
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_repository_that_exists_is_pushed_to_again(hub, folder):
    hub.repositories["me/rabbit"] = []
    done = push(hub, folder, "me/rabbit")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(hub.repositories["me/rabbit"]) == 1
    assert hub.created[0].get("visibility") is None and hub.created[0].get("private") is None


def test_a_wrong_token_is_an_error(hub, folder):
    done = push(hub, folder, "me/rabbit", token="wrong")
    assert done.returncode != 0 and "401" in done.stderr
    assert hub.repositories == {}


def test_the_card_says_where_it_comes_from_and_what_it_reached(tmp_path):
    card = write(tmp_path)
    assert card.data.base_model == "someone/base"
    assert "| reward (last batch) | 0.1235 |" in card.text and "| KL per step (last batch) | 1.5e-05 |" in card.text
    assert "| 3, 6 |" in card.text and "`red`" in card.text


def test_a_run_without_a_kl_term_claims_none(tmp_path):
    assert "KL per step" not in write(tmp_path, metrics={"reward": 1.0}).text


def test_the_card_keeps_private_settings_out(tmp_path):
    card = write(tmp_path)
    kept = json.loads((tmp_path / "dpok_config.json").read_text())
    assert kept == {"seed": 0, "kl_weight": 0.02}
    assert "/home/me" not in card.content and "entity" not in card.content


@pytest.mark.parametrize("base_model", [None, "folder"])
def test_a_base_that_is_no_repository_is_not_linked(base_model, tmp_path):
    card = write(tmp_path, base_model=base_model and str(tmp_path))
    assert card.data.base_model is None and str(tmp_path) not in card.content
    assert "a local StableDiffusionPipeline" in card.text


def test_the_snippet_of_the_card_is_python(tmp_path):
    for base_model in ("someone/base", None):
        snippet = write(tmp_path, base_model=base_model).text.split("```python")[1].split("```")[0]
        compile(snippet, "card", "exec")
