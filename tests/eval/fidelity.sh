#!/usr/bin/env bash
# What each preset's cache, and the paper's codec, cost a model: every task of `innerq eval`.
#
#   tests/eval/fidelity.sh [OUT_DIR [--set a.b.c=value ...]]
#
# Prints the tables; OUT_DIR (build/fidelity) gets them as JSON and SVG. By default it measures the
# demo model on its held-out sets. Goes on after a task that cannot be done, and fails in the end.
# For another model and other texts set in the environment:
#   CONFIG      configuration with the model          configs/demo.json
#   TEXTS       files for perplexity and kl, a list   models/demo/eval/recall.jsonl
#   PROMPTS     files for longgen, a list             models/demo/eval/recall.jsonl
#   PROBLEMS    problems for gsm8k                    models/demo/eval/problems.jsonl
#   SHOTS       worked examples for gsm8k             tests/eval/shots.jsonl
#   NUM_SHOTS   of them                               8
#   NUM_PROBLEMS  of the problems                     200
#   MAX_TOKENS  longest answer to a problem           400
#   LENGTHS     prompts of recall, tokens             512,1024,2048
#   TOKENS      answers of longgen, tokens            512
#   DEPTHS      of needles, percent                   10,30,50,70,90
#   TRIALS      needles per length and depth          20
#   LIMIT       documents of a file (and windows of a document, for perplexity and kl): 20
#   OVERRIDES   keys replaced in all quantized caches none; key.group_size=8,value.group_size=8
#                                                     for a model with heads of 8 dimensions
#   INNERQ      the program                           build/release/innerq, which it builds
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${1:-build/fidelity}
shift || true
mkdir -p "$out"

if [[ -z ${INNERQ:-} ]]; then
  [[ -f build/release/build.ninja ]] || cmake --preset release >/dev/null
  cmake --build --preset release
  INNERQ=build/release/innerq
fi

overrides=${OVERRIDES:+,$OVERRIDES}
caches=()
for preset in int8 int4 innerq_base innerq_small innerq_hybrid kivi kivi_sink; do
  caches+=(--cache "configs/$preset.json$overrides")
done
# The paper's codec at the bits of innerq_base.
caches+=(--cache "configs/innerq_base.json,key.codec=paper,value.codec=paper$overrides")

# The options that give a list of files.
text_options() {
  for file in $1; do printf -- '--text\n%s\n' "$file"; done
}
mapfile -t texts < <(text_options "${TEXTS:-models/demo/eval/recall.jsonl}")
mapfile -t prompts < <(text_options "${PROMPTS:-models/demo/eval/recall.jsonl}")
limit=${LIMIT:-20}

failed=0
measure() {
  local task=$1
  shift
  "$INNERQ" eval "$task" -c "${CONFIG:-configs/demo.json}" \
    "${caches[@]}" --json "$out/$task.json" --plot "$out/$task.svg" "$@" || failed=$?
  if ((failed > 128)); then exit "$failed"; fi  # a signal
  echo
}

measure kl "${texts[@]}" --limit "$limit" "$@"
measure perplexity "${texts[@]}" --limit "$limit" "$@"
measure gsm8k --data "${PROBLEMS:-models/demo/eval/problems.jsonl}" \
  --limit "${NUM_PROBLEMS:-200}" --shots "${SHOTS:-tests/eval/shots.jsonl}" \
  --num-shots "${NUM_SHOTS:-8}" --max-tokens "${MAX_TOKENS:-400}" "$@"
measure recall --lengths "${LENGTHS:-512,1024,2048}" --depths "${DEPTHS:-10,30,50,70,90}" \
  --trials "${TRIALS:-20}" "$@"
measure longgen "${prompts[@]}" --limit "$limit" --tokens "${TOKENS:-512}" "$@"
exit "$failed"
