#!/usr/bin/env bash
# Usage: link_order.sh COMPILER WORK LEVELS SETS PROGRAMS INCLUDE...
# SETS: avx2, avx512 or both, beside plain x86-64. PROGRAMS: objects, with | between them, of programs that place experts
# and were compiled for AVX2; a look at them stands in for placement.cpp, which takes most of the time to compile. With -
# it is compiled.
# Objects compiled for different instruction sets link into one program, in any order, and none runs the other's vector
# code: no function of ours that they share has any, and the program runs on an old CPU (qemu-x86_64, if it is there).
# Objects also share templates of the standard library and of JSON, such as std::vector<double>::_M_fill_assign; with
# little optimization operator== of vectors too, with none std::max<float> and the constructors and assignments that
# compilers add to data types. An old CPU runs what makes use of those where the plain object comes first: that is all
# up to -O1 and with -Og, else what places experts and reads files.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/link
compiler=$1 work=$2 levels=$3 sets=$4 programs=$5
shift 5
includes=()
for folder; do [[ -z $folder ]] || includes+=("-I$folder"); done
if [[ $("$compiler" -dumpmachine) != x86_64-* ]] || ! command -v objdump nm >/dev/null; then
  echo "skipped: this is not x86-64, or there are no binutils"
  exit 77
fi
if ! "$compiler" -E -dM -std=c++20 "${includes[@]}" -include tetromino/config.hpp -x c++ /dev/null |
  grep -x '#define TETROMINO_SIMD 1' >/dev/null; then  # with -q it would leave, and the compiler fail to write on
  echo "skipped: xsimd is not installed, and without it there is no vector code"
  exit 77
fi
mkdir -p "$work"
old_cpu=$(command -v qemu-x86_64 || true)
declare -A flags=([plain]="-march=x86-64" [avx2]="-march=x86-64 -mavx2 -mfma"
  [avx512]="-march=x86-64 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd")

# The functions of an object that hold instructions which plain x86-64 lacks: VEX or EVEX encoded. Linked by itself, it
# has one section in place of thousands, which objdump takes minutes for.
vector_code() {
  "$compiler" -nostdlib -no-pie -Wl,--unresolved-symbols=ignore-all,--defsym=__dso_handle=0,-e,0 "$1" -o "$work/alone"
  objdump -d --no-show-raw-insn "$work/alone" | awk '/^[0-9a-f]+ <.*>:$/ { name = substr($2, 2, length($2) - 3) }
    $2 ~ /^v/ && $2 !~ /^ver[rw]/ || /%[yz]mm/ { print name }' | sort -u
}
# What linkers keep one of: weak functions whose own name is in our namespace.
weak() {
  nm --defined-only "$1" | awk '$2 ~ /^[WVu]$/ { print $3 }' |
    grep -E '^_Z(Z|GVZ|T[VTIS]|Th?[0-9_]*)?N?[KVRO]*9tetromino' | sort || true
}
added='([CD][0-9]Ev|(C[12]E|aSE)(RK|O)S[0-9A-Z]*_)$'  # what compilers add to data types

status=0 parts="verbs placement" places=(-DPLACES)
if [[ $programs != - ]]; then
  parts=verbs places=()
  IFS='|' read -ra programs <<<"$programs"
  for object in "${programs[@]}"; do
    vector_code "$object" >"$work/vector_code"
    if comm -12 <(weak "$object") "$work/vector_code" | grep -vE "[0-9]avx|$added" | c++filt | grep .; then
      echo "^ $object: plain x86-64 has them by the same name, and they hold vector code"
      status=1
    fi
    echo "$(basename "$object"): $(grep -c 9tetromino "$work/vector_code" || true) functions of ours with vector code"
  done
fi
for level in $levels; do
  for set in plain $sets; do
    name=wide
    [[ $set == plain ]] && name=plain
    for part in $parts; do
      # shellcheck disable=SC2086
      "$compiler" -std=c++20 $level ${flags[$set]} "${includes[@]}" -DSET=$name -DRECIPE='"mxfp4-32/floor"' \
        -c "$here/$part.cpp" -o "$work/$part.o"
    done
    # shellcheck disable=SC2086
    (cd "$work" && ld -r ${parts// /.o }.o -o "$set$level.o")
  done
  "$compiler" -std=c++20 $level -march=x86-64 "${includes[@]}" "${places[@]}" -c "$here/main.cpp" -o "$work/main$level.o"
  for set in $sets; do
    plain=$work/plain$level.o wide=$work/$set$level.o main=$work/main$level.o
    vector_code "$wide" >"$work/vector_code"
    if ! grep -q 9tetromino "$work/vector_code"; then
      echo "$set$level: found no vector code of ours at all"
      status=1
    fi
    comm -12 <(weak "$plain") <(weak "$wide") >"$work/shared"
    spared='^$'
    [[ $level == -O0 ]] && spared=$added
    if comm -12 "$work/shared" "$work/vector_code" | grep -vE "$spared" | c++filt | grep .; then
      echo "^ $set$level: shared with code for plain x86-64, and holds vector code"
      status=1
    fi
    for order in "$wide $plain $main" "$main $plain $wide"; do
      # shellcheck disable=SC2086
      "$compiler" $order -pthread -o "$work/program"
      if [[ -n $old_cpu && ($level != -O[01g] || $order != "$wide"*) ]]; then
        "$old_cpu" -cpu Nehalem "$work/program" || { echo "$order: $? on an old CPU" && status=1; }
      fi
      if [[ -n $old_cpu && ${#places[@]} -gt 0 && $order != "$wide"* ]]; then
        "$old_cpu" -cpu Nehalem "$work/program" "$work" || { echo "$order: $? on an old CPU, placing" && status=1; }
      fi
      if grep -qw "${set/512/512vl}" /proc/cpuinfo; then
        "$work/program" "$work" wide || { echo "$order: $? here" && status=1; }
      fi
    done
    echo "$set$level: $(wc -l <"$work/shared") symbols of ours shared"
  done
done
[[ -n $old_cpu ]] || echo "not run on an old CPU: there is no qemu-x86_64"
exit $status
