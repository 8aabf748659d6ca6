#!/usr/bin/env bash
# Builds the examples and runs them on the bundled model; what is missing is installed first.
# TETROMINO_BUILD_DIR says where to build (build/quickstart); CXX and CMAKE_PREFIX_PATH mean what they always do.
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/setup.sh"

folder=${TETROMINO_BUILD_DIR:-$root/build/quickstart}
data=examples/data
cd "$root"

install_packages g++:c++ cmake:cmake ninja-build:ninja libxsimd-dev libfmt-dev nlohmann-json3-dev libcli11-dev \
  libopenmpi-dev openmpi-bin:mpirun
build "$folder" release all -D TETROMINO_TESTS=OFF -D TETROMINO_BENCHMARKS=OFF -D TETROMINO_CUDA=OFF

# step "what it shows" COMMAND...
step() {
  say "$1"
  shift
  printf '$ %s\n' "$*"
  PATH="$folder/examples:$PATH" "$@" || fail "$1 ended with exit code $?"
}

step "How many bits each recipe takes and how much of the model's weights it keeps (QSNR: more dB are better)" \
  quantize_checkpoint $data/moe-16x2.safetensors --compare

out=$folder/moe-16x2.mxfp4.safetensors
step "The same model written in 4 bits, in the layout that gpt-oss uses" \
  quantize_checkpoint $data/moe-16x2.safetensors "$out" --recipe mxfp4-32/oas --layout gpt-oss
step "What was written, read back by a second program and compared with the original" \
  verify_checkpoint $data/moe-16x2.safetensors "$out"

step "Where to put 128 experts on 8 nodes so that tokens stay close to them (report: $folder/placement.html)" \
  place_experts $data/routing-128x8.small.safetensors --nodes 8 --gpus 8 --slots 16 --report "$folder/placement.html"

model="$data/moe-16x2.safetensors $data/moe-16x2.heldout.safetensors"
step "The model evaluated on text that it never saw, from 32-bit to 4-bit weights and activations" \
  moe_engine $model --compare
for placement in contiguous local; do
  step "The same on 4 ranks, 2 nodes; experts placed: $placement" \
    mpirun -n 4 moe_engine $model --nodes 2 --placement $placement
done

say "done; the tests are started by tests/run.sh"
