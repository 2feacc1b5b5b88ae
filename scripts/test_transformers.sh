#!/usr/bin/env bash
# The tests of the integration with other releases of transformers than the environment's: by default
# the oldest and the newest that are supported.
#
#   scripts/test_transformers.sh             5.17.0 and 5.24.0, but for the one that is installed
#   scripts/test_transformers.sh 5.20.2      another
#   PYTEST_ARGS="-k fsdp" scripts/test_transformers.sh
#
# All files of the integration's tests; in scripts/check.sh without --all only those of its models.
# Each is installed once, alone, into build/transformers-VERSION: what it needs is the environment's,
# which both ends agree with. accelerate and peft come along, for the tests that use them. With a
# GPU, what only it shows runs too. A folder that is there already needs no package index.
set -uo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

SUPPORTED=(5.17.0 5.24.0)

installed() { "$PYTHON" -c 'import importlib.metadata as m; print(m.version("transformers"))' 2>/dev/null; }

# pip writes to a folder of its own first: one that was interrupted is not taken for a whole one.
install() {
    local folder=$1 version=$2
    [ -d "$folder" ] && return 0
    rm -rf "$folder.part"
    "$PYTHON" -m pip install -q --no-compile --no-deps --target "$folder.part" \
        "transformers==$version" accelerate peft psutil && mv "$folder.part" "$folder"
}

run() {
    local version=$1 folder="$ROOT/build/transformers-$1" files=()
    if [ "${TILE_MHC_CHECKS:-all}" = all ]; then
        files=("$ROOT"/tests/cpu/test_integration_*.py)
    else
        files=("$ROOT"/tests/cpu/test_integration_{glm,hy,mapping,models,stack,transformers}.py)
    fi
    say "transformers $version"
    install "$folder" "$version" || return 1
    mkdir -p "$ROOT/build/cwd"
    # shellcheck disable=SC2086
    (cd "$ROOT/build/cwd" && export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" &&
        if [ "$(installed)" != "$version" ]; then die "$folder does not come first"; fi &&
        "$PYTHON" -m pytest -q -c "$ROOT/pyproject.toml" --rootdir "$ROOT" ${PYTEST_ARGS:-} \
            "${files[@]}" "$ROOT"/tests/gpu/test_integration_*.py)
}

present=$(installed)
failed=()
if [ $# -eq 0 ]; then
    for version in "${SUPPORTED[@]}"; do
        [ "$version" = "$present" ] || set -- "$@" "$version"
    done
fi
for version in "$@"; do
    run "$version" || failed+=("$version")
done
[ ${#failed[@]} -eq 0 ] || die "failed with transformers ${failed[*]}"
