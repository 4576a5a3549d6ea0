#!/usr/bin/env bash
# Exits 0 if the server on this machine accepts requests: the image's health check.
#   innerq-health [PORT]     default: 8080
set -euo pipefail

exec 3<>"/dev/tcp/127.0.0.1/${1:-8080}"
printf 'GET /ready HTTP/1.0\r\n\r\n' >&3
read -r -u 3 _ status _
[[ $status == 200 ]]
