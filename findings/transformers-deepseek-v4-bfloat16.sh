#!/usr/bin/env bash
# transformers 5.17.0 to 5.19.0 load DeepSeek-V4 with dtype=torch.bfloat16 into a model that cannot run.
#
# Behaviour: from_pretrained(..., dtype=torch.bfloat16) keeps norm weights and hyper-connections in
# float32 and makes the other weights bfloat16. DeepseekV4RMSNorm multiplies its bfloat16 result by
# the float32 weight, and so returns float32; the bfloat16 linear layer behind it raises. 5.20.0 returns
# the dtype of its input and runs.
# Expected: what from_pretrained returns runs, in the dtype that was asked for.
#
# Output seen (torch 2.13.0+cpu):
#   transformers 5.19.0: norm of bfloat16 by a float32 weight: torch.float32
#   transformers 5.19.0: logits: RuntimeError: expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16
#   transformers 5.20.0: norm of bfloat16 by a float32 weight: torch.bfloat16
#   transformers 5.20.0: logits: torch.bfloat16
#
# Needs python3 with venv and pip's package index; no GPU, no download of a model: the weights are
# random. Exits 0 while this is so, 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export OMP_NUM_THREADS=1 HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 \
    TRANSFORMERS_VERBOSITY=error
python3 -m venv venv

cat >finding.py <<'PY'
import sys

import torch
import transformers
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

SEEN = {
    "5.19.0": ("torch.float32", "RuntimeError: expected m1 and m2 to have the same dtype"),
    "5.20.0": ("torch.bfloat16", "torch.bfloat16"),
}
CONFIG = {
    "vocab_size": 32,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "compressed_sparse_attention"],
    "mlp_layer_types": ["hash_moe", "hash_moe"],
    "sliding_window": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}


def norm_dtype():
    return str(modeling.DeepseekV4RMSNorm(8)(torch.ones(2, 8, dtype=torch.bfloat16)).dtype)


def logits_dtype():
    torch.manual_seed(0)
    saved = transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**CONFIG))
    saved.save_pretrained("checkpoint")
    model = transformers.DeepseekV4ForCausalLM.from_pretrained("checkpoint", dtype=torch.bfloat16)
    try:
        with torch.no_grad():
            return str(model(torch.arange(24)[None], use_cache=False).logits.dtype)
    except RuntimeError as error:
        return f"RuntimeError: {error}"


version = transformers.__version__
norm, logits = norm_dtype(), logits_dtype()
print(f"transformers {version}: norm of bfloat16 by a float32 weight: {norm}")
print(f"transformers {version}: logits: {logits}")
same = norm == SEEN[version][0] and logits.startswith(SEEN[version][1])
sys.exit(0 if same else "the behaviour has changed")
PY
venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.19.0
venv/bin/python -c 'import torch; print("torch", torch.__version__)'
venv/bin/python finding.py
rm -rf checkpoint
venv/bin/python -m pip install -q --disable-pip-version-check transformers==5.20.0
venv/bin/python finding.py
