#!/usr/bin/env bash
# torch 2.13.0: an operator registered with torch.library has a forward-mode derivative of zero.
#
# Behaviour: torch.library.custom_op with register_autograd gives an operator a backward. In forward
# mode, where it has no formula, nothing is raised: torch.func.jvp returns a tangent of zeros, and
# torch.autograd.forward_ad a tangent of None, which stands for zero. So torch.func.jacfwd and hessian
# are zero, too. The same formula as a torch.autograd.Function raises in both cases. Reverse mode by
# torch.func, where there is a formula, is the other way round: torch.func.grad raises "it must
# override the setup_context staticmethod" about an autograd.Function that the user never wrote.
# Expected: forward mode raises, as for an autograd.Function; torch.func.grad uses the formula, or its
# error names the operator.
#
# Output seen (torch 2.13.0+cpu; the operator is x -> 3 x, at x = 1, with tangent 1):
#   torch.func.jvp, operator: tangent 0.0
#   torch.func.jvp, autograd.Function: RuntimeError: In order to use an autograd.Function with functorch ...
#   forward_ad, operator: tangent None
#   forward_ad, autograd.Function: NotImplementedError: You must implement the jvp function for custom ...
#   torch.func.jacfwd, operator: 0.0
#   torch.func.grad, operator: RuntimeError: In order to use an autograd.Function with functorch ...
#   backward(), operator: gradient 3.0
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
import torch.autograd.forward_ad as forward_ad


@torch.library.custom_op("finding::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3


triple.register_autograd(lambda ctx, grad: grad * 3)


class Triple(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def jvp(function):
    one = torch.ones(())
    return f"tangent {torch.func.jvp(function, (one,), (one,))[1].item()}"


def dual(function):
    one = torch.ones(())
    with forward_ad.dual_level():
        return f"tangent {forward_ad.unpack_dual(function(forward_ad.make_dual(one, one))).tangent}"


def jacfwd(function):
    return str(torch.func.jacfwd(function)(torch.ones(())).item())


def grad(function):
    return f"gradient {torch.func.grad(function)(torch.ones(())).item()}"


def backward(function):
    one = torch.ones((), requires_grad=True)
    function(one).backward()
    return f"gradient {one.grad.item()}"


FUNCTORCH = "RuntimeError: In order to use an autograd.Function with functorch"
SEEN = [
    ("torch.func.jvp, operator", jvp, triple, "tangent 0.0"),
    ("torch.func.jvp, autograd.Function", jvp, Triple.apply, FUNCTORCH),
    ("forward_ad, operator", dual, triple, "tangent None"),
    ("forward_ad, autograd.Function", dual, Triple.apply, "NotImplementedError: You must implement"),
    ("torch.func.jacfwd, operator", jacfwd, triple, "0.0"),
    ("torch.func.grad, operator", grad, triple, FUNCTORCH),
    ("backward(), operator", backward, triple, "gradient 3.0"),
]
print("torch", torch.__version__)
changed = False
for name, way, function, seen in SEEN:
    try:
        got = way(function)
    except (RuntimeError, NotImplementedError) as error:
        got = f"{type(error).__name__}: {error}"
    print(f"{name}: {got}")
    changed |= not got.startswith(seen)
sys.exit("the behaviour has changed" if changed else 0)
PY
venv/bin/python finding.py
