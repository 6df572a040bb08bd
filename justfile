# Recipes chain the commands of `projected-grpo`; run them as `uv run just RECIPE`.
set shell := ["bash", "-euo", "pipefail", "-c"]

# the recipes
default:
    @just --list

# extract, pool, train and eval of the projected arm on a tiny random model, through the real command line
smoke *flags:
    OMP_NUM_THREADS=1 projected-grpo smoke {{flags}}

# the same without projection: measured, not touched
smoke-vanilla:
    OMP_NUM_THREADS=1 projected-grpo smoke --arms vanilla --out out/smoke-vanilla

# every arm, once with cold caches and once with warm ones
smoke-all:
    rm -rf out/smoke-all
    for caches in cold warm; do \
      echo "== $caches caches"; \
      OMP_NUM_THREADS=1 PROJECTED_GRPO_CACHE=out/smoke-all/cache projected-grpo smoke --out out/smoke-all/$caches --arms \
        vanilla projected held random random_matched placebo_style placebo_wrong flipped; \
    done

# SmolLM2-135M (Q4_1 weights, dequantised) on real problems, a few steps on the CPU
smoke-real:
    projected-grpo smoke --preset smoke-real --out out/smoke-real

# the fast suite
test *flags:
    pytest -n 2 --dist loadfile -m "not slow" {{flags}}

# what takes minutes
test-slow *flags:
    pytest -m slow {{flags}}

# lint, format and types
check:
    ruff check .
    ruff format --check .
    mypy

# the executable definition of every pair's axis
pairs-check:
    projected-grpo pairs check

# rows that load, canonical solutions that pass, wrong ones that fail; FILE: a built-in part or a file
problems-check *files="train eval pairs smol-train smol-eval smol-pairs":
    projected-grpo problems check {{files}}

# the grader against a fresh interpreter for each completion
bench-grader *flags:
    OMP_NUM_THREADS=1 projected-grpo bench grader {{flags}}

# the published benchmark's files to out/data, checksums verified, where there is a network
download-data:
    projected-grpo download-data

# warm Qwen3-4B's cache, where there is a network
download-model:
    hf download Qwen/Qwen3-4B

# one projected run of the published 20-step setting; `problems`: the built-in part or a file
fast problems="train": (_pool problems)
    projected-grpo train fast --problems {{problems}} --teacher-pool out/pools/{{file_stem(problems)}}.jsonl

# one projected run of the published 200-step setting
full problems="train": (_pool problems)
    projected-grpo train full --problems {{problems}} --teacher-pool out/pools/{{file_stem(problems)}}.jsonl

# the full preset: the basis once, then vanilla and projected for seeds 41 42 43, skipping what is done
queue-full problems="train" *flags: (queue "full" problems flags)

# the same for any preset; an interrupted run is resumed; `problems`: the preset's own by default
queue preset problems="" *flags:
    projected-grpo sweep --preset {{preset}} --arms vanilla,projected --seeds 41,42,43 {{flags}} \
      {{ if problems == "" { "" } else { "--problems " + problems + " --teacher-pool out/pools/" + file_stem(problems) + ".jsonl" } }}

# the microcosm from nothing: base model, vanilla beside projected, their curves
micro *flags:
    projected-grpo make-micro
    projected-grpo sweep sweeps/micro.toml {{flags}}
    projected-grpo report out/micro/micro --out out/micro/report --overwrite

# the first question on the microcosm, five arms x five seeds on the CPU, and its report
replicate-quick *flags:
    projected-grpo sweep sweeps/replicate_quick.toml {{flags}}
    projected-grpo report out/replicate-quick/micro --out out/replicate-quick/report --overwrite

# the whole matrix of the microcosm, eight arms x ten seeds, and its report
replicate *flags:
    projected-grpo sweep sweeps/replicate.toml {{flags}}
    projected-grpo report out/replicate/micro --out out/replicate/report --against projected --overwrite

