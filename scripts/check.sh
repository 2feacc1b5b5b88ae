#!/usr/bin/env bash
# Everything CI checks: lint, types, ahead-of-time compilation, tests.
#
#   scripts/check.sh                       all of it, in parallel
#   scripts/check.sh --all                 and what takes long, which CI runs on a schedule: tests that
#                                          are marked `scheduled`, kernels for other GPUs than Hopper
#   scripts/check.sh lint types            some of it: lint, types, docs, kernels, transformers, tests
#   ARCHES=sm_80 scripts/check.sh kernels  every kernel, for these architectures
#   PYTEST_ARGS="-k sinkhorn" scripts/check.sh tests
#   PYTEST_ARGS="-n0 --pdb" scripts/check.sh tests
#
# Needs no GPU; with one, the tests that use it run too. Sets up .venv on the first run. Of several
# steps each shows what it printed when it has ended; until then it is in build/check/STEP.log.
set -uo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

environment=$SECONDS
# TileLang's prover frees and takes megabytes at each step: without these the kernel has them zeroed
# anew, which was up to half of the CPU time of a lowering.
export MALLOC_TRIM_THRESHOLD_=$((256 << 20)) MALLOC_MMAP_THRESHOLD_=$((32 << 20))
failed=()
scratch=$(mktemp -d)
logs="$ROOT/build/check"
declare -A jobs=()

# Of every job that is left its whole group: a step is a shell with children.
leave() {
    local job
    for job in "${jobs[@]}"; do kill -- "-$job" 2>/dev/null; done
    rm -rf "$scratch"
}
trap leave EXIT
trap 'exit 130' INT TERM

