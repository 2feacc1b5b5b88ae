#!/usr/bin/env bash
# torch 2.13.0: a view taken under torch.no_grad() says that it requires grad, and has no grad_fn.
#
# Behaviour: the documentation of no_grad says that the result of every computation has
# requires_grad=False there, except for functions that make a new tensor. A view (view_as, a slice) of a
# leaf that requires grad has requires_grad=True, grad_fn=None and is_leaf=True, as if it were a leaf of
# its own; detach() and clone() have False. What is then computed of the view, outside of no_grad,
# requires grad, too, and backward() runs; but its graph has no edge to the view: neither the view nor
# the leaf gets a gradient, without a word, and torch.autograd.grad says that the view is not used.
# Expected: requires_grad=False, as documented.
#
# Output seen (torch 2.13.0+cpu):
#   view_as: requires_grad=True grad_fn=None is_leaf=True
#   slice: requires_grad=True grad_fn=None is_leaf=True
#   detach: requires_grad=False grad_fn=None is_leaf=True
#   clone: requires_grad=False grad_fn=None is_leaf=True
#   view * 2: requires_grad=True, its edges: ((None, 0), (None, 0))
#   after its backward(): the view has a grad: False, the leaf has one: False
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

print("torch", torch.__version__)
leaf = torch.ones(3, requires_grad=True)
ways = {
    "view_as": lambda: leaf.view_as(leaf),
    "slice": lambda: leaf[:],
    "detach": lambda: leaf.detach(),
    "clone": lambda: leaf.clone(),
}
seen = {}
with torch.no_grad():
    for name, way in ways.items():
        made = way()
        seen[name] = made.requires_grad
        print(f"{name}: requires_grad={made.requires_grad} grad_fn={made.grad_fn} "
              f"is_leaf={made.is_leaf}")
    view = leaf.view_as(leaf)
doubled = view * 2
edges = doubled.grad_fn.next_functions
print(f"view * 2: requires_grad={doubled.requires_grad}, its edges: {edges}")
doubled.sum().backward()
flows = view.grad is not None, leaf.grad is not None
print(f"after its backward(): the view has a grad: {flows[0]}, the leaf has one: {flows[1]}")
expected = {"view_as": True, "slice": True, "detach": False, "clone": False}
if (seen, flows) != (expected, (False, False)):
    print("the behaviour has changed", file=sys.stderr)
    sys.exit(1)
PY
