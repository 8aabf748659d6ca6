#!/usr/bin/env bash
# Builds and runs the tests; what is missing is installed first.
#   tests/run.sh                    the default tests
#   tests/run.sh --slow             the slow ones only
#   tests/run.sh --fuzz SECONDS     look for new inputs that break a fuzz target, each for so long (needs clang)
#   tests/run.sh -R placement       further options go to ctest
# TETROMINO_PRESET picks a file of cmake/presets (dev, asan, tsan, fuzz), TETROMINO_BUILD_DIR says where to build,
# TETROMINO_SEED picks the random inputs; CXX and CMAKE_PREFIX_PATH mean what they always do.
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/setup.sh"

select=()
targets="all all_verify_interface_header_sets" options=()
if [ "${1:-}" = --slow ]; then
  select=(-C slow -L slow)
  shift
elif [ "${1:-}" = --fuzz ]; then
  TETROMINO_PRESET=fuzz
  select=(-L fuzz)
  targets=fuzzers
  options=(-D TETROMINO_FUZZ_SECONDS="$2" -D TETROMINO_CPU=OFF)
  shift 2
fi
preset=${TETROMINO_PRESET:-dev}
folder=${TETROMINO_BUILD_DIR:-$root/build/tests-$preset}

install_packages g++:c++ cmake:cmake ninja-build:ninja pkg-config:pkg-config catch2 libxsimd-dev libfmt-dev \
  libeigen3-dev nlohmann-json3-dev libcli11-dev libopenmpi-dev openmpi-bin:mpirun
if [ "$preset" != dev ]; then
  install_packages clang:clang++ libclang-rt-dev
fi
# The GPU code takes nvcc longer than all the rest takes g++: TETROMINO_CUDA=ON builds it, and tests that skip without a GPU.
build "$folder" "$preset" "$targets" -D TETROMINO_TESTS=ON -D TETROMINO_CUDA="${TETROMINO_CUDA:-OFF}" "${options[@]}"

say "testing"
status=0
ctest --test-dir "$folder" --parallel "$jobs" --output-on-failure --no-tests=error "${select[@]}" "$@" || status=$?
grep -h '^skipped: ' "$folder/Testing/Temporary/LastTest.log" | sort | uniq -c || true
[ $status -eq 0 ] || fail "some tests failed; a random one repeats with the TETROMINO_SEED that it printed"
