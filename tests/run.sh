#!/usr/bin/env bash
# Builds and runs the tests; what is missing is installed first.
#   tests/run.sh                    the default tests
#   tests/run.sh --slow             the slow ones only; compiles the benchmarks too
#   tests/run.sh --fuzz SECONDS [TARGET]...
#                                   look for new inputs that break fuzz targets, each for so long (needs clang)
#   tests/run.sh -R placement       further options go to ctest
# TETROMINO_PRESET picks a file of cmake/presets (dev, fuzz; asan and tsan, under which the tests of packaging are left
# out), TETROMINO_BUILD_DIR says where to build, TETROMINO_SEED picks the random inputs,
# TETROMINO_WARNINGS_AS_ERRORS=ON lets no warning pass, TETROMINO_FUZZED="a;b" leaves out fuzz targets that another
# build runs; CXX, CXXFLAGS, LDFLAGS and CMAKE_PREFIX_PATH mean what they always do. Where there is nvcc, the GPU code
# is built too, and left out if it is not done after 600 s: TETROMINO_CUDA_SECONDS sets another limit,
# TETROMINO_CUDA_ARCHITECTURES the GPUs (by default the one here, or 90a); TETROMINO_CUDA=OFF builds none of it.
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/setup.sh"

select=()
fuzzed=${TETROMINO_FUZZED:-} per_program=1
targets="all all_verify_interface_header_sets" options=()
if [ "${1:-}" = --slow ]; then
  select=(-C slow -L slow)
  options=(-D TETROMINO_BENCHMARKS=ON)
  shift
elif [ "${1:-}" = --fuzz ]; then
  TETROMINO_PRESET=fuzz
  select=(-L fuzz)
  targets=fuzzers
  options=(-D TETROMINO_FUZZ_SECONDS="$2")
  # a search that is shorter than the compiler's work on it
  [ "$2" -ge 60 ] || options+=(-D CMAKE_CXX_FLAGS_DEBUG=-O0)
  per_program=100
  shift 2
  if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    targets=
    names=
    fuzzed= per_program=1
    while [ $# -gt 0 ] && [[ $1 != -* ]]; do
      targets+=" test_fuzz.$1" names+="|$1"
      shift
    done
    select+=(-R "^fuzz[.](${names#|})\$")
  fi
fi
preset=${TETROMINO_PRESET:-dev}
[ "$preset" != dev ] || per_program=24
options+=(-D TETROMINO_FUZZED="$fuzzed" -D TETROMINO_TESTS_PER_PROGRAM="$per_program")
folder=${TETROMINO_BUILD_DIR:-$root/build/tests-$preset}

install_packages g++:c++ cmake:cmake ninja-build:ninja pkg-config:pkg-config catch2 libxsimd-dev libfmt-dev \
  libeigen3-dev nlohmann-json3-dev libcli11-dev libopenmpi-dev openmpi-bin:mpirun
if [ "$preset" != dev ]; then
  install_packages clang:clang++ libclang-rt-dev
fi
case $preset in asan | tsan) targets=all select+=(-LE package) ;; esac

# Where there is nvcc, what it compiles (kernels, tests and examples) is built beside the rest, as long as the limit lasts.
status=0 cuda=OFF late=
if [ "$preset" = dev ] && [ "${TETROMINO_CUDA:-ON}" != OFF ]; then
  if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
    gpu=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d . || true)
    case $gpu in 8?) ;; 9? | 1??) gpu+=a ;; *) gpu=90a ;; esac
    limit=${TETROMINO_CUDA_SECONDS:-600}
    options+=(-D TETROMINO_CUDA_ARCHITECTURES="${TETROMINO_CUDA_ARCHITECTURES:-$gpu}")
    [ "$jobs" -gt 4 ] || options+=(-D TETROMINO_CUDA_TOGETHER=ON)
    configure "$folder" "$preset" "${options[@]}" -D TETROMINO_CUDA=ON
    say "building with $jobs jobs, the GPU code too if that takes at most $limit s"
    began=$SECONDS
    # shellcheck disable=SC2086  # several targets are several words
    if ! timeout "$limit" cmake --build "$folder" --parallel "$jobs" --target $targets tetromino_cuda_programs; then
      left=$((limit - (SECONDS - began)))
      timeout $((left > 20 ? left : 20)) cmake --build "$folder" --parallel "$jobs" --target tetromino_cuda_programs ||
        cuda=$?
    fi
    case $cuda in
      OFF) cuda=ON ;;
      124) cuda=OFF late="skipped: the GPU code was not compiled within $limit s" && say "$late" ;;
      *) cuda=OFF status=1 && say "FAILED to compile the GPU code; going on without it" ;;
    esac
  else
    say "there is no nvcc: the GPU code is not compiled"
  fi
fi
build "$folder" "$preset" "$targets" "${options[@]}" -D TETROMINO_CUDA=$cuda

say "testing"
# One more than there are cores: some tests wait.
ctest --test-dir "$folder" --parallel $((jobs + 1)) --output-on-failure --no-tests=error "${select[@]}" "$@" || status=1
grep -h '^skipped: ' "$folder/Testing/Temporary/LastTest.log" | sort | uniq -c || true
[ -z "$late" ] || echo "$late"
[ $status -eq 0 ] || fail "something failed, see above; a random test repeats with the TETROMINO_SEED that it printed"
