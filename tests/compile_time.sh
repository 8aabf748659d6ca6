#!/usr/bin/env bash
# How long it takes to compile what users include, as multiples of #include <xsimd/xsimd.hpp> alone: CPU seconds of the
# compiler at -O2, the best of three. Fails where a multiple is over its limit.
#   tests/compile_time.sh           the headers, the README's first example, and the sources of tetromino::cpu
#   tests/compile_time.sh --all     every source of the tests and examples too, as the dev preset compiles them
set -euo pipefail
unset CDPATH
export LC_ALL=C  # seconds with a point
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cxx=${CXX:-c++}
TIMEFORMAT=%U

# seconds COUNT COMMAND...   of CPU: the least that one of COUNT runs took
seconds() {
  local count=$1 i
  shift
  for ((i = 0; i < count; ++i)); do
    { time "$@" >"$work/said" 2>&1; } 2>&1 || { cat "$work/said" >&2 && exit 2; }
  done | sort -n | head -n 1
}
compile() { "$cxx" -std=c++20 -O2 -I "$root/include" -c "$1" -o "$work/out.o"; }

echo '#include <xsimd/xsimd.hpp>' >"$work/xsimd.cpp"
if ! compile "$work/xsimd.cpp" 2>/dev/null; then
  echo "skipped: xsimd is not installed"
  exit 77
fi
unit=$(seconds 5 compile "$work/xsimd.cpp")
printf '%8s %8s %6s  (%s s is 1)\n' seconds ratio limit "$unit"

status=0
# state LIMIT NAME COUNT COMMAND...
state() {
  local limit=$1 name=$2 taken
  shift 2
  taken=$(seconds "$@")
  awk -v t="$taken" -v u="$unit" -v l="$limit" -v n="$name" \
    'BEGIN { printf "%8.2f %8.2f %6s  %s%s\n", t, t / u, l, n, (t > l * u ? "   OVER" : ""); exit (t > l * u) }' || status=1
}

echo '#include <tetromino/tetromino.hpp>' >"$work/umbrella.cpp"
sed -n '/^```cpp$/,/^```$/p' "$root/README.md" | sed '/^```$/,$d' | grep -v '^```' >"$work/example.cpp"
sed 's@<tetromino/tetromino.hpp>@&\n#include <tetromino/cpu.hpp>@; s/tt::automatic/tt::cpu/g' "$work/example.cpp" >"$work/example_cpu.cpp"
grep -q 'tt::cpu' "$work/example_cpu.cpp" || { echo "the README's first example does not say tt::automatic" >&2; exit 2; }
state 1.2 "<tetromino/tetromino.hpp>" 5 compile "$work/umbrella.cpp"
state 6.2 "README, first example" 3 compile "$work/example.cpp"
state 2.6 "README, first example, through tetromino::cpu" 3 compile "$work/example_cpu.cpp"

# The compiler's commands, as CMake writes them.
tests=OFF
[ "${1:-}" != --all ] || tests=ON
CXX=$cxx cmake -C "$root/cmake/presets/dev.cmake" -S "$root" -B "$work/build" -D TETROMINO_TESTS=$tests \
  -D TETROMINO_EXAMPLES=$tests -D TETROMINO_CCACHE=OFF -D CMAKE_DISABLE_PRECOMPILE_HEADERS=ON \
  >"$work/said" 2>&1 || { cat "$work/said" >&2 && exit 2; }
cd "$work/build"
field() { sed -n "s/^ *\"$1\": \"\\(.*\\)\",*\$/\\1/p" compile_commands.json | sed 's/\\"/"/g; s/\\\\/\\/g'; }
run_command() { (cd "$1" && eval "$2"); }
while IFS=$'\t' read -r folder file command; do
  name=${file#"$work/build/"}
  count=1
  [[ $name != cpu/* ]] || count=3
  state 15 "${name#"$root/"}" "$count" run_command "$folder" "$command"
done < <(paste <(field directory) <(field file) <(field command))
exit $status
