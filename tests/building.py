"""The served models of transformers, small, and as `from_config` builds them by a mapping."""

import copy
import functools
import sys

import tiny_deepseek
import tiny_glm
import tiny_hy
from tile_mhc.integrations import transformers as integration

# By their type, which the installed transformers may lack.
MAKERS = {
    "deepseek_v4": tiny_deepseek.make_model,
    "glm5_next": tiny_glm.make_model,
    **{kind: functools.partial(tiny_hy.make_model, kind) for kind in tiny_hy.KINDS},
}


def register(monkeypatch, kind):
    """Put the mapping of one model in force for what is built.

    Before 5.21 transformers looks into its aliases for it, which import what is not installed here.
    """
    from transformers import monkey_patching

    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and str(module.__doc__).startswith("Alias module"):
            try:
                dir(module)
            except (ImportError, NameError):
                monkeypatch.delitem(sys.modules, name)
    monkey_patching.register_patch_mapping(integration.patch_mapping(models=[kind]))


def build(model):
    """One with the parameters of another, in its dtypes and where it is."""
    built = type(model)._from_config(copy.deepcopy(model.config)).to(model.device)
    built.load_state_dict(model.state_dict())
    for own, parameter in zip(model.parameters(), built.parameters(), strict=True):
        parameter.data = parameter.data.to(own.dtype)
    return built.train(model.training)


def ours_of(model):
    """The names of the classes of the mapping that a model is made of."""
    kinds = {type(module) for module in model.modules()}
    return {kind.__name__ for kind in kinds if getattr(kind, "built_by_tile_mhc", False)}
