# Sourced by tests/run.sh and examples/quickstart.sh: installs packages, configures and builds. Needs bash.
set -euo pipefail
export LC_ALL=C  # compilers and awk speak English here
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${TETROMINO_BUILD_DIR:-/} in /*) ;; *) TETROMINO_BUILD_DIR=$PWD/$TETROMINO_BUILD_DIR ;; esac

say() { printf '\n== %s\n' "$*"; }
fail() {
  printf '\nerror: %s\n' "$*" >&2
  exit 1
}

# As many as there are cores, each of which needs 2 GB of what this machine or container has.
job_count() {
  local cores memory limit
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
  memory=$(awk '/^MemTotal:/ { printf "%d", $2 / 1024 }' /proc/meminfo 2>/dev/null || true)
  limit=$(awk '/^[0-9]+$/ { printf "%d", $1 / 1048576 }' /sys/fs/cgroup/memory.max 2>/dev/null || true)
  [ -z "$limit" ] || [ "$limit" -ge "${memory:-0}" ] || memory=$limit
  [ -z "$memory" ] || [ $((memory / 2000)) -ge "$cores" ] || cores=$((memory / 2000))
  echo $((cores > 1 ? cores : 1))
}
jobs=$(job_count)

# A package counts as installed if apt says so, or if the command after the colon is there: g++:c++
is_installed() {
  local package=${1%%:*} command=${1#*:}
  [ "$command" != "$1" ] && command -v "$command" >/dev/null && return
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ]
}

# install_packages PACKAGE[:COMMAND]...   through apt, asking for nothing that is already there.
install_packages() {
  local missing=() package why=""
  for package in "$@"; do
    is_installed "$package" || missing+=("${package%%:*}")
  done
  [ ${#missing[@]} -eq 0 ] && return

  say "installing ${missing[*]} (a minute or two)"
  local sudo=() log
  log=$(mktemp)
  [ "$(id -u)" -eq 0 ] || sudo=(sudo)
  if ! command -v apt-get >/dev/null; then
    why="there is no apt-get here"
  elif [ ${#sudo[@]} -gt 0 ] && ! command -v sudo >/dev/null; then
    why="that needs root or sudo"
  elif ! { "${sudo[@]}" apt-get update -qq &&
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" \
      </dev/null; } >"$log" 2>&1; then
    cat "$log" >&2
    why="apt-get failed"
  fi
  rm -f "$log"
  [ -z "$why" ] && return

  printf 'cannot install packages: %s\nplease install: %s\n' "$why" "${missing[*]}" >&2
  command -v cmake >/dev/null && command -v "${CXX:-c++}" >/dev/null ||
    fail "without cmake and a C++ compiler there is nothing to build"
  printf 'going on with what is there; parts whose packages are missing are left out\n' >&2
}

# What CMake keeps from the first time that a folder is configured, although the environment or a preset has changed.
lasting_settings() {
  echo "$root $1 ${CXX:-} ${CXXFLAGS:-} ${LDFLAGS:-} ${CUDACXX:-} ${CUDAFLAGS:-} ${CUDAHOSTCXX:-} ${CMAKE_PREFIX_PATH:-}"
  cat "$root"/cmake/presets/*.cmake
}

# configure FOLDER PRESET CMAKE-OPTIONS...
configure() {
  local folder=$1 preset=$2
  shift 2
  local options=(-C "$root/cmake/presets/$preset.cmake")
  mkdir -p "$folder" 2>/dev/null || fail "cannot write to $folder; TETROMINO_BUILD_DIR names another folder"
  if [ ! -e "$folder/CMakeCache.txt" ] || ! lasting_settings "$preset" | cmp -s - "$folder/settings"; then
    options+=(--fresh)
    command -v ninja >/dev/null && options+=(-G Ninja)
    lasting_settings "$preset" >"$folder/settings"
  fi
  say "configuring in $folder"
  cmake -S "$root" -B "$folder" "${options[@]}" -D TETROMINO_WARNINGS_AS_ERRORS="${TETROMINO_WARNINGS_AS_ERRORS:-OFF}" "$@"
}

# build FOLDER PRESET TARGETS CMAKE-OPTIONS...
build() {
  local folder=$1 preset=$2 targets=$3
  shift 3
  configure "$folder" "$preset" "$@"
  say "building with $jobs jobs"
  # shellcheck disable=SC2086  # several targets are several words
  cmake --build "$folder" --parallel "$jobs" --target $targets
}

# So that mpirun works as root and with more ranks than cores, under Open MPI 4 and 5.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export OMPI_MCA_btl_vader_single_copy_mechanism=none
