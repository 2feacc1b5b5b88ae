# Sourced by the other scripts. Sets PYTHON to an interpreter that has tile_mhc from this checkout
# and everything it needs, installing what is missing into .venv.
#
#   TILE_MHC_TORCH   the torch requirement to install (default: see below). A machine without a GPU
#                    wants a CPU build; point pip's own settings at where you get yours from. The
#                    default is one version, as a range takes the newest, with gigabytes of CUDA.
#   TILE_MHC_PYTHON  an interpreter to use as it is, with whatever it has: nothing is installed.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# Whether interpreter $1 can import the modules $2...
imports() { "$1" -c 'import sys, importlib; [importlib.import_module(m) for m in sys.argv[1:]]' \
    "${@:2}" >/dev/null 2>&1; }

is_supported() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if is_supported "$candidate"; then command -v "$candidate"; return; fi
    done
    die "Python 3.10 or later is needed (with its venv module); found $(python3 --version 2>&1)"
}

# A folder that shows this checkout as an installed package: kernels/mhc inside tile_mhc.
link_package() {
    local site=$1 entry
    rm -rf "$site" && mkdir -p "$site/tile_mhc"
    for entry in "$ROOT"/tile_mhc/*; do
        [ "$(basename "$entry")" = __pycache__ ] || ln -s "$entry" "$site/tile_mhc/"
    done
    ln -s "$ROOT/kernels/mhc" "$site/tile_mhc/kernels"
}

# Everything needed is importable: install nothing, touch nothing outside build/.
use_present() {
    PYTHON=$(command -v "${TILE_MHC_PYTHON:-python3}")
    link_package "$ROOT/build/site"
    export PYTHONPATH="$ROOT/build/site${PYTHONPATH:+:$PYTHONPATH}"
    say "using $PYTHON as it is"
}

use_venv() {
    local base stamp wanted options=()
    base=$(find_python) || exit 1
    PYTHON="$ROOT/.venv/bin/python"
    # As many images of containers set it: then every process would compile all of torch that it
    # imports, which is two thirds of the time of that import.
    unset PYTHONDONTWRITEBYTECODE
    wanted="$("$base" --version) ${TILE_MHC_TORCH:-} $(cksum <"$ROOT/pyproject.toml") $ROOT"
    stamp="$ROOT/.venv/tile_mhc.stamp"
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        say "using $ROOT/.venv"
        return
    fi
    # A torch that was installed for this machine's GPU is worth keeping.
    if has_gpu && imports "$base" torch; then options=(--system-site-packages); fi
    say "creating $ROOT/.venv with $("$base" --version)"
    # Without --no-compile pip compiles all of torch; Python does that for what is imported, once.
    "$base" -m venv --clear ${options[@]+"${options[@]}"} "$ROOT/.venv" || return 1
    if ! imports "$PYTHON" torch; then
        local torch="torch==2.13.0"
        if has_gpu; then torch="torch>=2.10"; fi
        "$PYTHON" -m pip install -q --no-compile "${TILE_MHC_TORCH:-$torch}" || return 1
    fi
    "$PYTHON" -m pip install -q --no-compile -e "$ROOT[test,transformers,dev]" || return 1
    printf '%s' "$wanted" >"$stamp"
}

NEEDED=(torch tilelang pytest)
WANTED=(transformers safetensors click rich hypothesis ruff mypy codespell_lib)
if [ -n "${TILE_MHC_SET_UP:-}" ]; then
    # By the script that runs the one that sources this.
    PYTHON=$TILE_MHC_SET_UP
elif [ -n "${TILE_MHC_PYTHON:-}" ]; then
    use_present
elif is_supported python3 && imports python3 "${NEEDED[@]}" "${WANTED[@]}"; then
    use_present
elif ! use_venv; then
    # A machine without a package index may still have enough.
    imports python3 "${NEEDED[@]}" || die "installation failed, and python3 lacks one of ${NEEDED[*]}"
    rm -rf "$ROOT/.venv"
    use_present
    for module in "${WANTED[@]}"; do
        imports python3 "$module" || say "absent, what needs it is skipped: $module"
    done
fi
