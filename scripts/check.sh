#!/usr/bin/env bash
# Everything CI checks: lint, types, ahead-of-time compilation, tests.
#
#   scripts/check.sh                       all of it
#   scripts/check.sh lint types            some of it: lint, types, kernels, tests
#   PYTEST_ARGS="-k sinkhorn" scripts/check.sh tests
#
# Needs no GPU; with one, the tests that use it run too. Sets up .venv on the first run.
set -uo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

failed=()
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

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
        "$PYTHON" -m codespell_lib tile_mhc kernels tests scripts ./*.md ./*.toml || ok=1
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
    (cd "$scratch/neutral" && MYPYPATH="$scratch/site" "$PYTHON" -m mypy \
        --config-file "$ROOT/pyproject.toml" --cache-dir "$ROOT/build/mypy" -p tile_mhc)
}

# Every kernel of the table, for both generations: spills are errors on Hopper, and so is a jump in
# registers, shared memory or spills beside scripts/resources.json. RENEW_RESOURCES=1 writes that table
# instead.
kernels() {
    say "kernels"
    present click && present rich || return 0
    if ! (cd "$scratch" && "$PYTHON" -c 'import sys; from tile_mhc import jit; \
jit.import_tilelang(); sys.exit(jit.find_nvcc() is None)'); then
        say "skipped: no nvcc"
        return 0
    fi
    local compile=(-m tile_mhc.cli compile --hidden 4096 --streams 4 --arch)
    (cd "$scratch" && "$PYTHON" "${compile[@]}" sm_90a --fail-on-spills &&
        "$PYTHON" "${compile[@]}" sm_90a,sm_100a --json >compiled.json &&
        "$PYTHON" "$ROOT/scripts/resources.py" compiled.json ${RENEW_RESOURCES:+--renew})
}

# From a neutral folder, so that the installed tile_mhc is found, not the one in the checkout.
tests() {
    say "tests"
    imports "$PYTHON" torch && "$PYTHON" -c 'import sys, torch; sys.exit(torch.cuda.is_available())' &&
        say "no GPU: tests/gpu and most of tests/parity are skipped"
    mkdir -p "$ROOT/build/cwd"
    # shellcheck disable=SC2086
    (cd "$ROOT/build/cwd" && "$PYTHON" -m pytest -c "$ROOT/pyproject.toml" --rootdir "$ROOT" \
        ${PYTEST_ARGS:-} "$ROOT/tests")
}

[ $# -gt 0 ] || set -- lint types kernels tests
for step in "$@"; do
    case $step in
        lint | types | kernels | tests) "$step" || failed+=("$step") ;;
        *) die "unknown step $step; there are: lint types kernels tests" ;;
    esac
done
# Said on stderr, so that the last line on stdout is pytest's.
[ ${#failed[@]} -eq 0 ] || die "failed: ${failed[*]}"
