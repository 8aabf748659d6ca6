#!/usr/bin/env bash
# Compiles every test and example for other instruction sets than the one they are tested with, warnings being errors,
# and runs none of them.
#   tests/warnings.sh               x86-64, x86-64-v2, x86-64-v3 and x86-64-v4, by g++ and clang++ where they are
#   tests/warnings.sh x86-64-v4     some of them; CXX="g++-14 clang++-19" names other compilers
# TETROMINO_BUILD_DIR says where to build. The tests in isa/, which choose for themselves, are compiled as the others.
compilers=${CXX:-}
unset CXX
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/setup.sh"

if [ "$(uname -m)" != x86_64 ]; then
  echo "skipped: the instruction sets are those of x86-64"
  exit 77
fi
[ $# -gt 0 ] || set -- x86-64 x86-64-v2 x86-64-v3 x86-64-v4
folder=${TETROMINO_BUILD_DIR:-$root/build/warnings}
export TETROMINO_WARNINGS_AS_ERRORS=ON
status=0
for compiler in ${compilers:-g++ clang++}; do
  command -v "$compiler" >/dev/null || { echo "skipped: $compiler is not installed"; continue; }
  for set in "$@"; do
    log=$folder/${compiler##*/}-$set.log
    mkdir -p "$folder"
    if CXX=$compiler CXXFLAGS="${CXXFLAGS:-} -march=$set" build "$folder/${compiler##*/}-$set" dev all \
      -D TETROMINO_TEST_INSTRUCTION_SETS=native -D TETROMINO_TESTS_PER_PROGRAM=6 >"$log" 2>&1; then
      echo "$compiler, $set: $(grep -c '\[[0-9]*/[0-9]*\] Building CXX' "$log" || true) files, no warning"
    else
      grep -E -m 20 'error|warning' "$log" || tail -n 20 "$log"
      echo "$compiler, $set: FAILED, see $log"
      status=1
    fi
  done
done
exit $status
