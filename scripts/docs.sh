#!/usr/bin/env bash
# The documentation: docs/ and the docstrings, as pages in build/docs. A warning is an error, and so is
# a reference that leads nowhere. Half a minute, and no GPU.
#
#   scripts/docs.sh && open build/docs/index.html
#
# Uses the environment of scripts/check.sh, and adds the extra `docs` to .venv where it is missing.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if ! imports "$PYTHON" sphinx myst_parser furo; then
    [ "$PYTHON" = "$ROOT/.venv/bin/python" ] ||
        die "$PYTHON lacks the extra docs of pyproject.toml: sphinx, myst-parser, furo"
    "$PYTHON" -m pip install -q --no-compile -e "$ROOT[docs]"
fi
cd "$ROOT"
rm -rf build/docs
"$PYTHON" -m sphinx --fail-on-warning --nitpicky --keep-going --quiet --fresh-env \
    --builder html --doctree-dir build/doctrees docs build/docs
say "docs: build/docs/index.html"
