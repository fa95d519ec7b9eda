#!/usr/bin/env bash
# Everything that matters on a GPU, in one command and under eight minutes: correctness first, then
# folds, serving and swaps of GPT-2 small and medium with random weights. Downloads nothing.
# Without a GPU the same runs on the CPU with tiny settings, to see that the script works.
#
#     benchmarks/gpu.sh [FOLDER FOR RESULTS]
#
# PYTHON names the interpreter; it needs torch, transformers, safetensors, tokenizers, grpcio,
# protobuf and rich. Without peft, pytest or matplotlib what needs them is left out, with a line.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${1:-benchmarks/results/gpu}
cache=${CACHE:-$(mktemp -d)}
[ -n "${CACHE:-}" ] || trap 'rm -rf "$cache"' EXIT
limit=${SECONDS_IN_ALL:-470}
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false
export PYTHONUNBUFFERED=1 PYTHONPATH="server:client:adapters:proto:.${PYTHONPATH:+:$PYTHONPATH}"
failed=""

has() { "$python" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$1'))" 2>/dev/null; }

# run SECONDS COMMAND...: one step with a limit of its own, and never beyond the limit in all.
run() {
    local most=$1 left=$((limit - SECONDS))
    shift
    if [ "$left" -lt 5 ]; then
        echo "gpu.sh: no time left for: $*"
        failed="$failed; $*"
        return
    fi
    [ "$most" -lt "$left" ] || most=$left
    echo "gpu.sh: at $SECONDS s, at most $most s: $*"
    timeout --signal=INT --kill-after=10 "$most" "$@" || failed="$failed; $* (status $?)"
}

bench() {
    local most=$1 name=$2
    shift 2
    if ! has "benchmarks.$name"; then
        echo "gpu.sh: benchmarks/$name.py is absent: left out"
        return
    fi
    run "$most" "$python" -m "benchmarks.$name" --out "$out" --cache "$cache" "$@"
}

mkdir -p "$out"
"$python" -m benchmarks.machine || exit 1
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    # What warns elsewhere than in the tested environment is no failure.
    pytest="$python -m pytest -q -p no:cacheprovider -o addopts=--import-mode=importlib -W default"
    has xdist && pytest="$pytest -n 8"
    if has pytest; then
        run 60 $pytest -o timeout=0 tests/server/test_cuda.py
        # Through a socket: meaning, exact bits, verification, faults.
        TEST_DEVICE=cuda run 90 $pytest -o timeout=0 tests/integration/test_semantics.py \
            tests/integration/test_bits.py tests/integration/test_verify.py \
            tests/integration/test_faults.py
    else
        echo "gpu.sh: pytest is absent: the tests were left out"
    fi
    # Loading takes longer than measuring here: the rest of the contestants say little on a GPU.
    contestants=(--only bare --only merged --only mixed --only "merged over gRPC"
        --only "transformers generate bfloat16")
    # The most telling first: what comes last may find no time left.
    bench 60 correctness --model small --dtype float32
    bench 40 correctness --model small --dtype bfloat16
    bench 40 fold --model small --dtype bfloat16 --seconds 6
    bench 150 serving --model small --dtype bfloat16 --seconds 30 --streams 1,8,32 "${contestants[@]}"
    bench 90 swaps --model small --dtype bfloat16 --seconds 24 --variants default,engine
    bench 90 swaps --model small --dtype float32 --seconds 24 --variants default,churn
    bench 40 fold --model small --dtype float32 --seconds 5
    bench 40 fold --model medium --dtype bfloat16 --seconds 6
    bench 100 serving --model medium --dtype bfloat16 --seconds 16 --streams 1,8 --no-grpc \
        "${contestants[@]}"
else
    echo "gpu.sh: no GPU: the CPU with tiny settings, figures mean nothing"
    bench 60 correctness --model tiny --dtype float32 --new-tokens 8
    bench 60 fold --model tiny --dtype bfloat16 --seconds 2
    bench 180 serving --model tiny --seconds 5 --streams 1,4 --new-tokens 8
    bench 90 swaps --model tiny --seconds 4 --variants default --rates 0,10
fi
echo "gpu.sh: $SECONDS s in all; results in $out"
if [ -n "$failed" ]; then
    echo "gpu.sh: failed${failed}"
    exit 1
fi
