#!/usr/bin/env bash
# Builds the programs in tools/ and runs them on the bundled model; what is missing is installed first.
# TETROMINO_BUILD_DIR says where to build (build/quickstart); CXX and CMAKE_PREFIX_PATH mean what they always do.
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/setup.sh"

folder=${TETROMINO_BUILD_DIR:-$root/build/quickstart}
data=examples/data
cd "$root"

install_packages g++:c++ cmake:cmake ninja-build:ninja libxsimd-dev libfmt-dev nlohmann-json3-dev libcli11-dev \
  libeigen3-dev libopenmpi-dev openmpi-bin:mpirun
# little optimization builds fastest; the search for placements lives on vectors
build "$folder" dev tetromino_tools -D TETROMINO_TESTS=OFF -D CMAKE_CXX_FLAGS_RELEASE="-O1 -ftree-vectorize"

# step PROGRAM "what it shows" COMMAND...
step() {
  local program=$1 status=0
  [ -x "$folder/examples/$program" ] || fail "$program was not built: a package is missing, see above"
  say "$2"
  shift 2
  printf '$ %s\n' "$*"
  PATH="$folder/examples:$PATH" "$@" || status=$?
  [ $status -eq 0 ] || fail "$program ended with exit code $status"
}

step quantize_checkpoint "How many bits each recipe takes and how much of the model's weights it keeps (QSNR: more dB are better)" \
  quantize_checkpoint $data/moe-16x2.safetensors --compare

out=$folder/moe-16x2.mxfp4.safetensors
step quantize_checkpoint "The same model written in 4 bits, in the layout that gpt-oss uses" \
  quantize_checkpoint $data/moe-16x2.safetensors "$out" --recipe mxfp4-32/oas --layout gpt-oss
step verify_checkpoint "What was written, read back by a second program and compared with the original" \
  verify_checkpoint $data/moe-16x2.safetensors "$out"

step place_experts "Where to put 128 experts on 8 nodes so that tokens stay close to them (report: $folder/placement.html)" \
  place_experts $data/routing-128x8.small.safetensors --nodes 8 --gpus 8 --slots 16 --report "$folder/placement.html"

model="$data/moe-16x2.safetensors $data/moe-16x2.heldout.safetensors"
step moe_engine "The model evaluated on text that it never saw, from 32-bit to 4-bit weights and activations" \
  moe_engine $model --compare
for placement in contiguous local; do
  step moe_engine "The same on 4 ranks, 2 nodes; experts placed: $placement" \
    mpirun -n 4 moe_engine $model --nodes 2 --placement $placement
done

say "done; the tests are started by tests/run.sh"
