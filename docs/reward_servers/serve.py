"""Serves a reward to `dpok_trl.rewards.remote.RemoteReward` from an environment where dpok-trl cannot be installed.

Needs Python 3.8 and Pillow. Keep this file beside the one that imports it. The protocol is described in remote-rewards.md.
"""

import argparse
import base64
import io
import json
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


MAX_BYTES = 256 * 2**20  # of a request


def arguments(description):
    """The parser of a server's command line; add what else is needed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets every machine in")
    parser.add_argument("--port", type=int, default=8000)
    return parser


def read(body):
    """Pictures, prompts and metadata of a request; a ValueError says what is wrong with it."""
    request = json.loads(body)
    for name in ("images", "prompts"):
        if not isinstance(request, dict) or not isinstance(request.get(name), list):
            raise ValueError(f'the request has no list "{name}"')
    prompts = request["prompts"]
    metadata = request.get("metadata") or [{} for _ in prompts]
    if not len(request["images"]) == len(prompts) == len(metadata):
        raise ValueError("images, prompts and metadata must be equally many")
    pictures = []
    for text in request["images"]:
        picture = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG", "JPEG", "WEBP"))
        pictures.append(picture.convert("RGB"))
    return pictures, prompts, metadata


class Handler(BaseHTTPRequestHandler):
    timeout = 120  # seconds of silence after which a connection is given up

    def do_GET(self):
        self.send(200, {"name": self.server.name, "info": None})

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= MAX_BYTES:
            return self.send(413, {"error": f"a request has 1 to {MAX_BYTES} bytes"})
        try:
            pictures, prompts, metadata = read(self.rfile.read(length))
        except (ValueError, TypeError, OSError) as error:  # OSError is Pillow's, for what is no picture
            return self.send(400, {"error": str(error)})
        try:
            with self.server.lock:  # one at a time: models are rarely safe to call from several threads
                rewards = self.server.score(pictures, prompts, metadata)
        except Exception as error:  # of the model: the client is told, the server stays
            traceback.print_exc()
            return self.send(500, {"error": f"{type(error).__name__}: {error}"})
        self.send(200, {"rewards": rewards})

    def send(self, status, answer):
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def make_server(score, name, host, port):
    """`score(pictures, prompts, metadata)` gives a list with a float for each picture, None where the reward does not apply."""
    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    server.score, server.name, server.lock = score, name, threading.Lock()
    return server


def serve(score, name, args):
    with make_server(score, name, args.host, args.port) as server:
        print(f"Serving {name} at http://{args.host}:{server.server_port} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
