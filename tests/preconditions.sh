#!/usr/bin/env bash
# Says which TETROMINO_EXPECTS of the headers no test has seen fire.
#   TETROMINO_PRECONDITION_LOG=fired.log ctest ... ; tests/preconditions.sh fired.log [HEADER...]
# Headers are names below include/tetromino that are left out, because their tests could not run here. The log is used
# up: the next run of all tests writes its own.
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
log=$1
shift
if [ ! -e "$log" ]; then
  echo "skipped: run the other tests first, they write down what fires"
  exit 77
fi
cd "$root/include/tetromino"

# header<TAB>message<TAB>how often it stands there
stated() {
  grep -rlF 'TETROMINO_EXPECTS(' . | sed 's@^\./@@' | grep -vx config.hpp | while read -r header; do
    perl -0777 -ne 'while (/TETROMINO_EXPECTS\([^";]*"([^"]*)"/g) { $n{$1}++ } END { print "'"$header"'\t$_\t$n{$_}\n" for keys %n }' \
      "$header"
  done
}

# the same of what fired: each line of a header once
fired() {
  sed -E 's@^.*include/tetromino/@@; :a; s@[^/:]+/\.\./@@; ta' "$log" | sort -u |
    sed -E 's@^([^:]*):[0-9]+: (.*)$@\1\t\2@' | sort | uniq -c | sed -E 's@^ *([0-9]+) (.*)$@\2\t\1@'
}

all=0 missing=0
fired >"$log.places"
while IFS=$'\t' read -r header message count; do
  for skipped in "$@"; do [ "$skipped" = "$header" ] && continue 2; done
  seen=$(awk -F '\t' -v h="$header" -v m="$message" '$1 == h && $2 == m { print $3 }' "$log.places")
  all=$((all + count))
  if [ "${seen:-0}" -lt "$count" ]; then
    echo "no test sees it fire: $header: \"$message\" (${seen:-0} of $count)"
    missing=$((missing + 1))
  fi
done < <(stated)
rm -f "$log.places" "$log"
echo "$all preconditions, $missing without a test"
[ "$missing" -eq 0 ] && exit
echo "expected a run of all tests: those that -R or -L left out may have seen more fire" >&2
exit 1
