#!/usr/bin/env bash
# TileLang 0.1.15 takes TILELANG_CACHE_DIR to the letter: an empty value stops the import, and "~"
# is a folder of that name.
#
# Behaviour: with TILELANG_CACHE_DIR="", `import tilelang` raises FileNotFoundError from os.makedirs,
# whose message names neither the variable nor TileLang. With TILELANG_CACHE_DIR="~/kernels", the
# import makes a folder called "~" in the working directory, and every working directory gets a cache
# of its own. (A shell expands an unquoted ~ itself; a Dockerfile's ENV, a systemd unit, a .env file
# and a job's configuration do not.) The default is expanded by TileLang: ~/.tilelang/cache.
# Expected: empty means unset, as for most such variables, and ~ is the home folder.
#
# Output seen (torch 2.13.0+cpu, tilelang 0.1.15):
#   TILELANG_CACHE_DIR="": FileNotFoundError: [Errno 2] No such file or directory: ''
#   TILELANG_CACHE_DIR="~/kernels": imported; the working directory now has: ~
#
# Needs python3 with venv and pip's package index; no GPU. Exits 0 while this is so, 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 tilelang==0.1.15
TILELANG_CACHE_DIR="$folder/cache" venv/bin/python -c '
import tilelang, torch; print("torch", torch.__version__, "tilelang", tilelang.__version__)'

# An empty home folder, so that a cache made there would be seen.
mkdir home work
cd work
empty=$(HOME="$folder/home" TILELANG_CACHE_DIR="" ../venv/bin/python -c 'import tilelang' 2>&1 | tail -n 1) || true
printf 'TILELANG_CACHE_DIR="": %s\n' "$empty"
# shellcheck disable=SC2088
HOME="$folder/home" TILELANG_CACHE_DIR="~/kernels" ../venv/bin/python -c 'import tilelang' >/dev/null
printf 'TILELANG_CACHE_DIR="~/kernels": imported; the working directory now has: %s\n' "$(ls -A)"

if [ "$empty" = "FileNotFoundError: [Errno 2] No such file or directory: ''" ] &&
    [ -d './~/kernels' ] && [ ! -e "$folder/home/kernels" ]; then
    exit 0
fi
echo "the behaviour has changed" >&2
exit 1
