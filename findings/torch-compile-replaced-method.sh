#!/usr/bin/env bash
# torch 2.13.0: torch.compile does not notice that a method was replaced on its class.
#
# Behaviour: a library patches a model by assigning another `forward` to the class of a layer. Eager
# calls use it at once. A model that torch.compile has compiled before goes on with the old one,
# without a message and without recompiling. The same holds where the function stays and only its
# __code__ is replaced. It does notice a `forward` assigned to an instance, and another function under a
# global name. So one and the same model gives two results, by whether it ran before the patch.
# Expected: a recompilation, as for the other two ways.
# Way round: torch.compiler.reset() after patching.
#
# Output seen (torch 2.13.0+cpu; x + 1 is compiled at x = 0 and then replaced by x + 10):
#   method on the class of a layer: eager 10.0, compiled 1.0
#   method on an instance: eager 10.0, compiled 10.0
#   function under a global name: eager 10.0, compiled 10.0
#   method on the class, after torch.compiler.reset(): eager 10.0, compiled 10.0
#   __code__ of the method: eager 10.0, compiled 1.0
#
# Needs python3 with venv and pip's package index; no GPU. Exits 0 while this is so, 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export OMP_NUM_THREADS=1
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0

cat >finding.py <<'PY'
import sys

import torch


def add_one(x):
    return x + 1


def make_model():
    """A model with one layer, of a class of its own, that adds one."""

    def forward(self, x):
        return x + 1

    layer = type("Layer", (torch.nn.Module,), {"forward": forward})
    return torch.nn.Sequential(layer())


def add_ten(self, x):
    return x + 10


def on_class(model):
    type(model[0]).forward = add_ten


def on_instance(model):
    model[0].forward = add_ten.__get__(model[0])


def on_class_then_reset(model):
    on_class(model)
    torch.compiler.reset()


def in_code(model):
    type(model[0]).forward.__code__ = add_ten.__code__


def eager_and_compiled(model, replace):
    compiled = torch.compile(model, backend="eager")
    assert compiled(torch.zeros(())).item() == 1
    replace(model)
    return model(torch.zeros(())).item(), compiled(torch.zeros(())).item()


def under_a_global_name(_):
    global add_one
    add_one = lambda x: x + 10  # noqa: E731


SEEN = [
    ("method on the class of a layer", make_model(), on_class, (10, 1)),
    ("method on an instance", make_model(), on_instance, (10, 10)),
    ("function under a global name", lambda x: add_one(x), under_a_global_name, (10, 10)),
    ("method on the class, after torch.compiler.reset()", make_model(), on_class_then_reset, (10, 10)),
    ("__code__ of the method", make_model(), in_code, (10, 1)),
]
print("torch", torch.__version__)
changed = False
for name, model, replace, seen in SEEN:
    got = eager_and_compiled(model, replace)
    print(f"{name}: eager {got[0]}, compiled {got[1]}")
    changed |= got != seen
sys.exit("the behaviour has changed" if changed else 0)
PY
venv/bin/python finding.py
