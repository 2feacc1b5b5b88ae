#!/usr/bin/env bash
# The documentation: docs/ and the docstrings, as pages in build/docs. A warning is an error, and so is
# a reference that leads nowhere. Half a minute, and no GPU.
#
#   scripts/docs.sh && open build/docs/index.html
#
# Uses the environment of scripts/check.sh.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

imports "$PYTHON" sphinx myst_parser furo ||
    die "$PYTHON lacks the extra docs of pyproject.toml: sphinx, myst-parser, furo"
cd "$ROOT"
rm -rf build/docs
"$PYTHON" -m sphinx --fail-on-warning --nitpicky --keep-going --quiet --fresh-env \
    --builder html --doctree-dir build/doctrees docs build/docs
say "docs: build/docs/index.html"
