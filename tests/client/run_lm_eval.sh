#!/usr/bin/env bash
# Runs lm-evaluation-harness against the server on stories260K, on the reference device and on the
# CPU's, and compares every log-likelihood with an implementation in numpy.
#   tests/client/run_lm_eval.sh [BINARY]     default: build/release/innerq
# Needs the test data outside the repository ($INNERQ_SHARED or ../shared) and, once, a network.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
binary=$(realpath "${1:-build/release/innerq}")
models=$(realpath "${INNERQ_SHARED:-../shared}")/assets/models
venv=$root/build/lm-eval-venv
results=$root/build/lm-eval-results

if [[ ! -d $models ]]; then
  echo "run_lm_eval: skipped, there is no $models"
  exit 0
fi
requirements=tests/client/requirements-lm-eval.txt
if ! cmp -s $requirements "$venv/requirements.txt"; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check -r $requirements
  cp $requirements "$venv/requirements.txt"
fi

log=$(mktemp)
trap 'kill ${server:-} 2>/dev/null || true; rm -f "$log"' EXIT
# Everything the harness needs is here; the hub's caches stay below build.
export HF_HUB_OFFLINE=1 HF_HOME=$root/build/lm-eval-cache PYTHONDONTWRITEBYTECODE=1

for device in reference cpu; do
  echo "== backend.device: $device"
  "$binary" serve -c configs/fp16.json --set "model.path=$models/stories260K-hf" \
    --set model.alias=stories --set server.port=0 --set kv_cache.memory=64MiB \
    --set backend.device=$device >"$log" &
  server=$!
  until grep -q '^ready: ' "$log"; do
    kill -0 $server
    sleep 0.1
  done
  url=$(sed -n 's/^ready: //p' "$log")

  rm -rf "$results"
  # It sends lists of token ids with echo and logprobs, several prompts in a request.
  batches=max_length=512,num_concurrent=4
  (cd tests/client/lm_eval && "$venv/bin/lm_eval" run --model local-completions \
    --model_args "model=stories,base_url=$url/completions,tokenizer_backend=remote,$batches" \
    --batch_size 4 --include_path . --tasks stories_choice,stories_continue \
    --output_path "$results" --log_samples)
  "$venv/bin/python" tests/client/lm_eval/compare.py "$url" "$models/stories260K" "$results" $device
  kill $server
  wait $server
done
