#!/usr/bin/env bash
# Builds the fuzzers and runs each for a while, two at a time, from the seeds that are kept here.
#   tests/fuzz/run.sh [seconds [target...]]   60 seconds and all targets unless told otherwise
# SEED in the environment chooses the random numbers, which differ from run to run otherwise.
# Fails if a target does, and prints the input that made it fail. To run such an input again:
#   build/asan/tests/fuzz/TARGET INPUT
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=${1:-60}
seed=${SEED:-$((RANDOM * 32768 + RANDOM + 1))}
echo "fuzz: SEED=$seed"
targets=("${@:2}")
if [[ ${#targets[@]} -eq 0 ]]; then
  for source in tests/fuzz/*_fuzz.cc; do targets+=("$(basename "$source" .cc)"); done
fi
parallel=2
work=$PWD/build/asan/fuzz
declare -A max_len=([checkpoint_fuzz]=6144 [tokenizer_roundtrip_fuzz]=2048 [http_fuzz]=2048 [variants_fuzz]=64)

docker/install-deps.sh test
cmake --preset asan >/dev/null
cmake --build --preset asan --target "${targets[@]}"

mkdir -p "$work"
memory=$PWD/build/asan
[[ -d /dev/shm && -w /dev/shm ]] && memory=/dev/shm
scratch=$(mktemp -d "$memory/innerq_fuzz.XXXXXX")  # the files that targets write
trap 'rm -rf "$scratch"' EXIT

# Runs one target; its log and, should it fail, the input are in $work/TARGET.
run() {
  local target=$1
  local out=$work/$target
  rm -rf "$out/corpus"  # inputs that failed before stay
  mkdir -p "$out/corpus"
  cp tests/fuzz/seeds/"$target"/* "$out/corpus"
  local options=(-max_total_time="$seconds" -seed="$seed" -max_len="${max_len[$target]:-4096}"
    -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix="$out/")
  # Its server's threads go on after an input, and what one is about to free is now and then taken
  # for lost. Leaks are looked for at the end, when the threads have been joined.
  [[ $target == http_fuzz ]] && options+=(-detect_leaks=0)
  [[ -f tests/fuzz/$target.dict ]] && options+=(-dict="tests/fuzz/$target.dict")
  local status=0
  TMPDIR=$scratch build/asan/tests/fuzz/"$target" "${options[@]}" "$out/corpus" >"$out/log" 2>&1 || status=$?
  local runs edges
  runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$out/log")
  edges=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$out/log" | tail -1)
  if [[ $status -eq 0 && ${runs:-0} -gt 0 ]]; then
    printf '%-26s ok: %s runs, %s edges\n' "$target" "$runs" "$edges"
    return 0
  fi
  # The first complaint with its stack, then the input.
  grep -m 1 -A 14 -E 'ERROR: |runtime error: |CHECK failed' "$out/log" | cut -c 1-200 || tail -20 "$out/log"
  grep -E 'Test unit written|^Base64: ' "$out/log" || true
  printf '%-26s FAILED: see %s\n' "$target" "$out/log"
  return 1
}

running=0 failed=0
for target in "${targets[@]}"; do
  if [[ $running -eq $parallel ]]; then
    wait -n || failed=1
    running=$((running - 1))
  fi
  run "$target" &
  running=$((running + 1))
done
while [[ $running -gt 0 ]]; do
  wait -n || failed=1
  running=$((running - 1))
done
exit "$failed"
