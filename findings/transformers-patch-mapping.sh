#!/usr/bin/env bash
# transformers: two effects of register_patch_mapping that reach beyond the class it names.
#
# Behaviour: (1) up to 5.20, once any class is registered, from_config and from_pretrained of every model
# import all image processors through aliases in sys.modules, and raise where torchvision is not
# installed, also for a model of text; 5.21.0 builds it. (2) A registered decoder layer, a subclass of the
# original, goes into the model class's list of what is recorded and stays there: after
# unregister_patch_mapping, and without it, a new model returns none of its layers' hidden states.
# Expected: a text model is built without torchvision; what was unregistered leaves no trace in models
# that are built later.
#
# Output seen (torch 2.13.0+cpu, no torchvision):
#   transformers 5.20.2: from_config: ModuleNotFoundError: No module named 'torchvision'
#   transformers 5.21.0: from_config: MyLayer
#   transformers 5.21.0: hidden states of a model built after unregistering: 1, before registering: 3
#   transformers 5.24.0: from_config: MyLayer
#   transformers 5.24.0: hidden states of a model built after unregistering: 0, before registering: 3
#
# Needs python3 with venv and pip's package index; no GPU, no download of a model: the weights are
# random. Exits 0 while this is so, 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export OMP_NUM_THREADS=1 HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
python3 -m venv venv

cat >finding.py <<'PY'
import sys

import torch
import transformers
from transformers.models.llama import modeling_llama
from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

SEEN = {
    "5.20.2": ("ModuleNotFoundError: No module named 'torchvision'",),
    "5.21.0": ("MyLayer", 1, 3),
    "5.24.0": ("MyLayer", 0, 3),
}
CONFIG = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


class MyLayer(modeling_llama.LlamaDecoderLayer):
    pass


def build():
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**CONFIG))


def hidden_states(model):
    states = model(torch.arange(8)[None], output_hidden_states=True).hidden_states
    return 0 if states is None else len(states)


version = transformers.__version__
before = hidden_states(build())
register_patch_mapping({"LlamaDecoderLayer": MyLayer})
try:
    seen = (type(build().model.layers[0]).__name__,)
except ModuleNotFoundError as error:
    seen = (f"ModuleNotFoundError: {error}",)
print(f"transformers {version}: from_config: {seen[0]}")
unregister_patch_mapping(["LlamaDecoderLayer"])
if seen == ("MyLayer",):
    seen += (hidden_states(build()), before)
    print(
        f"transformers {version}: hidden states of a model built after unregistering: {seen[1]}, "
        f"before registering: {seen[2]}"
    )
sys.exit(0 if seen == SEEN[version] else "the behaviour has changed")
PY
for version in 5.20.2 5.21.0 5.24.0; do
    venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 "transformers==$version"
    venv/bin/python finding.py
done
