#!/usr/bin/env bash
# What low-bit weights cost a model: `innerq quantize` by every scheme, with and without calibration.
#
#   tests/eval/low_bit.sh [OUT_DIR]
#
# Prints a table; OUT_DIR (build/low-bit) gets what each run printed, and no checkpoints. By default
# it calibrates the demo model on the first and measures it on the last of its held-out texts. For
# another model and other texts set in the environment:
#   MODEL         directory of the model               models/demo
#   CALIBRATION   text to calibrate on                 the first 20 of models/demo/eval/recall.jsonl
#   HELD_OUT      text to measure on, another          the last 20 of them
#   TOKENS        of each, at most                     16384
#   SPECS         a list of SCHEME:BITS[:SCALE]        all, pow2 with scale pow2 too, pow2:4 with fewer
#                                                      bits of inputs, and pruned, and apot:4 with a
#                                                      head of 8 and 4 bits
#   INNERQ        the program                          build/release/innerq, which it builds
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${1:-build/low-bit}
mkdir -p "$out"
if [[ -z ${INNERQ:-} ]]; then
  [[ -f build/release/build.ninja ]] || cmake --preset release >/dev/null
  cmake --build --preset release
  INNERQ=build/release/innerq
fi
model=${MODEL:-models/demo}
tokens=${TOKENS:-16384}
calibration=${CALIBRATION:-$out/calibration.jsonl}
held_out=${HELD_OUT:-$out/held-out.jsonl}
[[ -n ${CALIBRATION:-} ]] || head -n 20 models/demo/eval/recall.jsonl >"$calibration"
[[ -n ${HELD_OUT:-} ]] || tail -n 20 models/demo/eval/recall.jsonl >"$held_out"
checkpoint=$(mktemp -d)
trap 'rm -rf "$checkpoint"' EXIT

# Quantizes, and prints a row of the table: the name, then what the run measured.
measure() {
  local name=$1
  shift
  rm -rf "$checkpoint"
  "$INNERQ" quantize "$model" "$checkpoint" --evaluate "$held_out" --evaluate-tokens "$tokens" \
    "$@" >"$out/$name.txt"
  local bits measured
  bits=$(sed -n 's/.* weights in \([0-9.]*\) bits each.*/\1/p' "$out/$name.txt")
  measured=$(tail -n 1 "$out/$name.txt" | cut -d '|' -f 3-)
  printf '| %-26s | %5s |%s\n' "$name" "$bits" "$measured"
}

printf '| %-26s | %5s | perplexity | KL, mean            | 99th pct | top-1   |\n' weights bits
printf '|%s|------:|-----------:|--------------------:|---------:|--------:|\n' "$(printf -- '-%.0s' {1..28})"
for spec in ${SPECS:-uniform:8 uniform:4 apot:4 pow2:4 uniform:3 pow2:3 pow2:2 pow2:4:pow2 pow2:3:pow2}; do
  IFS=: read -r scheme bits scale <<<"$spec"
  options=(--scheme "$scheme" --bits "$bits" --scale "${scale:-free}")
  name="$scheme $bits${scale:+, $scale}"
  measure "$name" "${options[@]}"
  options+=(--calibration "$calibration" --calibration-tokens "$tokens")
  measure "$name, calibrated" "${options[@]}"
done
if [[ -n ${SPECS:-} ]]; then exit; fi
options=(--scheme pow2 --bits 4 --calibration "$calibration" --calibration-tokens "$tokens")
for activation_bits in 8 4 3; do
  measure "pow2 4, inputs of $activation_bits bits" "${options[@]}" --activation-bits "$activation_bits"
done
measure "pow2 4, half pruned" "${options[@]}" --prune 0.5
options=(--scheme apot --bits 4 --calibration "$calibration" --calibration-tokens "$tokens")
for head_bits in 8 4; do
  measure "apot 4, head of $head_bits bits" "${options[@]}" --head-bits "$head_bits"
done
