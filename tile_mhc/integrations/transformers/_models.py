"""The models of transformers that are served."""

from typing import Any

from tile_mhc.integrations.transformers._deepseek_v4 import DEEPSEEK_V4
from tile_mhc.integrations.transformers._family import Family
from tile_mhc.integrations.transformers._glm5_next import GLM5_NEXT
from tile_mhc.integrations.transformers._hy_v4 import HY_V4, HY_V4_VL

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (DEEPSEEK_V4, GLM5_NEXT, HY_V4, HY_V4_VL)
}


def run(model_type: str, forward: str, self: Any, *args: Any, **kwargs: Any) -> Any:
    """What a stand-in calls."""
    family = FAMILIES[model_type]
    return family.forwards[forward].run(family, self, *args, **kwargs)
