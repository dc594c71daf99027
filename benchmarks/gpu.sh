#!/usr/bin/env bash
# All that needs a GPU, in one go under eight minutes: the GPU tests, then every benchmark, each within its own time.
# What fails does not stop the rest; the end names it, and the exit status tells. Results go to $OUT too, if that is set.
set -uo pipefail
cd "$(dirname "$0")/.."

failed=()
part() { # seconds, name, command...
    local limit=$1 name=$2
    shift 2
    printf '\n=== %s\n' "$name"
    local start=$SECONDS status=0
    timeout --kill-after=5 "$limit" "$@" || status=$?
    printf -- '--- %s: status %d after %d s\n' "$name" "$status" "$((SECONDS - start))"
    [ "$status" -eq 0 ] || failed+=("$name ($status)")
}

part 200 tests python -m pytest -m gpu -q -p no:cacheprovider
part 80 orthogonalize python benchmarks/orthogonalize.py
part 80 muon_step python benchmarks/muon_step.py
part 50 max_logits python benchmarks/max_logits.py
part 70 train_step python benchmarks/train_step.py

if [ -n "${OUT:-}" ]; then
    # One file: whoever fetches results may limit how many there are.
    tar -czf "$OUT/results.tar.gz" -C benchmarks results || failed+=("copying results")
fi

echo
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all passed"
