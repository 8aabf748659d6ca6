#!/usr/bin/env bash
# Runs clang-tidy (.clang-tidy says what it looks for) on the lines of C++ that differ from a commit, and looks whether
# all files are formatted where clang-format 14 is there (other versions break lines otherwise).
#   tests/tidy.sh [COMMIT]          by default where this branch left main; on main itself, the commit before
#   tests/tidy.sh --all FILE...     on whole files
# CLANG_TIDY and CLANG_FORMAT pick the programs.
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
tidy=${CLANG_TIDY:-clang-tidy}
skip() { echo "skipped: $1" && exit 77; }
command -v "$tidy" >/dev/null || skip "clang-tidy is not installed"

flags=(-x c++ -std=c++20 -Iinclude -Icuda/include -Itests -Iexamples '-DTETROMINO_TEST_DATA=""' '-DTETROMINO_TEST_PROGRAMS=""')
case $(uname -m) in x86_64) flags+=(-march=x86-64-v3) ;; esac
for folder in /usr/include/eigen3 /usr/lib/*/openmpi/include /usr/local/cuda/include; do
  [ ! -d "$folder" ] || flags+=(-isystem "$folder")
done

format=${CLANG_FORMAT:-clang-format}
if "$format" --version 2>/dev/null | grep -q 'version 14[.]' && git rev-parse --verify -q HEAD >/dev/null 2>&1; then
  git ls-files -z '*.hpp' '*.cpp' '*.h' '*.c' '*.cuh' '*.cu' | xargs -0 "$format" --dry-run -Werror ||
    { echo "clang-format has complaints, see above" && exit 1; }
fi

files=() options=()
if [ "${1:-}" = --all ]; then
  shift
  files=("$@")
else
  git rev-parse --verify -q HEAD >/dev/null 2>&1 || skip "this is not a git repository"
  base=${1:-}
  for name in origin/main main HEAD~1; do
    [ -z "$base" ] || break
    base=$(git merge-base HEAD "$name" 2>/dev/null || true)
    [ "$base" != "$(git rev-parse HEAD)" ] || base=
  done
  [ -n "$base" ] || skip "there is no commit to compare with"
  # [{"name": "include/a.hpp", "lines": [[3, 5], [9, 9]]}, ...]
  lines=$(git diff -U0 --no-ext-diff --no-color --diff-filter=d "$base" -- '*.hpp' '*.cpp' | awk '
    /^\+\+\+ b\// { file = substr($0, 7) }
    /^@@/ {
      split(substr($3, 2), at, ",")
      count = at[2] == "" ? 1 : at[2]
      if (count == 0) next
      if (!(file in ranges)) order[++n] = file
      ranges[file] = ranges[file] (ranges[file] == "" ? "" : ",") "[" at[1] "," at[1] + count - 1 "]"
    }
    END {
      for (i = 1; i <= n; ++i) printf "%s{\"name\":\"%s\",\"lines\":[%s]}", i == 1 ? "[" : ",", order[i], ranges[order[i]]
      if (n > 0) print "]"
    }')
  [ -n "$lines" ] || { echo "no line of C++ differs from ${base:0:12}" && exit 0; }
  options=(--line-filter="$lines")
  mapfile -t files < <(grep -o '"name":"[^"]*"' <<<"$lines" | cut -d '"' -f 4)
fi

# What does not compile here, for want of a package or because it is a part of another file, is left out.
check() {
  local file=$1 said
  shift
  said=$("$tidy" --quiet --warnings-as-errors='*' "$@" 2>/dev/null) && return
  if grep -q 'clang-diagnostic-error' <<<"$said"; then
    echo "left out: $file does not compile by itself here: $(grep -m 1 -o 'error: .*' <<<"$said")"
    return
  fi
  printf '%s\n' "$said"
  return 1
}
export -f check
export tidy
printf '%s\0' "${files[@]}" |
  xargs -0 -P "$(nproc 2>/dev/null || echo 2)" -I FILE bash -c 'check "$@"' check FILE "${options[@]}" FILE -- "${flags[@]}" ||
  { echo "clang-tidy has complaints, see above" && exit 1; }
echo "${#files[@]} files, no complaint"
