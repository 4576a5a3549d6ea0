#!/usr/bin/env bash
# Everything about a GPU in one go: builds the preset cuda for the one that is here, checks the
# kernels against the reference, and measures attention, products and a whole model. What it
# prints is kept in tests/gpu/results/<date>-<device>.txt.
#   tests/gpu/run.sh            all of it, on a machine with a GPU and the CUDA toolkit
#   tests/gpu/run.sh build      only the build, e.g. where there is no GPU; ARCHITECTURES=90 names one
#   tests/gpu/run.sh check      only checks and measurements, with what build left in build/cuda/gpu
# build gathers the programs there, stripped, with the libraries that they load, so that the folder can
# be carried to a machine that cannot build. For Debian 12 or Ubuntu 24.04; ten minutes with 16 cores.
# Peers are measured where they are: PyTorch's attention and Hugging Face transformers with a python3 that
# has them, InnerQ's published kernels if PUBLISHED names a clone of github.com/mthcom/innerq for the build.
set -euo pipefail
cd "$(dirname "$0")/../.."

what=${1:-all}
[[ $what =~ ^(all|build|check)$ ]] || { sed -n '2,11p' "$0" >&2; exit 2; }
out=build/cuda/gpu
programs=(innerq kernels_test models_test engine_test attention_gpu_bench matmul_gpu_bench)
step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }
query() { nvidia-smi --query-gpu="$1" --format=csv,noheader | head -n 1; }

if [[ $what != check ]]; then
  step "build"
  docker/install-deps.sh test
  [[ -d /usr/local/cuda/bin ]] && PATH=$PATH:/usr/local/cuda/bin
  architectures=${ARCHITECTURES:-$(query compute_cap | tr -d .)}
  cmake --preset cuda -DCMAKE_CUDA_ARCHITECTURES="$architectures" >/dev/null
  cmake --build --preset cuda --target "${programs[@]}"
  mkdir -p $out/lib
  git describe --always --dirty >$out/commit
  for program in "${programs[@]}"; do
    path=$(find build/cuda -name "$program" -type f -not -path '*/CMakeFiles/*' -not -path "$out/*")
    strip -o "$out/$program" "$path"
    ldd "$path" | awk '$3 ~ /^\// {print $3}'
  done | sort -u |
    # The C library and the driver belong to the machine; cuBLAS is too large to carry.
    grep -vE '/(libc|libm|libdl|librt|libpthread|libcuda|libcublas(Lt)?)\.so' |
    xargs -I{} cp -L {} $out/lib/
  rm -rf $out/published
  if [[ -n ${PUBLISHED:-} ]]; then
    mkdir -p $out/published
    for tokens in 2048 8192 32768; do
      for product in qkt attn_v; do
        nvcc -DN=$tokens -O3 -w -arch="sm_${architectures%%;*}" \
          "$PUBLISHED/speedtest/benchmark_$product.cu" -o $out/published/$product-$tokens
      done
    done
  fi
fi
[[ $what == build ]] && exit 0

device=$(query name)
mkdir -p tests/gpu/results
log=tests/gpu/results/$(date +%F)-$(tr -c 'A-Za-z0-9\n' '_' <<<"$device").txt
exec > >(tee "$log") 2>&1
echo "commit $(cat $out/commit)"
echo "device $device, driver $(query driver_version), compute capability $(query compute_cap)"
echo "date $(date -u +%FT%TZ)"

# For a machine that has not got the libraries of the build; its own come first.
cuda=$(dirname "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")/../lib64
if ldd $out/kernels_test | grep -q 'not found'; then
  export LD_LIBRARY_PATH=$cuda:$PWD/$out/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi

# A run that skips the GPU says nothing: at least `least` tests must pass, none may be skipped.
run_tests() { # program filter least
  local log passed
  log=$(mktemp)
  "$out/$1" --gtest_filter="$2" | tee "$log" || return 1
  passed=$(sed -n 's/^\[  PASSED  \] \([0-9]*\) test.*/\1/p' "$log")
  if grep -q '^\[  SKIPPED \]' "$log" || ((${passed:-0} < $3)); then
    echo "gpu: $1: expected at least $3 tests passed and none skipped" >&2
    return 1
  fi
  rm "$log"
}
failed=0

