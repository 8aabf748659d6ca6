#!/usr/bin/env bash
# Builds the tests for 64-bit ARM and runs them under emulation (NEON). Options go to ctest; without any, the tests of
# the 4-bit half run. Needs the packages g++-aarch64-linux-gnu and qemu-user, and Catch2 2, which has no compiled part.
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/setup.sh"

for command in aarch64-linux-gnu-g++ qemu-aarch64; do
  if ! command -v $command >/dev/null; then
    echo "skipped: $command is not installed (packages g++-aarch64-linux-gnu and qemu-user)"
    exit 77
  fi
done
if [ ! -e /usr/include/catch2/catch.hpp ]; then
  echo "skipped: only the headers of Catch2 2 can be cross-compiled here"
  exit 77
fi

# headers alone, but Debian keeps its package file in a folder of the architecture
xsimd=$(ls -d /usr/lib/*/cmake/xsimd 2>/dev/null | head -n 1 || true)
folder=${TETROMINO_BUILD_DIR:-$root/build/tests-aarch64}
build "$folder" dev all -D CMAKE_TOOLCHAIN_FILE="$root/cmake/aarch64-linux-gnu.cmake" -D CMAKE_CXX_FLAGS= \
  ${xsimd:+-D xsimd_DIR="$xsimd"} -D TETROMINO_EXAMPLES=OFF -D TETROMINO_TEST_TIMEOUT=1800

say "testing under $(qemu-aarch64 --version | head -n 1)"
[ $# -gt 0 ] || set -- -L 'core|isa'
ctest --test-dir "$folder" --parallel "$jobs" --output-on-failure --no-tests=error "$@"
