#!/bin/bash
# Packs small checkpoints of many architectures and loads the results with the real readers:
#   tests/peers/run.sh [BUILD]      a build folder with the example programs; build by default
# Everything is installed into a virtual environment below the build folder (BUILD/peers/venv, which may be a link): about
# 8 GB, most of it torch and vLLM. llama.cpp is built there too, from the package llama-cpp-python, unless
# LLAMA_CPP_LIB_PATH names a folder with the libraries of a build of it, such as build/bin of the same sources.
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
# Its rules for checkpoints are wanted, not its kernels and their versions of everything else.
"$python" -m pip install --quiet --no-deps --requirement "$here/requirements-alone.txt"
# Not for this very CPU: instructions that a virtual machine hides would end it.
llama_build="-D GGML_NATIVE=OFF"
[ -z "${LLAMA_CPP_LIB_PATH:-}" ] || llama_build="-D LLAMA_BUILD=OFF"
CMAKE_ARGS="${CMAKE_ARGS:-$llama_build}" "$python" -m pip install --quiet llama-cpp-python==0.3.36

cd "$here"
export PYTHONDONTWRITEBYTECODE=1
"$python" peers.py "$programs" "$work/models"
"$python" vllm_rules.py "$programs" "$work/models"
"$python" minilm.py "$programs" "$work"
"$python" engine.py "$programs" "$here/../../examples/data" "$work"
