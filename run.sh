#!/usr/bin/env bash
# Installs what is missing, builds the server and starts it with the demo model.
#   ./run.sh [[-c] CONFIG] [innerq serve options]     default: configs/demo.json
# May be called from anywhere; paths are relative to the directory that it is called from.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [[ $# -gt 0 && $1 != -* ]]; then
  config=(-c "$1")
  shift
else
  config=(-c "$root/configs/demo.json")
  for argument in "$@"; do
    if [[ $argument == -c* || $argument == --config || $argument == --config=* ]]; then
      config=()
    fi
  done
fi

"$root/docker/install-deps.sh" build
(
  cd "$root"
  cmake --preset release >/dev/null
  cmake --build --preset release
)

exec "$root/build/release/innerq" serve "${config[@]}" "$@"
