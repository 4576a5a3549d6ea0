#!/usr/bin/env bash
# Builds the image of docker/Dockerfile without a Docker engine and runs it as an engine would: as
# its user, as process 1, with its health check, until SIGTERM. For root, with a network:
#   apt-get install debootstrap buildah && docker/test-image.sh
#   docker/test-image.sh cuda     the same of docker/Dockerfile.cuda, where nvcc is on PATH
# The base is made by debootstrap, for no registry may be at hand; for the same reason the CUDA
# toolkit is this machine's, not that of NVIDIA's packages, and where there is no GPU the server is
# to say so, then runs on the CPU. Takes minutes and 5 GB below build/image, with CUDA ten minutes and
# 9 GB; running it again reuses the base and the layers. ARCHITECTURES=90 names GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:-cpu}
[[ $what =~ ^(cpu|cuda)$ ]] || { sed -n '2,9p' "$0" >&2; exit 2; }
tag=innerq file=docker/Dockerfile options=()
if [[ $what == cuda ]]; then
  toolkit=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
  tag=innerq-cuda file=docker/Dockerfile.cuda
  options=(--build-arg TOOLKIT=localhost/base --build-arg "ARCHITECTURES=${ARCHITECTURES:-90}"
    --volume "$toolkit:/usr/local/cuda-13.0:ro")
fi
mirror=${MIRROR:-http://deb.debian.org/debian}
work=$PWD/build/image
mkdir -p "$work"
step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }
buildah() { command buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }

step "base"
if ! buildah inspect --type image localhost/base >/dev/null 2>&1; then
  rm -rf "$work/base"
  debootstrap --variant=minbase bookworm "$work/base" "$mirror"
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$work/base" / >/dev/null
  buildah commit --quiet --rm "$container" localhost/base >/dev/null
  rm -rf "$work/base"
fi

step "image"
buildah build --isolation chroot --layers --format docker --build-arg BASE=localhost/base \
  "${options[@]}" --file "$file" --tag "$tag" .

step "what an engine is told"
buildah inspect --type image "$tag" >"$work/image.json"
# Prints a value of the image's configuration: a text, or a list's items as lines.
describe() {
  python3 - "$work/image.json" "$@" <<'END'
import json, sys
value = json.load(open(sys.argv[1]))["Docker"]["config"]
for key in sys.argv[2:]:
    value = value[key]
print("\n".join(value) if isinstance(value, list) else value)
END
}
mapfile -t command < <(describe Entrypoint)
mapfile -t environment < <(describe Env)
mapfile -t health < <(describe Healthcheck Test)
user=$(describe User)
printf '%s: %s\n' user "$user" command "${command[*]}" health "${health[*]}" \
  environment "${environment[*]}" stop "$(describe StopSignal)" \
  ports "$(describe ExposedPorts)" volumes "$(describe Volumes)" labels "$(describe Labels)"
[[ $user =~ ^([1-9][0-9]*):([1-9][0-9]*)$ ]] || { echo "not a number other than 0" >&2; exit 1; }
uid=${BASH_REMATCH[1]} gid=${BASH_REMATCH[2]}
[[ ${health[0]} == CMD && $(describe StopSignal) == SIGTERM ]]
label() { describe Labels "org.opencontainers.image.$1"; }
[[ $(label title) == "$tag" && $(label base.name) == localhost/base ]]

step "run"
if (exec 3<>/dev/tcp/127.0.0.1/8080) 2>/dev/null; then
  echo "something listens on port 8080 already" >&2
  exit 1
fi
container=$(buildah from --pull-never "$tag")
root=$(buildah mount "$container")
server=
finish() {
  [[ -z $server ]] || kill -KILL "$server" 2>/dev/null || true
  umount "$root/model" 2>/dev/null || true
  buildah rm "$container" >/dev/null
}
trap finish EXIT
mkdir -p "$root/model"
mount --bind models/demo "$root/model"
clean=(env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "${environment[@]}")
as_user=(setpriv --reuid "$uid" --regid "$gid" --clear-groups --no-new-privs
  --inh-caps=-all --bounding-set=-all)
in_image() { "${clean[@]}" chroot "$root" "${as_user[@]}" "$@"; }
[[ $(in_image innerq --version) == "innerq $(label version)" ]]
# Process 1 of its own namespace; the port is the machine's, as a container's with --network host.
serve() {
  exec "${clean[@]}" unshare --pid --fork --kill-child --root "$root" --mount-proc -- \
    "${as_user[@]}" "${command[@]}" "$@" >"$work/server.log" 2>&1
}
device=()
if [[ $what == cuda ]]; then
  if (serve); then echo "it served on a GPU that is not mounted" >&2; exit 1; fi
  grep 'device cuda' "$work/server.log"
  device=(--set=backend.device=cpu)
fi
# The image's default configuration; then one in its place, with an option more.
in_image innerq check-config --set=model.path=/model | grep 'keys 3-bit'
serve "${device[@]}" -c /etc/innerq/int8.json --set kv_cache.memory=64MiB &
server=$!
check_health() { in_image "${health[@]:1}"; }
for _ in $(seq 100); do
  check_health 2>/dev/null && break
  kill -0 "$server" || { cat "$work/server.log"; exit 1; }
  sleep 0.1
done
check_health
echo "healthy"
process=$(<"/proc/$server/task/$server/children")
process=${process// /}
grep -E '^(Name|Uid|Gid|NSpid|CapEff|CapBnd):' "/proc/$process/status"
[[ $(awk '/^NSpid:/ {print $NF}' "/proc/$process/status") == 1 ]]
[[ $(awk '/^Uid:/ {print $2}' "/proc/$process/status") == "$uid" ]]
grep 'keys 8-bit' "$work/server.log"
curl -fsS http://127.0.0.1:8080/health
curl -fsS http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' \
  -d '{"model": "innerq", "prompt": "Hello", "max_tokens": 8}'
echo
kill -TERM "$process"
wait "$server"
echo "exit 0 after SIGTERM"
server=
! check_health 2>/dev/null || { echo "the health check passes without a server" >&2; exit 1; }
step "done"
