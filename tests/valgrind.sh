#!/usr/bin/env bash
# Runs tests of the scalar path under valgrind: tests/valgrind.sh [TEST...], names below tests/ without .cpp.
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v valgrind >/dev/null || { echo "skipped: valgrind is not installed"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ $# -gt 0 ] || set -- scaling rounding hadamard options layout metrics matmul moe/router moe/dispatch moe/placement \
  moe/topology moe/migrate moe/place moe/group moe/cost comm/dispatcher io/safetensors io/safetensors_writer

compile() { ${CXX:-c++} -std=c++20 -O1 -g -D TETROMINO_SIMD=0 -I "$root/include" -I "$root/tests" "$@"; }
compile -c "$root/tests/support/main.cpp" -o "$work/main.o"
compile -c "$root/tests/support/places.cpp" -o "$work/places.o" -D TETROMINO_TEST_DATA="\"$root/examples/data\""
for test in "$@"; do
  compile "$root/tests/$test.cpp" "$work/main.o" "$work/places.o" -pthread -o "$work/test"
  if ! valgrind --quiet --error-exitcode=9 --leak-check=full --soname-synonyms=somalloc=nouserintercepts "$work/test" >"$work/said" 2>&1; then
    echo "$test: errors"
    cat "$work/said"
    exit 1
  fi
  echo "$test: clean"
done
