#!/usr/bin/env bash
# Installs the Debian 12 packages that innerq needs: the one list of them.
#   docker/install-deps.sh          what building the server takes
#   docker/install-deps.sh test     and what the tests, checks and benchmarks take
#   docker/install-deps.sh runtime  only the libraries that the built binary loads
# Needs root or sudo. Running it again changes nothing and needs no network.
set -euo pipefail

runtime=(libdnnl2 libfmt9 libgomp1 libhwy1 libpcre2-8-0 libsentencepiece0 libspdlog1.10)
build=(
  g++ cmake ninja-build
  nlohmann-json3-dev  # JSON
  libsentencepiece-dev # tokenizer.model
  libpcre2-dev        # patterns of tokenizer.json
  libspdlog-dev libfmt-dev  # logs
  libcli11-dev        # command line
  libhwy-dev          # portable SIMD
  libdnnl-dev         # oneDNN, dense products
  curl                # the README's requests
)
test=(
  libgtest-dev libgmock-dev libbenchmark-dev  # GoogleTest's CMake files look for GoogleMock
  clang-format-14 git  # checks
  clang-14 libclang-rt-14-dev  # fuzzers
  python3 python3-venv  # client tests
)

case "${1:-build}" in
  runtime) wanted=("${runtime[@]}") ;;
  build) wanted=("${build[@]}") ;;
  test) wanted=("${build[@]}" "${test[@]}") ;;
  *)
    echo "usage: $0 [build|test|runtime]" >&2
    exit 2
    ;;
esac

missing=()
for package in "${wanted[@]}"; do
  status=$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null || true)
  [[ $status == "install ok installed" ]] || missing+=("$package")
done
if [[ ${#missing[@]} -eq 0 ]]; then
  echo "install-deps: all ${#wanted[@]} packages are there"
  exit 0
fi

as_root=()
if [[ $(id -u) -ne 0 ]]; then
  if ! command -v sudo >/dev/null; then
    echo "install-deps: root or sudo is needed to install: ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi
echo "install-deps: installing ${missing[*]}"
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
echo "install-deps: done"
