#!/usr/bin/env bash
# The first hour on a GPU: what nothing without one can show, most telling first.
#
#     bench/first_gpu.sh [PART ...]      all, or only some of: tests example logits linear 1b 7b
#
# Each part ends within 10 minutes, stands alone, and is appended to bench/RESULTS.md as far as it
# came, also where it fails; logs stay in runs/first_gpu. PYTHON names another interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} results=${RESULTS:-bench/RESULTS.md} logs=runs/first_gpu
gpu=$(nvidia-smi --query-gpu=name,power.limit,driver_version,memory.total --format=csv,noheader) || {
    echo "error: nvidia-smi finds no GPU here" >&2
    exit 1
}
say="import torch, triton; print(f'PyTorch {torch.__version__}, Triton {triton.__version__}')"
versions=$("$python" -c "$say") || exit 1
commit=$(git rev-parse --short HEAD)$(git diff --quiet HEAD || echo " with changes")
mkdir -p "$logs"
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}  # as train.py
failed=0

part() {  # name, how its output is shown (table, or lines from its end), command ...
    local name=$1 shown=$2 began=$SECONDS rc
    shift 2
    echo "--- $name: $*"
    timeout --kill-after=20 580 "$@" >"$logs/$name.out" 2>"$logs/$name.err"
    rc=$?
    [ $rc = 0 ] || failed=1
    {
        printf '\n### %s: `%s`, exit code %s after %s s\n\n' "$name" "$*" $rc $((SECONDS - began))
        if [ "$shown" = table ]; then
            cat "$logs/$name.out"
        else
            printf '```\n%s\n```\n' "$(tail -n "$shown" "$logs/$name.out")"
        fi
        [ $rc = 0 ] || printf '\nIts last words:\n\n```\n%s\n```\n' "$(tail -n 15 "$logs/$name.err")"
    } | tee -a "$results"
}

run() {
    case $1 in
    tests) part tests 25 "$python" -m pytest -q -rs tests/test_cross_entropy.py \
        tests/test_linear_cross_entropy.py tests/test_loss.py tests/test_model.py tests/test_train.py ;;
    example) part example 12 bash -c "$python train.py @examples/sums/flags.txt --out $logs/sums-$$ \
        && $python examples/sums/score.py $logs/sums-$$/model" ;;
    logits) part logits table "$python" bench/kernels.py --only logits --markdown ;;
    linear) part linear table "$python" bench/kernels.py --only linear --markdown ;;
    1b) part 1b table "$python" bench/train.py --geometry 1b --rounds 2 --markdown ;;
    7b) part 7b table "$python" bench/train.py --geometry mistral-7b --accumulate 4 --rounds 2 \
        --markdown ;;
    esac
}

parts=("$@")
[ $# -gt 0 ] || parts=(tests example logits 1b linear 7b)
for name in "${parts[@]}"; do
    case $name in
    tests | example | logits | linear | 1b | 7b) ;;
    *) echo "error: no part $name: tests example logits linear 1b 7b" >&2 && exit 1 ;;
    esac
done
printf '\n## On a GPU, %s: commit %s, %s\n\n%s\n' "$(date +%F)" "$commit" "$gpu" "$versions" |
    tee -a "$results"
for name in "${parts[@]}"; do run "$name"; done
exit $failed
