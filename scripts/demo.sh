#!/usr/bin/env bash
# The main job: DeepSeek-V4 on tile_mhc. Sets up .venv on the first run; arguments are passed on.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" "$ROOT/scripts/deepseek_v4.py" "$@"