step "every operation against the reference"
run_tests kernels_test 'Cuda/*' 16 || failed=1

step "logits do not depend on neighbours, chunks or preemption; golden logits"
run_tests engine_test 'Backends/ExactnessOfCaches.*/cuda_*' 6 || failed=1
"$out/models_test" --gtest_filter='Backends/GoldenTest.*/cuda' || failed=1

step "greedy text of the demo model, device against CPU"
for mode in true false; do
  timeout 240 python3 tests/gpu/greedy_text.py $out/innerq configs/demo.json cpu \
    cuda,backend.deterministic=$mode || failed=1
done

for tool in memcheck racecheck; do
  step "compute-sanitizer $tool"
  if command -v compute-sanitizer >/dev/null; then
    timeout 300 compute-sanitizer --tool $tool --error-exitcode 9 \
      $out/kernels_test \
      --gtest_filter='Cuda/ConformanceOfCuda.Every*/deterministic:Cuda/LowBitOnCuda.*/deterministic' || failed=1
  else
    echo "no compute-sanitizer here: skipped"
  fi
done

step "attention"
timeout 240 $out/attention_gpu_bench || failed=1

step "InnerQ's published kernels: microseconds of K alone and of V alone, 32 heads of 128"
if [[ -d $out/published ]]; then
  for program in $(ls $out/published | sort -t- -k2n); do
    $out/published/"$program" | grep -E 'int3_sym|fp16' || failed=1
  done
else
  echo "not built: skipped"
fi

step "PyTorch's attention"
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  timeout 120 python3 tests/gpu/peer_attention.py --tokens 1024 4096 16384 32768 --batch 1 8 32 ||
    failed=1
else
  echo "no torch here: skipped"
fi

step "products of BF16, F16 and low-bit weights"
timeout 300 $out/matmul_gpu_bench || failed=1

step "a whole model: one sequence, then 64 of 8192 tokens through a quarter of its layers"
model=(innerq bench -c configs/innerq_base.json --set backend.device=cuda --set backend.deterministic=false
       --set scheduler.max_batch_tokens=2048 --shape llama-3.1-8b)
caches=(--cache configs/fp16.json --cache configs/innerq_base.json)
timeout 240 "$out/${model[@]}" "${caches[@]}" --batch 1 --prompt 2048 --generate 64 --runs 2 || failed=1
timeout 120 "$out/${model[@]}" --scheme pow2 --bits 3 --batch 1 --prompt 2048 --generate 64 --runs 2 || failed=1
timeout 240 "$out/${model[@]}" "${caches[@]}" --layers 8 --batch 64 --depth 8064 --prompt 64 \
  --generate 64 --runs 1 || failed=1

# Sampling needs whole rows of logits on the host: 33 MB of them a step.
timeout 120 "$out/${model[@]}" --cache configs/innerq_base.json --layers 8 --batch 64 --prompt 64 \
  --generate 64 --runs 1 --temperature 1 || failed=1

step "the same 64 sequences in Hugging Face transformers"
timeout 240 python3 tests/gpu/peer_transformers.py --layers 8 --batch 64 --depth 8064 --prompt 64 \
  --generate 64 --runs 1 || failed=1

step "kernels of decode steps of two layers, and of attention over 32768 tokens of 8 sequences"
timeout 120 python3 tests/gpu/kernel_times.py "$out/${model[@]}" --layers 2 --batch 1 \
  --cache configs/innerq_base.json --prompt 1 --generate 8 --runs 1 || failed=1
timeout 120 python3 tests/gpu/kernel_times.py $out/attention_gpu_bench tokens=32768 batch=8 \
  model=32x8x128 cache=innerq_base behind= || failed=1

step "done, $([[ $failed == 0 ]] && echo "all passed" || echo "with failures"); kept in $log"
exit $failed
