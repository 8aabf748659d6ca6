#!/bin/bash
# Builds the CUDA backend with nvcc alone (no CMake), then checks and times it on this machine's GPU.
#   cuda/check.sh BUILD_FOLDER OUTPUT_FOLDER STEP...
# Steps: build, quantize[:MILLIONS], matmul, moe, block_scaled, cublaslt, cuda_moe_layer[:ARGUMENTS],
# nccl_moe_layer[:ARGUMENTS], sanitize[:TEST], bench:NAME[:ARGUMENTS] (such as "bench:grouped:--tokens 8,64 examples/data
# qwen3")
set -u
cd "$(dirname "$0")/.."
build=$1
out=$2
shift 2
mkdir -p "$build" "$out"
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
cuda=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
arch=${TETROMINO_CUDA_ARCH:--gencode arch=compute_90a,code=sm_90a}
flags="-std=c++20 -O3 $arch -Iinclude -Icuda/include -Itests/cuda -DTETROMINO_SIMD=0 -lineinfo"
libraries="-L$cuda/lib64 -lcublas -lcublasLt"
if [ ! -e "$cuda/lib64/libcublas.so" ]; then
  python_cublas=$(find / -name 'libcublas.so.*' -not -path '/proc/*' 2>/dev/null | head -1)
  libraries="-Xlinker $python_cublas -Xlinker $(dirname "$python_cublas")/libcublasLt.so.${python_cublas##*.so.} -Xlinker -rpath=$(dirname "$python_cublas")"
fi
# NCCL from a package of the system, or from Python's; without it, programs that need it are left out.
nccl=$(ls "$cuda"/lib*/libnccl.so.2 /usr/lib/*/libnccl.so.2 /usr/local/lib/libnccl.so.2 2>/dev/null | head -1)
[ -n "$nccl" ] || nccl=$(find / -path '*/nccl/lib/libnccl.so.2' -not -path '/proc/*' 2>/dev/null | head -1)
with_nccl=
if [ -n "$nccl" ]; then
  with_nccl=yes
  flags="$flags -I$(dirname "$(dirname "$nccl")")/include"
  libraries="$libraries -Xlinker $nccl -Xlinker -rpath=$(dirname "$nccl")"
fi

compile() {  # source → object in the build folder
  object=$build/$(echo "$1" | tr '/' '_').o
  "$nvcc" $flags -c "$1" -o "$object" 2>"$object.log" || { echo "FAILED to compile $1"; cat "$object.log"; return 1; }
}
export -f compile
export nvcc flags build

for step in "$@"; do
  name=${step%%:*}
  argument=""
  case $step in *:*) argument=${step#*:} ;; esac
  case $name in
    build)
      start=$SECONDS
      ls cuda/src/*.cu tests/cuda/*.cu tests/bench/cuda_*.cu examples/*.cu examples/tools/*.cu examples/tools/gpu/*.cu |
        if [ -n "$with_nccl" ]; then cat; else grep -v nccl; fi |
        xargs -P "$(nproc)" -I{} bash -c 'compile {}' || exit 1
      objects=$(ls "$build"/cuda_src_*.o "$build"/examples_tools_gpu_*.o)
      for program in "$build"/tests_cuda_*.o "$build"/tests_bench_cuda_*.o "$build"/examples_*.o; do
        case $program in *_gpu_*) continue ;; esac
        [ -e "$program" ] || continue
        binary=${program%.c*.o}
        rm -f "$binary"
        ("$nvcc" -o "$binary" "$program" $objects $libraries -lpthread 2>"$binary.link" ||
          { echo "FAILED to link $binary"; cat "$binary.link"; }) &
      done
      wait
      for program in "$build"/*.link; do [ -e "${program%.link}" ] || exit 1; done
      echo "built in $((SECONDS - start)) s"
      ;;
    sanitize)
      for tool in memcheck racecheck initcheck; do
        for test in ${argument:-quantize matmul moe block_scaled}; do
          program=$build/tests_cuda_$test
          [ -e "$program" ] || continue
          echo "== $tool $test"
          TETROMINO_SMALL=1 timeout 90 compute-sanitizer --tool $tool --error-exitcode 9 "$program" >"$out/$tool-$test.log" 2>&1
          echo "exit $?: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY|checks' "$out/$tool-$test.log" | tr '\n' ' ')"
        done
      done
      ;;
    bench)
      program=${argument%%:*}
      rest=""
      case $argument in *:*) rest=${argument#*:} ;; esac
      echo "== bench $program $rest"
      timeout 240 "$build/tests_bench_cuda_$program" $rest 2>&1 | tee "$out/bench-$program.txt"
      ;;
    cuda_moe_layer | nccl_moe_layer)
      echo "== $name"
      timeout 240 "$build/examples_tools_$name" $argument 2>&1
      echo "exit $?"
      ;;
    *)
      echo "== test $name"
      start=$SECONDS
      timeout 240 "$build/tests_cuda_$name" $argument 2>&1 | tail -n 60
      echo "exit ${PIPESTATUS[0]} after $((SECONDS - start)) s"
      ;;
  esac
done
