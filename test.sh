#!/usr/bin/env bash
# Installs what is missing, builds everything and runs all tests.
#   ./test.sh [ctest options], e.g. ./test.sh -R Scheduler
set -euo pipefail
cd "$(dirname "$0")"

docker/install-deps.sh test
# The official OpenAI client, for the tests in tests/client.
if ! cmp -s tests/client/requirements.txt build/client-venv/requirements.txt; then
  echo "test: installing $(grep -v '^#' tests/client/requirements.txt | xargs) into build/client-venv"
  python3 -m venv build/client-venv
  build/client-venv/bin/pip install --quiet --disable-pip-version-check \
    -r tests/client/requirements.txt
  cp tests/client/requirements.txt build/client-venv/requirements.txt
fi
cmake --preset dev >/dev/null
cmake --build --preset dev
ctest --preset dev "$@"
