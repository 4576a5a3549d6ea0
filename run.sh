#!/usr/bin/env bash
# Installs what is missing, builds the server and starts it with the demo model.
#   ./run.sh [CONFIG] [innerq serve options]     default: configs/demo.json
set -euo pipefail
root=$(cd "$(dirname "$0")" && pwd)

config=$root/configs/demo.json
if [[ $# -gt 0 && $1 != -* ]]; then
  config=$(realpath "$1")
  shift
fi
cd "$root"

docker/install-deps.sh build
[[ -f build/release/build.ninja ]] || cmake --preset release >/dev/null
cmake --build --preset release

exec build/release/innerq serve -c "$config" "$@"
