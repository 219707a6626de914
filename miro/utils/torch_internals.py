"""Private names of torch that miro uses; tests/miro/test_torch_internals.py checks them."""

from torch import _foreach_add_ as foreach_add_
from torch import _foreach_lerp as foreach_lerp
from torch import _foreach_lerp_ as foreach_lerp_
from torch import _foreach_mul as foreach_mul
from torch import _foreach_mul_ as foreach_mul_
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config

__all__ = [
    "dynamo_config",
    "foreach_add_",
    "foreach_lerp",
    "foreach_lerp_",
    "foreach_mul",
    "foreach_mul_",
    "functorch_config",
]
