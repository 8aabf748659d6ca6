#!/usr/bin/env bash
# Installs the port with vcpkg, and builds and runs the consumer against it: tests/install/vcpkg.sh [OVERLAY...]
# Needs the command vcpkg, and VCPKG_ROOT, where it keeps scripts and ports. It fetches xsimd and nlohmann-json, unless
# folders of other ports that offer them are named.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if ! command -v vcpkg >/dev/null || [ ! -e "${VCPKG_ROOT:-}/scripts/buildsystems/vcpkg.cmake" ]; then
  echo "skipped: there is no vcpkg here (or VCPKG_ROOT does not name its folder)"
  exit 77
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
overlays=(--overlay-ports="$root/cmake/vcpkg")
for folder in "$@"; do overlays+=(--overlay-ports="$folder"); done

for port in tetromino 'tetromino[io]'; do
  vcpkg install "$port" --classic --vcpkg-root="$VCPKG_ROOT" --x-install-root="$work/installed" --recurse "${overlays[@]}" \
    --binarysource=clear
  cmake -S "$root/tests/install/consumer" -B "$work/consumer" --fresh -D way=find_package -D with_cpu=OFF \
    -D tetromino_version="$(sed -n 's/.*"version": "\(.*\)".*/\1/p' "$root/cmake/vcpkg/vcpkg.json")" \
    -D CMAKE_TOOLCHAIN_FILE="$VCPKG_ROOT/scripts/buildsystems/vcpkg.cmake" -D VCPKG_INSTALLED_DIR="$work/installed"
  cmake --build "$work/consumer"
  "$work/consumer/consumer"
done
"$work/consumer/consumer_io"
