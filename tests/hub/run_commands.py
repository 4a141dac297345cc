"""Runs `dpok-trl` commands one after the other: [{"argv": [...], "token": "hf_me" or null}, ...] in, what they print and return out. Run by test_push.py.

Waiting between tries is left out, so that the tests need not wait.
"""

import contextlib
import io
import json
import os
import sys
import time

from dpok_trl import cli


waits = []
time.sleep = waits.append
answers = []
for command in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    if command["token"] is not None:
        os.environ["HF_TOKEN"] = command["token"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(command["argv"])
    answers.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "waits": waits.copy()})
    waits.clear()
print(json.dumps(answers))
