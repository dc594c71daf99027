#!/usr/bin/env bash
# All that needs a GPU, in one go of five and a half minutes: checks and compilations side by side, then timings alone.
#
#   bash benchmarks/gpu.sh          # results in benchmarks/results/, and in $OUT with the logs if that is set
#   bash benchmarks/gpu.sh --dry    # a rehearsal of all of it on a CPU, which keeps nothing
#
# Each part has its own time. What fails does not stop the rest; the end names it, and the exit status tells.
set -uo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/done" "$work/site"

# The package as it is installed, with its configs.
cp -r lightning_muonclip "$work/site/"
[ -e "$work/site/lightning_muonclip/conf" ] || cp -r conf "$work/site/lightning_muonclip/conf"
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [ "${1:-}" = --dry ]; then
    export BENCHMARK_DRY=1 BENCHMARK_RESULTS=$work/results OMP_NUM_THREADS=1 OUT=
    total=${SECONDS_IN_ALL:-3600} patience=600 at_once=${AT_ONCE:-1}
    accelerator=cpu gpu=(trainer=cpu trainer.precision=bf16-mixed) compile=false workers=()
    tiny=(trainer.max_steps=2 trainer.val_check_interval=1 data.max_bytes=200000 data.val_batches=1 data.block_size=32
        data.batch_size=2 model.num_hidden_layers=1 model.hidden_size=16)
else
    total=${SECONDS_IN_ALL:-330} patience=0 at_once=16
    accelerator=gpu gpu=(trainer=gpu) compile=true workers=(-n 6 --dist load) tiny=()
    if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "torch sees no GPU here; bash benchmarks/gpu.sh --dry rehearses on a CPU" >&2
        exit 2
    fi
fi

logs=${OUT:-$work}/logs
missed="failed (no time left)"
mkdir -p "$logs"

part() { # seconds, name, command...: runs it into a log, within its time and that of all
    local limit=$(($1 > patience ? $1 : patience)) name=$2 left=$((total - SECONDS)) start=$SECONDS status=0
    shift 2
    if [ "$left" -lt 10 ]; then
        echo "$missed" >"$work/done/$name"
        return
    fi
    timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" >"$logs/$name.log" 2>&1 || status=$?
    printf '\n--- %s: status %d after %d s\n' "$name" "$status" "$((SECONDS - start))"
    tail -n "$([ "$status" -eq 0 ] && echo 3 || echo 15)" "$logs/$name.log" | cut -c 1-300
    case $status in
        0) echo passed ;;
        124 | 137) echo "out of time" ;;
        *) echo "failed ($status)" ;;
    esac >"$work/done/$name"
}

beside() { # as part, side by side with others
    while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do
        wait -n
    done
    part "$@" &
}

alone() { # as part, and shows all of its table
    part "$@"
    cat "$logs/$2.log" 2>/dev/null
}

train() { # seconds, name, overrides...: muonclip-train; away from this folder, whose package has no configs
    local limit=$1 name=$2
    shift 2
    mkdir -p "$work/$name"
    beside "$limit" "$name" env -C "$work/$name" python -m lightning_muonclip.experiment.train \
        "hydra.run.dir=$work/$name" "logger.csv.save_dir=${OUT:-$work}/$name" "$@" "${tiny[@]}"
}

# First the checks, and what fills the compilers' caches.
mapfile -t tested < <(grep -rlE 'mark\.gpu' tests --include='test_*.py')
(
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TORCHINDUCTOR_COMPILE_THREADS=4
    rehearsed=(env BENCHMARK_ROUNDS=1 "BENCHMARK_RESULTS=$work/warm" OUT=)
    beside 130 warm_train_step python benchmarks/train_step.py --warm
    beside 130 tests python -m pytest -m gpu -q -p no:cacheprovider "${workers[@]}" "${tested[@]}"
    beside 110 gpu_sync python benchmarks/gpu_sync.py
    beside 120 gpu_families python benchmarks/gpu_families.py
    beside 110 warm_max_logits "${rehearsed[@]}" python benchmarks/max_logits.py
    beside 80 warm_muon_step "${rehearsed[@]}" python benchmarks/muon_step.py --heads
    # Triton compiles for any value but 1.
    beside 80 gpu_kernels env "TRITON_INTERPRET=${BENCHMARK_DRY:-0}" python benchmarks/gpu_kernels.py
    sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer)
    if [ -n "$sanitizer" ] && [ "$accelerator" = gpu ]; then
        # Without torch's cache, an access past the end of a tensor is one past the end of an allocation.
        beside 120 memcheck env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "BENCHMARK_RESULTS=$work/warm" OUT= \
            "$sanitizer" --tool memcheck --error-exitcode 9 python benchmarks/gpu_kernels.py
    else
        echo "skipped: no compute-sanitizer here" >"$work/done/memcheck"
    fi
    short=(trainer.max_steps=60 trainer.val_check_interval=30)
    train 120 train_ddp trainer=ddp trainer.devices=1 "trainer.accelerator=$accelerator" "${short[@]}"
    train 120 train_fsdp2 trainer=fsdp2 trainer.devices=1 "trainer.accelerator=$accelerator" "${short[@]}"
    train 120 train_compiled "${gpu[@]}" "lit.compile=$compile" "${short[@]}"
    train 120 train_float16 "${gpu[@]}" trainer.precision=16-mixed "${short[@]}"
    wait
)

# Then the timings, each alone, the most telling first.
alone 90 train_step python benchmarks/train_step.py
alone 50 muon_step python benchmarks/muon_step.py --heads
alone 40 max_logits python benchmarks/max_logits.py
alone 30 orthogonalize python benchmarks/orthogonalize.py

# And whole trainings for what time is left.
missed="not run: no time left"
train 60 demo "${gpu[@]}"
train 60 explosion "${gpu[@]}" experiment=explosion muonclip.threshold=null
train 60 explosion_clipped "${gpu[@]}" experiment=explosion
wait

echo
(cd "$work/done" && for name in *; do printf '%-20s %s\n' "$name" "$(cat "$name")"; done)
if [ "$accelerator" = cpu ]; then
    echo "skipped without CUDA: the GPU tests, a compiled training, NCCL, compute-sanitizer"
    grep -h '^skipped without CUDA' "$logs"/*.log | sort -u
fi
if grep -qE '^(failed|out of time)' "$work"/done/*; then
    exit 1
fi
echo "in $SECONDS s: nothing failed"
