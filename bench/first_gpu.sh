#!/usr/bin/env bash
# The first 15 minutes on a GPU: what nothing without one can show, the most telling first.
#
#     bench/first_gpu.sh [PART ...]    without one: device kernel block logits 1b 7b
#                                      in a second call: bench/first_gpu.sh example linear peers
#
# It ends after LIMIT seconds (540). A part gets its own limit or what is left, whichever is less;
# one that fails does not stop the next. All that is printed is under OUT (runs/first_gpu) as soon
# as it is printed, so that a kill loses nothing. PYTHON is the interpreter (.venv/bin/python).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} out=${OUT:-runs/first_gpu} limit=${LIMIT:-540} failed=0
export PYTHONUNBUFFERED=1 PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

part() {  # name, its limit in seconds, command ...
    local name=$1 most=$2 left=$((limit - SECONDS)) began=$SECONDS rc
    shift 2
    if [ "$left" -lt 20 ]; then
        echo "$name: no time left" | tee -a "$out/summary"
        failed=1
        return
    fi
    [ "$most" -lt "$left" ] || most=$((left - 10))  # 10 s to end in
    echo "--- $name, at most $most s: $*" | tee "$out/$name"
    timeout --kill-after=10 "$most" "$@" 2>&1 | tee -a "$out/$name"
    rc=${PIPESTATUS[0]}
    [ "$rc" = 0 ] || failed=1
    echo "$name: exit code $rc after $((SECONDS - began)) s" | tee -a "$out/summary"
}

bench_train() { "$@" --providers "this project" --rounds 1 --steps 3 --markdown; }

run() {
    case $1 in
    device) part device 60 "$python" bench/first_gpu.py device ;;
    kernel) part kernel 90 "$python" -m pytest -q -rs tests/test_cross_entropy.py \
        tests/test_linear_cross_entropy.py tests/test_model.py tests/test_train.py \
        -k "varlen or on_a_gpu or cross_entropy and not compiled and not h100 and not table" ;;
    block) part block 60 "$python" bench/first_gpu.py block ;;
    logits) part logits 75 "$python" bench/kernels.py --only logits --markdown ;;
    1b) bench_train part 1b 75 "$python" bench/train.py --geometry 1b ;;
    7b) bench_train part 7b 210 "$python" bench/train.py --geometry mistral-7b --accumulate 2 ;;
    example) part example 150 "$python" train.py @examples/sums/flags.txt --out "$out/sums" ;;
    linear) part linear 400 "$python" bench/kernels.py --only linear --markdown ;;
    peers) part peers 300 "$python" bench/train.py --geometry 1b --rounds 2 --markdown ;;
    esac
}

[ $# -gt 0 ] || set -- device kernel block logits 1b 7b
parts=" device kernel block logits 1b 7b example linear peers "
for name; do
    [[ $parts == *" $name "* ]] || { echo "error: no part $name, only$parts" >&2 && exit 1; }
done
mkdir -p "$out"
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
echo "commit $commit, $(date '+%F %T'), at most $limit s: $*" | tee -a "$out/summary"
for name; do run "$name"; done
exit $failed
