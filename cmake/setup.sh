# Sourced by tests/run.sh and examples/quickstart.sh: installs packages, configures and builds. Needs bash.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
jobs=$(nproc 2>/dev/null || echo 2)

say() { printf '\n== %s\n' "$*"; }
fail() {
  printf '\nerror: %s\n' "$*" >&2
  exit 1
}

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

# configure FOLDER PRESET CMAKE-OPTIONS...
configure() {
  local folder=$1 preset=$2
  shift 2
  local options=(-C "$root/cmake/presets/$preset.cmake")
  if ! grep -qsx "CMAKE_HOME_DIRECTORY:INTERNAL=$root" "$folder/CMakeCache.txt"; then
    options+=(--fresh)
    command -v ninja >/dev/null && options+=(-G Ninja)
  fi
  say "configuring in $folder"
  cmake -S "$root" -B "$folder" "${options[@]}" "$@"
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