# preset `smol`, four arms x three seeds (over an hour on two cores), and its report
replicate-smol *flags:
    projected-grpo sweep sweeps/replicate_smol.toml {{flags}}
    projected-grpo report out/replicate-smol/smol --out out/replicate-smol/report --overwrite

# what a basis stops that was made without the pairs of one style, or of one loophole mode; two reports
leave-one-out *flags:
    projected-grpo sweep sweeps/leave_one_style_out.toml {{flags}}
    projected-grpo report out/leave-one-style-out/micro --out out/leave-one-style-out/report --overwrite
    projected-grpo sweep sweeps/leave_one_mode_out.toml {{flags}}
    projected-grpo report out/leave-one-mode-out/micro --out out/leave-one-mode-out/report --overwrite

# every gate, target, refresh and control of the microcosm once, and its report
controls *flags:
    projected-grpo sweep sweeps/controls.toml {{flags}}
    projected-grpo report out/controls/micro --out out/controls/report --overwrite

# the microcosm with no, an eighth and half teacher rows, and its report
teacher *flags:
    projected-grpo sweep sweeps/teacher.toml {{flags}}
    projected-grpo report out/teacher/micro --out out/teacher/report --overwrite

# k, the number of pairs and the noise floor, one at a time, eight bases, and its report
knobs *flags:
    projected-grpo sweep sweeps/knobs.toml {{flags}}
    projected-grpo report out/knobs/micro --out out/knobs/report --against projected --overwrite

# changes to the method beside the published one, nine arms x eight seeds, and their report
changes *flags:
    projected-grpo sweep sweeps/changes.toml {{flags}}
    projected-grpo report out/changes/micro --out out/changes/report --against projected-update --overwrite

# eight base models with a seed of their own, eight arms on each, and their report
bases *flags:
    projected-grpo sweep sweeps/bases.toml {{flags}}
    projected-grpo report out/bases/micro --out out/bases/report --against projected --overwrite

# the noise floor left out, random directions, δ closed off along the basis and moved along it; eight fresh bases, and the report
floor *flags:
    projected-grpo sweep sweeps/floor.toml {{flags}}
    projected-grpo report out/floor/micro --out out/floor/report --against projected --overwrite

# half teacher rows: all of the gradient projected, the student's part alone, or the update; eight bases, and its report
teacher-rows *flags:
    projected-grpo sweep sweeps/teacher_rows.toml {{flags}}
    projected-grpo report out/teacher-rows/micro --out out/teacher-rows/report --against projected --overwrite

# Adam's first decay, both targets, beside the runs of `just floor` on the same eight bases, and the report of both
adam *flags:
    projected-grpo sweep sweeps/adam.toml {{flags}}
    projected-grpo report out/adam/micro out/floor/micro --out out/adam/report --overwrite

# finished runs of `just floor` with δ moved along their base's real basis, and along its random one
steer:
    for kind in projected random; do \
      OMP_NUM_THREADS=1 projected-grpo steer out/floor/micro/{vanilla,projected}_s* --at 0 0.2 0.5 1 --samples 2 \
        --basis "out/floor/micro/${kind}_s{seed}/basis.safetensors" --out out/floor/steer-$kind.json --overwrite & \
    done; \
    for job in $(jobs -p); do wait $job; done

# exploratory: δ held above a floor along the basis, at several rates, two seeds, and its report
hold-rate *flags:
    projected-grpo sweep sweeps/hold_rate.toml {{flags}}
    projected-grpo report out/hold-rate/micro --out out/hold-rate/report --against projected-update --overwrite

# SmolLM2-135M with half teacher rows, vanilla, projected with pairs in the teacher's words and in others, random; its report
smol *flags:
    projected-grpo sweep sweeps/smol.toml {{flags}}
    projected-grpo report out/smol/smol --out out/smol/report --overwrite

_pool problems:
    [ -f out/pools/{{file_stem(problems)}}.jsonl ] || \
      projected-grpo pool build --problems {{problems}} --out out/pools/{{file_stem(problems)}}.jsonl
