#!/usr/bin/env bash
# Mutation check: plants the faults of tests/mutations.txt one at a time in a copy of the headers and runs the test that
# must notice. A fault is caught if the test fails, or if a static_assert of the library does.
#   tests/mutate.sh                 all of them
#   tests/mutate.sh router e2m1-    those whose names contain one of the words
#   tests/mutate.sh --check         only whether each fault still applies
# CXX and TETROMINO_JOBS pick the compiler and how many run at once, TETROMINO_FAULTS another list of faults.
set -euo pipefail
export LC_ALL=C
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
list=${TETROMINO_FAULTS:-$root/tests/mutations.txt}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export root work CXX=${CXX:-c++}
launcher=$(command -v ccache || true)
jobs=${TETROMINO_JOBS:-$(nproc)}
eigen=$(pkg-config --cflags eigen3 2>/dev/null || echo -I /usr/include/eigen3)
export launcher eigen libraries=
"$CXX" -E -include catch2/catch.hpp -x c++ /dev/null >/dev/null 2>&1 || libraries=-lCatch2  # Catch2 3
"$CXX" -x c++ - -lfmt -o /dev/null <<<'int main() {}' 2>/dev/null && libraries+=' -lfmt'

check_only=no
if [ "${1:-}" = --check ]; then
  check_only=yes
  shift
fi

# build TEST INCLUDE-FOLDER OUTPUT
build() {
  local flags=(-std=c++20 -O1 -I "$2" -I "$root/tests") objects=("$3.o" "$work/main.o" "$work/places.o")
  if [[ $1 == isa/* ]]; then flags+=(-mavx2 -mfma -mf16c); else flags+=(-D TETROMINO_SIMD=0); fi
  # shellcheck disable=SC2206  # several flags are several words
  flags+=($eigen)
  $launcher "$CXX" "${flags[@]}" -c "$root/tests/$1.cpp" -o "$3.o" || return
  if [ "$1" = cpu ]; then  # kernels as they are, and their choice as it is in the headers given
    "$CXX" "${flags[@]}" -D TETROMINO_CPU_SELECT=2 -c -x c++ "$2/tetromino/detail/dispatch/select.hpp" -o "$3.select.o" ||
      return
    objects+=("$3.select.o" "$work/cpu/libtetromino_cpu.a")
  fi
  "$CXX" "${objects[@]}" $libraries -pthread -o "$3"
}

# plant NAME FILE TEST SCRIPT: 0 caught, 1 survived, 2 neither
plant() {
  local name=$1 file=$2 test=$3 script=$4 copy=$work/$1 status=0 ended=0
  if sed "$script" "$root/include/tetromino/$file" | cmp -s - "$root/include/tetromino/$file"; then
    echo "error     $name: does not apply to $file any more"
    return 2
  fi
  [ "$check_only" = no ] || return 0
  mkdir -p "$copy"
  cp -r "$root/include" "$copy/"
  sed "$script" "$root/include/tetromino/$file" >"$copy/include/tetromino/$file"
  if ! build "$test" "$copy/include" "$copy/test" 2>"$copy/messages"; then
    if grep -qE 'static assertion failed|static_assert failed|condition for static assertion' "$copy/messages"; then
      echo "caught    $name by a static_assert"
    else
      echo "error     $name: does not compile: $(grep -m 1 error "$copy/messages")"
      status=2
    fi
  else
    { timeout 240 "$copy/test" >/dev/null 2>&1; } 2>/dev/null || ended=$?
    case $ended in
      0) echo "SURVIVED  $name: $test does not notice" && status=1 ;;
      124) echo "caught    $name by $test, which does not end" ;;
      *) echo "caught    $name by $test" ;;
    esac
  fi
  rm -rf "$copy"
  return $status
}

# whole TEST: the test passes without any fault
whole() {
  local program=$work/whole-${1//\//.}
  if build "$1" "$root/include" "$program" 2>"$program.messages" &&
    timeout 120 "$program" >>"$program.messages" 2>&1; then return; fi
  echo "error: $1 fails, or takes over 120 s, without any fault"
  tail -n 5 "$program.messages"
  return 1
}
export -f plant build whole
export check_only

names=() files=() tests=() scripts=()
while read -r name file test script; do
  [[ -z $name || $name == \#* ]] && continue
  wanted=$([ $# -eq 0 ] && echo yes || echo no)
  for word in "$@"; do [[ $name == *$word* ]] && wanted=yes; done
  [ "$wanted" = yes ] || continue
  names+=("$name") files+=("$file") tests+=("$test") scripts+=("$script")
done <"$list"
[ ${#names[@]} -gt 0 ] || { echo "no fault of that name" >&2; exit 2; }

if [ "$check_only" = no ]; then
  for part in main places; do
    $launcher "$CXX" -std=c++20 -O1 -D TETROMINO_TEST_DATA="\"$root/examples/data\"" -I "$root/include" -I "$root/tests" \
      -c "$root/tests/support/$part.cpp" -o "$work/$part.o"
  done
  if [[ " ${tests[*]} " == *" cpu "* ]]; then
    cmake -S "$root" -B "$work/cpu" -D CMAKE_BUILD_TYPE=Release -D CMAKE_CXX_COMPILER="$CXX" -D TETROMINO_CPU=ON \
      -D TETROMINO_CUDA=OFF >/dev/null
    cmake --build "$work/cpu" --parallel "$jobs" --target tetromino_cpu >/dev/null
  fi
  printf '%s\n' "${tests[@]}" | sort -u | xargs -P "$jobs" -I TEST bash -c 'whole "$1"' whole TEST || exit 2
fi

for i in "${!names[@]}"; do
  printf '%s\0%s\0%s\0%s\0' "${names[i]}" "${files[i]}" "${tests[i]}" "${scripts[i]}"
done | { xargs -0 -n 4 -P "$jobs" bash -c 'plant "$@" || true' plant; } | tee "$work/report"

caught=$(grep -c '^caught' "$work/report" || true)
broken=$(grep -c '^error' "$work/report" || true)
if [ "$check_only" = yes ]; then
  echo "${#names[@]} faults, $broken of them do not apply"
  [ "$broken" -eq 0 ]
else
  names_of() { sed -n "s/^$1 *\([^ :]*\).*/ \1/p" "$work/report" | sort | tr -d '\n'; }
  survived=$(names_of SURVIVED) broken=$(names_of error)
  echo "caught $caught of ${#names[@]} planted faults${survived:+; survived:$survived}${broken:+; not planted:$broken}"
  [ "$caught" -eq "${#names[@]}" ]
fi