cores() { "$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)))'; }

# A tool that is absent is an error in our own environment, and only noted in someone else's.
present() {
    imports "$PYTHON" "$1" && return 0
    [ "$PYTHON" != "$ROOT/.venv/bin/python" ] || die "$1 is missing from .venv; remove it, run again"
    say "skipped: $1 is not installed"
    return 1
}

lint() {
    say "lint"
    cd "$ROOT" || return 1
    local ok=0
    if present ruff; then
        "$PYTHON" -m ruff check . || ok=1
        "$PYTHON" -m ruff format --check . || ok=1
    fi
    if present codespell_lib; then
        "$PYTHON" -m codespell_lib tile_mhc kernels tests scripts docs findings ./*.md ./*.toml || ok=1
    fi
    return $ok
}

# Types are checked on the built wheel, from a neutral folder: in the checkout mypy cannot follow
# the mapping of kernels/mhc to tile_mhc.kernels.
types() {
    say "types"
    present mypy && present setuptools || return 0
    cp -r "$ROOT/tile_mhc" "$ROOT/kernels" "$ROOT"/{pyproject.toml,LICENSE} "$scratch" || return 1
    cp "$ROOT/README.md" "$scratch" 2>/dev/null
    (cd "$scratch" && "$PYTHON" -c \
        'from setuptools import build_meta; build_meta.build_wheel("dist")' >wheel.log 2>&1) ||
        { cat "$scratch/wheel.log"; return 1; }
    "$PYTHON" -m zipfile -e "$scratch"/dist/*.whl "$scratch/site" || return 1
    mkdir -p "$scratch/neutral"
    # With a test that calls it, as a user's type checker sees it.
    (cd "$scratch/neutral" && MYPYPATH="$scratch/site" "$PYTHON" -m mypy \
        --config-file "$ROOT/pyproject.toml" --cache-dir "$ROOT/build/mypy" \
        "$scratch/site/tile_mhc" "$ROOT/tests/cpu/test_types.py")
}

# For Hopper one kernel of each name, and some for other architectures; with --all every one for all of
# them. Spills are errors on Hopper, and so is a jump in registers, shared memory or spills beside
# scripts/resources.json, or more shared memory than a CTA has. ARCHES names architectures whose
# kernels are to be compiled in full, and OPS of which ops, such as post,expand.
# RENEW_RESOURCES=1 writes the table's rows instead, of all its architectures unless ARCHES says others.
kernels() {
    say "kernels"
    present click && present rich || return 0
    if ! (cd "$scratch" && "$PYTHON" -c 'import sys; from tile_mhc import jit; \
jit.import_tilelang(); sys.exit(jit.find_nvcc() is None)'); then
        say "skipped: no nvcc"
        return 0
    fi
    if [ "$TILE_MHC_CHECKS" != all ] && [ -z "${ARCHES:-}${OPS:-}${RENEW_RESOURCES:-}" ]; then
        (cd "$scratch" && "$PYTHON" "$ROOT/scripts/sample_kernels.py")
        return
    fi
    local arches=sm_90a
    if [ -n "${ARCHES:-}" ]; then
        arches=$ARCHES
    elif [ -n "${RENEW_RESOURCES:-}" ]; then
        arches=sm_80,sm_86,sm_89,sm_90a,sm_100a,sm_120a
    elif [ "$TILE_MHC_CHECKS" = all ]; then
        arches=$(cd "$scratch" && "$PYTHON" -c 'from tile_mhc import specs; \
print(",".join(specs.ARCHS))') || return 1
    fi
    # Without the host's part. All spills are in what it prints; those on Hopper fail in resources.py.
    cd "$scratch" &&
        "$PYTHON" -m tile_mhc.cli compile --hidden 4096 --streams 4 --arch "$arches" \
            ${OPS:+--ops "$OPS"} --measure --json >compiled.json &&
        "$PYTHON" "$ROOT/scripts/resources.py" compiled.json ${RENEW_RESOURCES:+--renew} ${OPS:+--some}
}

# The documentation, strictly.
docs() {
    say "docs"
    TILE_MHC_SET_UP="$PYTHON" "$ROOT/scripts/docs.sh"
}

# The integration's tests with another transformers than the environment's.
transformers() {
    say "transformers"
    # Of one core, as the workers of the tests beside it: threads that wait for a core would spin.
    env -u PYTEST_ARGS OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TILE_MHC_SET_UP="$PYTHON" \
        "$ROOT/scripts/test_transformers.sh"
}

# From a neutral folder, so that the installed tile_mhc is found, not the one in the checkout.
tests() {
    say "tests"
    "$PYTHON" -c 'import sys, torch; sys.exit(torch.cuda.is_available())' 2>/dev/null &&
        say "no GPU: tests/gpu and most of tests/parity are skipped"
    local workers options=(--durations=20 --durations-min=2)
    workers=$(cores)
    if [ "$workers" -gt 1 ] && imports "$PYTHON" xdist; then
        [ "$workers" -le 8 ] || workers=8
        options+=(-n "$workers")
        # Of one core each.
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    fi
    mkdir -p "$ROOT/build/cwd"
    # shellcheck disable=SC2086
    (cd "$ROOT/build/cwd" && "$PYTHON" -m pytest -c "$ROOT/pyproject.toml" --rootdir "$ROOT" \
        "${options[@]}" ${PYTEST_ARGS:-} "$ROOT/tests")
}

# Runs step $1 and writes down how long it took, and how much of the CPU it and its children.
measured() {
    local start=$SECONDS status=0
    "$1" || status=$?
    times >"$scratch/$1.times"
    printf '%s: %d s, and of the CPU (user, system) %s\n' "$1" $((SECONDS - start)) \
        "$(tail -n 1 "$scratch/$1.times")" >"$scratch/$1.took"
    return $status
}

# All at once. The compilations fill what the others leave of the CPU, as nothing waits for them.
start_steps() {
    local step
    mkdir -p "$logs"
    say "in parallel: $*; for what they print until they end, see ${logs#"$ROOT"/}"
    # Each in a process group of its own.
    set -m
    for step in "$@"; do
        if [ "$step" = kernels ]; then
            (renice -n 10 "$BASHPID" >/dev/null; measured "$step") >"$logs/$step.log" 2>&1 </dev/null &
        else
            measured "$step" >"$logs/$step.log" 2>&1 </dev/null &
        fi
        jobs[$step]=$!
    done
    set +m
}

# Waits for step $1.
end_step() {
    wait "${jobs[$1]}" || failed+=("$1")
    unset "jobs[$1]"
}

in_parallel() {
    local step
    start_steps "$@"
    for step in "$@"; do
        [ "$step" != tests ] || continue
        end_step "$step"
        cat "$logs/$step.log"
        say "$(cat "$scratch/$step.took")"
    done
    # Theirs comes last, with pytest's last line at its end.
    if [ -n "${jobs[tests]:-}" ]; then end_step tests; fi
    say "where the time went, in $SECONDS s"
    printf 'environment: %s s\n' "$environment"
    for step in "$@"; do cat "$scratch/$step.took"; done
    if [[ " $* " == *" tests "* ]]; then cat "$logs/tests.log"; fi
}

export TILE_MHC_CHECKS=${TILE_MHC_CHECKS:-usual}
if [ "${1:-}" = --all ]; then
    TILE_MHC_CHECKS=all
    shift
fi
STEPS=(lint types docs transformers kernels tests)
[ $# -gt 0 ] || set -- "${STEPS[@]}"
for step in "$@"; do
    [[ " ${STEPS[*]} " == *" $step "* ]] || die "unknown step $step; there are: ${STEPS[*]}"
done
if [ $# -eq 1 ]; then
    "$1" || failed+=("$1")
else
    in_parallel "$@"
fi
# Said on stderr, so that the last line on stdout is pytest's.
[ ${#failed[@]} -eq 0 ] || die "failed: ${failed[*]}"
