"""What LightZero main may do to the policy's logits in inference (`use_policy_logits_clip`).

kvjax's searches do not do it; a replay does it to kvjax's logits before they are compared.

Shapes: A actions.
"""

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from kvjax.base.values import make_plain, require_above_zero, require_numbers, require_one_of

Array = np.ndarray[Any, Any]
Method = Literal["hard", "soft_tanh", "soft_sigmoid", "normalize_max", "normalize_mean"]

_ADAPTIVE = "adaptive"


@dataclasses.dataclass(frozen=True)
class PolicyClip:
    """A way to keep logits [.., A] between bounds.

    Raises:
      ValueError: an unknown method, or a bound that is no finite number.
    """

    method: Method
    low: float = -10.0
    high: float = 10.0
    beta: float = 1.0  # of the soft methods: larger is softer

    def __post_init__(self) -> None:
        make_plain(self)
        require_one_of("method", self.method, get_args(Method))
        require_numbers(self, "low", "high")
        require_above_zero(self, "beta")

    def __call__(self, logits: Array) -> Array:
        """Logits as LightZero's tree gets them."""
        low, high, beta = self.low, self.high, self.beta
        match self.method:
            case "soft_tanh":
                return high * np.tanh(logits / (high * beta))
            case "soft_sigmoid":
                return low + (high - low) * (1.0 + np.tanh(logits / (2.0 * beta))) / 2.0
            case "normalize_max":
                logits = logits - logits.max(axis=-1, keepdims=True)
            case "normalize_mean":
                logits = logits - logits.mean(axis=-1, keepdims=True)
        return np.clip(logits, low, high)


def of_model(model: Any) -> PolicyClip | None:
    """How a torch `WorldModel` clips; None if it does not, as release 0.2.0.

    Bounds that follow what training saw ("adaptive") stand still in inference.

    Raises:
      ValueError: a method that kvjax does not know.
    """
    method: Any = getattr(model, "policy_logits_clip_method", "none")
    if not getattr(model, "use_policy_logits_clip", False) or method == "none":
        return None
    low, high = float(model.policy_logits_clip_min), float(model.policy_logits_clip_max)
    if method == _ADAPTIVE:
        low = max(low, float(model.policy_logits_running_min))
        high = min(high, float(model.policy_logits_running_max))
        return PolicyClip("hard", low, high)
    return PolicyClip(method, low, high, float(model.policy_logits_soft_beta))
