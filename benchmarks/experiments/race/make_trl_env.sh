#!/usr/bin/env bash
# Makes the virtual environment in which TRL's DDPOTrainer still runs: v0.23 is the last release that has it, and needs libraries of its time.
#
#     make_trl_env.sh FOLDER
#
# Does nothing where FOLDER has these versions already. PYTHON: the interpreter to start from (default: python3; 3.10 to 3.13).
# Where pip would bring a CUDA build of torch: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 FOLDER" >&2
    exit 2
fi
folder=$1
pins=(torch==2.13.0 trl==0.23.0 transformers==4.56.2 diffusers==0.35.1 peft==0.17.1 accelerate==1.10.1)

is_right() {
    "$folder/bin/python" - "${pins[@]}" numpy pillow <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

for pin in sys.argv[1:]:
    name, _, wanted = pin.partition("==")
    try:
        found = version(name).partition("+")[0]  # 2.13.0+cpu is 2.13.0
    except PackageNotFoundError:
        sys.exit(f"{name} is missing")
    if wanted and found != wanted:
        sys.exit(f"{name} is {found}, not {wanted}")
PYTHON
}

if [ -x "$folder/bin/python" ] && is_right; then
    echo "$folder has all versions already"
    exit 0
fi
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet "${pins[@]}" numpy pillow
is_right
echo "$folder is ready: export DPOK_TRL_ENV=$folder"
