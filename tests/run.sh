#!/usr/bin/env bash
# Builds and runs the tests; what is missing is installed first.
#   tests/run.sh                    the default tests
#   tests/run.sh --slow             the slow ones only; compiles the benchmarks too
#   tests/run.sh --fuzz SECONDS     look for new inputs that break a fuzz target, each for so long (needs clang)
#   tests/run.sh -R placement       further options go to ctest
# TETROMINO_PRESET picks a file of cmake/presets (dev, fuzz; asan and tsan, under which the tests of packaging are left
# out), TETROMINO_BUILD_DIR says where to build, TETROMINO_SEED picks the random inputs,
# TETROMINO_WARNINGS_AS_ERRORS=ON lets no warning pass; CXX, CXXFLAGS, LDFLAGS and CMAKE_PREFIX_PATH mean what they always
# do. Where there is nvcc, the GPU code is built too: TETROMINO_CUDA=OFF leaves it out,
# TETROMINO_CUDA_ARCHITECTURES says for which GPUs (by default the one here, or 90a) and TETROMINO_CUDA_SECONDS how long
# that may take.
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/setup.sh"

select=()
targets="all all_verify_interface_header_sets" options=()
if [ "${1:-}" = --slow ]; then
  select=(-C slow -L slow)
  options=(-D TETROMINO_BENCHMARKS=ON)
  shift
elif [ "${1:-}" = --fuzz ]; then
  TETROMINO_PRESET=fuzz
  select=(-L fuzz)
  targets=fuzzers
  options=(-D TETROMINO_FUZZ_SECONDS="$2" -D TETROMINO_CPU=OFF)
  shift 2
fi
preset=${TETROMINO_PRESET:-dev}
folder=${TETROMINO_BUILD_DIR:-$root/build/tests-$preset}

install_packages g++:c++ cmake:cmake ninja-build:ninja pkg-config:pkg-config catch2 libxsimd-dev libfmt-dev \
  libeigen3-dev nlohmann-json3-dev libcli11-dev libopenmpi-dev openmpi-bin:mpirun
if [ "$preset" != dev ]; then
  install_packages clang:clang++ libclang-rt-dev
fi
case $preset in asan | tsan) targets=all select+=(-LE package) ;; esac

# Where there is nvcc, first what it compiles, for one architecture: kernels, tests and examples.
status=0 cuda=OFF late=
options+=(-D TETROMINO_TESTS=ON)
if [ "$preset" = dev ] && [ "${TETROMINO_CUDA:-ON}" != OFF ]; then
  if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
    gpu=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d . || true)
    case $gpu in 8?) ;; 9? | 1??) gpu+=a ;; *) gpu=90a ;; esac
    seconds=${TETROMINO_CUDA_SECONDS:-600}
    options+=(-D TETROMINO_CUDA_ARCHITECTURES="${TETROMINO_CUDA_ARCHITECTURES:-$gpu}")
    configure "$folder" "$preset" "${options[@]}" -D TETROMINO_CUDA=ON
    say "compiling the GPU code with $jobs jobs, for at most $seconds s"
    began=$SECONDS
    outcome=0
    timeout "$seconds" cmake --build "$folder" --parallel "$jobs" --target tetromino_cuda_programs || outcome=$?
    case $outcome in
      0) cuda=ON && say "compiled the GPU code in $((SECONDS - began)) s" ;;
      124) late="skipped: the GPU code was not compiled within $seconds s" && say "$late" ;;
      *) status=1 && say "FAILED to compile the GPU code; going on without it" ;;
    esac
  else
    say "there is no nvcc: the GPU code is not compiled"
  fi
fi
build "$folder" "$preset" "$targets" "${options[@]}" -D TETROMINO_CUDA=$cuda

say "testing"
ctest --test-dir "$folder" --parallel "$jobs" --output-on-failure --no-tests=error "${select[@]}" "$@" || status=1
grep -h '^skipped: ' "$folder/Testing/Temporary/LastTest.log" | sort | uniq -c || true
[ -z "$late" ] || echo "$late"
[ $status -eq 0 ] || fail "something failed, see above; a random test repeats with the TETROMINO_SEED that it printed"
