#!/usr/bin/env bash
# What only a GPU shows, in one run, with its logs in a folder:
#
#   scripts/gpu.sh OUT [TILEKERNELS [TRANSFORMERENGINE]]
#
# tests/gpu and tests/parity, the own tests of TileKernels and TransformerEngine where those are
# checkouts of them, the first step of a fresh process with an empty and with a filled cache, what
# accumulators save, what recompute groups save and cost, then `tile-mhc bench`, alone on the GPU,
# beside TileKernels where it is installed. BENCH_ARGS goes to it. TILE_KERNELS_2, a folder with
# release 2.1.0 unpacked, is for the parity of its plain functions and a bench beside it. Exits
# non-zero if anything failed.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: scripts/gpu.sh OUT [TILEKERNELS [TRANSFORMERENGINE]]" >&2; exit 2; }
mkdir -p "$1" || exit 1
OUT=$(cd "$1" && pwd)
TILEKERNELS=${2:+$(cd "$2" && pwd)} || exit 1
TRANSFORMERENGINE=${3:+$(cd "$3" && pwd)} || exit 1
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT" || exit 1

cold=$(mktemp -d)
trap 'rm -rf "$cold"' EXIT
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider -c "$ROOT/pyproject.toml" --rootdir "$ROOT")

# Two halves of tests/gpu, as the host, not the GPU, is what they wait for.
half() { find "$ROOT/tests/gpu" -name 'test_*.py' | sort | awk -v half="$1" 'NR % 2 == half'; }
declare -A jobs
start() { local name=$1; shift; "$@" >"$OUT/$name.log" 2>&1 & jobs[$name]=$!; }

mapfile -t first < <(half 0)
mapfile -t second < <(half 1)
start gpu1 "${pytest[@]}" "${first[@]}"
start gpu2 "${pytest[@]}" "${second[@]}"
TILE_MHC_PARITY_REPORT="$OUT/parity.md" start parity "${pytest[@]}" "$ROOT/tests/parity"
[ -z "$TILEKERNELS" ] ||
    start upstream "$PYTHON" scripts/run_tile_kernels_tests.py "$TILEKERNELS" -q
if [ -n "$TRANSFORMERENGINE" ]; then
    te=("$PYTHON" scripts/run_transformer_engine_tests.py "$TRANSFORMERENGINE" -q)
    start te "${te[@]}"
    NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 start te_deterministic "${te[@]}"
fi
failed=()
for name in "${!jobs[@]}"; do wait "${jobs[$name]}" || failed+=("$name"); done

# Alone, one after the other: what compiling takes is the host's time.
TILELANG_CACHE_DIR="$cold" "$PYTHON" scripts/first_call.py --hidden 4096 >"$OUT/first_cold.log" 2>&1 ||
    failed+=(first_cold)
"$PYTHON" scripts/first_call.py --hidden 4096 >"$OUT/first_warm.log" 2>&1 || failed+=(first_warm)
"$PYTHON" scripts/accumulators.py --tokens 8192 --hidden 7168 >"$OUT/accumulators.log" 2>&1 ||
    failed+=(accumulators)
"$PYTHON" scripts/recompute_group.py --record "$OUT/recompute_group.json" \
    >"$OUT/recompute_group.log" || failed+=(recompute_group)
for log in "$OUT"/*.log; do say "$(basename "$log" .log): $(tail -n 1 "$log" | cut -c1-200)"; done
vs=()
# Found, not imported: its own __init__ does not import on tilelang 0.1.15.
"$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("tile_kernels"))' &&
    vs=(--vs tile_kernels)
# shellcheck disable=SC2086
"$PYTHON" -m tile_mhc.cli bench ${vs[@]+"${vs[@]}"} --record "$OUT/bench.jsonl" ${BENCH_ARGS:-} |
    tee "$OUT/bench.log" || failed+=(bench)
# shellcheck disable=SC2086
[ -z "${TILE_KERNELS_2:-}" ] ||
    PYTHONPATH="$TILE_KERNELS_2${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m tile_mhc.cli bench \
        expand split_mixes sinkhorn aggregate post head_mix partials_pre recompute \
        --vs tile_kernels --record "$OUT/bench2.jsonl" ${BENCH_ARGS:-} | tee "$OUT/bench2.log" ||
    failed+=(bench2)
[ ${#failed[@]} -eq 0 ] || die "failed: ${failed[*]}"
