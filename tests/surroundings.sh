#!/usr/bin/env bash
# Builds and runs a few tests in surroundings that differ from a developer's: a folder with spaces below another CMake
# project, a source tree that cannot be written to, no HOME, a umask that lets nobody else read, another language, and
# flags in the environment.
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
umask 077
tree="$work/a parent/with spaces"
mkdir -p "$tree"
echo 'message(FATAL_ERROR "this is another project")' >"$work/a parent/CMakeLists.txt"
(cd "$root" && cp -r .clang-format CMakeLists.txt LICENSE README.md cmake cuda examples include tests "$tree")
chmod -R a-w "$tree"

cat >"$work/steps.sh" <<'EOF'
source "$1/cmake/setup.sh"
folder="$2/build here"
build "$folder" dev "test_e2m1 test_io.safetensors_writer 01_pack"
ctest --test-dir "$folder" --output-on-failure --no-tests=error \
  -R '^(e2m1|io[.]safetensors_writer|mutations|compile_fail.*|install[.](unbuilt|copy|single_header|add_subdirectory))$'
"$folder/examples/01_pack"
EOF
env -i PATH="$PATH" ${CXX:+CXX="$CXX"} ${CMAKE_PREFIX_PATH:+CMAKE_PREFIX_PATH="$CMAKE_PREFIX_PATH"} TMPDIR="$work" \
  LANG=de_DE.UTF-8 LC_ALL=de_DE.UTF-8 CXXFLAGS="-g0 -pipe -Wformat -D_FORTIFY_SOURCE=2 -fstack-protector-strong" \
  LDFLAGS="-Wl,--as-needed -Wl,-z,relro,-z,now" CDPATH=/usr:/ DESTDIR=/nonexistent \
  bash "$work/steps.sh" "$tree" "$work"
