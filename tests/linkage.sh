#!/usr/bin/env bash
# Usage: linkage.sh NM COMPILER INCLUDE FORWARD BACKWARD [FLAG]...
# Both objects are all headers. Two such files link: the only symbols that they do not share are their own functions.
# BACKWARD was compiled with the flags, -O0 and -fkeep-inline-functions: each function that linkers keep one copy of
# bears the name of the instruction set, so that objects for different sets never share one. Left out are the
# constructors, destructors and assignments that compilers add to data types by themselves, which copy and destroy
# members one by one; link_order.sh looks into them where they are optimized.
set -euo pipefail
nm=("$1") compiler=$2 include=$3 forward=$4 backward=$5
shift 5
plugin=$("$compiler" -print-file-name=liblto_plugin.so)  # BACKWARD is for the linker's optimizer, which spares its code
[[ $plugin != /* ]] || nm+=(--plugin "$plugin")
for object in "$forward" "$backward"; do
  if "${nm[@]}" --defined-only --extern-only "$object" | awk '$2 !~ /^[WVu]$/ { print $3 }' | grep -vE '^(_Z[78](for|back)wardv)$'; then
    echo "^ defined twice where two files include all headers"
    exit 1
  fi
done
set_name=$("$compiler" -std=c++20 "$@" -I "$include" -E -dM -include tetromino/config.hpp -x c++ /dev/null |
  awk '$2 == "TETROMINO_ISA" { print $3 }')
names=$("${nm[@]}" --defined-only "$backward" | awk '$2 == "W" { print $3 }' |
  grep -E '^_Z(Z|GVZ|Th?[0-9_]*)?N?[KVRO]*9tetromino' || true)
ours=$(paste <(echo "$names") <(c++filt <<<"$names") | awk -F '\t' '$2 ~ /^_Z|\(/ { print $1 }')  # not variables
added='([CD][0-9]Ev|(C[12]E|aSE)(RK|O)S[0-9A-Z]*_)$'
if grep -vE "[0-9]$set_name|$added" <<<"$ours" | c++filt | grep .; then
  echo "^ objects for other instruction sets have these functions too: see TETROMINO_ABI in config.hpp"
  exit 1
fi
count=$(grep -cE "[0-9]$set_name" <<<"$ours" || true)
echo "$count functions of ours with $set_name in their names"
[ "$count" -gt 500 ] || { echo "expected more than 500" && exit 1; }
