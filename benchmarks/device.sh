#!/usr/bin/env bash
# Everything there is to learn of a GPU in under ten minutes, in one command:
#
#     benchmarks/device.sh FOLDER            on a machine with a GPU (Hopper or later)
#     benchmarks/device.sh --dry-run FOLDER  on any machine: the same stages, tiny, on the CPU
#
# FOLDER gets environment.txt, conformance.txt, kernels.json, errors.json, trace.json, certificate.json, result.json and
# log.txt as the stages end; each stage has its own limit of time and none stops the others. Before them it says which
# packages are missing and how to get them. Keep the files under benchmarks/results/. PYTHON names another interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
dry=""
[ "${1:-}" = "--dry-run" ] && { dry=1; shift; }
[ $# = 1 ] || { echo "usage: benchmarks/device.sh [--dry-run] FOLDER"; exit 2; }
mkdir -p "$1" && out="$(cd "$1" && pwd)"
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" benchmarks/device_needs.py || exit 1
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

stage() { # name, seconds, command ...
    local name="$1" limit="$2" began=$SECONDS
    shift 2
    timeout "$limit" "$@" 2>&1
    local code=$?
    echo "== $name: exit code $code after $((SECONDS - began)) s"
}

if [ -n "$dry" ]; then
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    cat > "$work/config.json" <<'JSON'
{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 64,
 "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
 "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": 2}
JSON
    model="$work/config.json"
    chosen="cuda and (numerics or (gqa and (only_wanted or memory_is)))"
    kernels=(--rows 16 --contexts 20)
    errors=(--tokens 12)
    # What needs many steps runs on the plain backend: an interpreter is slow.
    engine=(--backend torch --device cpu)
    trace=(--requests 12 --repeats 2 --shorten 8 --max-num-seqs 4 --max-num-batched-tokens 32 --batch 2
        --sample-batches 1 --transformers-seconds 5)
    slots=(--max-num-seqs 4 --max-num-batched-tokens 32)
else
    model=llama2-7b
    chosen="cuda"
    kernels=()
    errors=()
    engine=(--backend cuda --device cuda)
    trace=()
    slots=(--max-num-seqs 256 --max-num-batched-tokens 256)
fi

{
    { nvidia-smi || true; "$python" -c 'import platform, torch; print(platform.platform(), torch.__version__)'; } \
        > "$out/environment.txt" 2>&1
    stage conformance 110 "$python" -m pytest -q -p no:cacheprovider tests/ops tests/backends/cuda/test_triton_kernels.py \
        tests/backends/cuda/test_numerics.py tests/backends/conformance -k "$chosen" --durations=5 > "$out/conformance.txt"
    tail -3 "$out/conformance.txt"
    if command -v compute-sanitizer > /dev/null; then # bad addresses that happen to be mapped show in nothing else
        stage addresses 50 compute-sanitizer --error-exitcode 9 --print-limit 5 "$python" -m pytest -q -p no:cacheprovider \
            tests/backends/conformance/test_steps.py -k "cuda and gqa and (at_once or chunks)"
    fi
    stage kernels 70 "$python" benchmarks/device_kernels.py --model "$model" "${kernels[@]}" --output "$out/kernels.json"
    stage errors 80 "$python" benchmarks/device_errors.py --model "$model" "${errors[@]}" --output "$out/errors.json"
    stage trace 130 "$python" benchmarks/device_trace.py --model "$model" "${engine[@]}" "${trace[@]}" \
        --dataset "$work/trace.jsonl" --output "$out/trace.json"
    stage certificate 150 "$python" -m isologit run --model "$model" --load-format dummy "${engine[@]}" "${slots[@]}" \
        --dataset "$work/trace.jsonl" --ignore-eos --speculative-tokens 0 --baseline-requests 0 --certify-seconds 60 \
        --output "$work/run" --json
    cp "$work/run/certificate.json" "$out/"
    sed "s#$work/##g" "$work/run/result.json" > "$out/result.json"
} 2>&1 | sed -u -e "s#$work/##g" -e "s#$PWD/##g" | tee "$out/log.txt"
grep -q "exit code [^0]" "$out/log.txt" && { echo "a stage failed; see $out/log.txt"; exit 1; }
exit 0
