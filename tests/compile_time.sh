#!/usr/bin/env bash
# How long <tetromino/tetromino.hpp> takes to compile: CPU seconds at -O2, the best of five; an error above 1.5.
set -euo pipefail
unset CDPATH
export LC_ALL=C  # seconds with a point
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TIMEFORMAT=%U
best=$(for _ in 1 2 3 4 5; do
  { time "${CXX:-c++}" -std=c++20 -O2 -I "$root/include" -x c++ -c -o /dev/null - <<<'#include <tetromino/tetromino.hpp>'; } 2>&1
done | sort -n | head -n 1)
echo "$best s"
awk -v best="$best" 'BEGIN { exit !(best < 1.5) }'
