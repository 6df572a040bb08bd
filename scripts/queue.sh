#!/usr/bin/env bash
# vanilla and projected for seeds 41 42 43 of one preset, one after another: the basis once, done runs skipped, an
# interrupted run resumed. Usage: scripts/queue.sh PRESET [PROBLEMS]; the teacher pool of PROBLEMS must be there.
set -euo pipefail
preset=$1 problems=${2:-train}
pool=out/pools/$(basename "${problems%.*}").jsonl
basis=out/basis/$preset.safetensors
[ -f "$basis" ] || projected-grpo extract "$preset" --out "$basis"
for seed in 41 42 43; do
  for arm in vanilla projected; do
    run=out/runs/$preset/${arm}_s$seed
    if [ -f "$run/config.json" ] && ! grep -qF "\"problems\": \"$problems\"" "$run/config.json"; then
      echo "error: $run was made with other problems; move it away" >&2
      exit 2
    fi
    if [ -f "$run/eval.json" ]; then
      echo "$run is done"
      continue
    fi
    if [ ! -f "$run/adapter/adapter_config.json" ]; then
      if compgen -G "$run/checkpoints/checkpoint-*" > /dev/null; then
        projected-grpo train --config "$run/config.json" --resume
      else
        projected-grpo train "$preset" --arm "$arm" --seed "$seed" --basis "$basis" \
          --problems "$problems" --teacher-pool "$pool" --overwrite
      fi
    fi
    projected-grpo eval --run "$run"
  done
done
