#!/bin/bash
# Packs small checkpoints of many architectures and loads the results with the real readers:
#   tests/peers/run.sh [BUILD]      a build folder with the example programs; build by default
# Everything is installed into a virtual environment below the build folder: about 6 GB, most of it torch. llama.cpp is
# built there too, from the package llama-cpp-python, unless LLAMA_CPP_LIB_PATH names a build of it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=$(cd "${1:-build}" && pwd)
work=$build/peers
python=$work/venv/bin/python

programs=$(dirname "$(find "$build" -type f -name quantize_checkpoint -perm -u+x -print -quit)")
if [ ! -x "$programs/verify_checkpoint" ]; then
  echo "run.sh: no quantize_checkpoint and verify_checkpoint in $build: configure with -D TETROMINO_EXAMPLES=ON" >&2
  exit 1
fi
mkdir -p "$work"
[ -x "$python" ] || python3 -m venv "$work/venv"
"$python" -m pip install --quiet --requirement "$here/requirements.txt"
# Not for this very CPU: instructions that a virtual machine hides would end it.
CMAKE_ARGS="${CMAKE_ARGS:--D GGML_NATIVE=OFF}" "$python" -m pip install --quiet llama-cpp-python

cd "$here"
export PYTHONDONTWRITEBYTECODE=1
"$python" peers.py "$programs" "$work/models"
"$python" minilm.py "$programs" "$work"
"$python" engine.py "$programs" "$here/../../examples/data" "$work"
