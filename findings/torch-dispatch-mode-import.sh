#!/usr/bin/env bash
# torch 2.13.0: the first operator under any TorchDispatchMode imports torch._dynamo.
#
# Behaviour: a mode that only passes on what it sees imports a thousand modules and more at the first
# operator that runs in it, torch._dynamo and sympy among them, which takes seconds: torch wraps a
# subclass's __torch_dispatch__ in the decorator that keeps torch.compile out, and that decorator
# imports the compiler when it is first called. Nothing is compiled. A TorchFunctionMode that does the
# same imports none of it. Who measures the time of a first call, or keeps imports small, meets it.
# Expected: the compiler is kept out without being imported, as nobody could be compiling.
#
# Output seen (torch 2.13.0+cpu; the time is the machine's):
#   function mode: torch._dynamo imported: False
#   dispatch mode, entered: torch._dynamo imported: False
#   dispatch mode, after one operator: torch._dynamo imported: True, more than 500 modules: True
#
# Needs python3 with venv and pip's package index; no GPU. Exits 0 while this is so, 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0
venv/bin/python -W ignore - <<'PY'
import sys

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

print("torch", torch.__version__)


class Function(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def imported():
    return "torch._dynamo" in sys.modules


value = torch.ones(3)
with Function():
    value + 1
seen = [imported()]
print(f"function mode: torch._dynamo imported: {seen[-1]}")
with Dispatch():
    seen.append(imported())
    print(f"dispatch mode, entered: torch._dynamo imported: {seen[-1]}")
    before = len(sys.modules)
    value + 1
    seen += [imported(), len(sys.modules) - before > 500]
print(f"dispatch mode, after one operator: torch._dynamo imported: {seen[2]}, "
      f"more than 500 modules: {seen[3]}")
if seen != [False, False, True, True]:
    print("the behaviour has changed", file=sys.stderr)
    sys.exit(1)
PY
