"""AdamW whose state includes the exponential moving averages (EMA) of the weights.

ZeRO shards, offloads and saves whatever the optimizer keeps per parameter, so the EMAs cost 4 bytes a parameter
over all workers together and need no second copy of the model (docs/decisions/0002).
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def ema_key(decay: float) -> str:
    """Name of the optimizer state of the EMA with this decay: ``ema_0.9999``."""
    return f"ema_{decay}"


class EmaAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter, 2019) that updates ``ema <- decay * ema + (1 - decay) * weight`` after each step.

    State per parameter, in the parameter's dtype: ``step``, ``exp_avg``, ``exp_avg_sq`` and one ``ema_DECAY`` for each
    of ``ema_decays``. An EMA starts at the weight's initial value, as in the official code.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decays: Sequence[float] = (0.9999,),
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.ema_decays = tuple(ema_decays)
        self.accepts: Callable[[Sequence[Tensor]], bool] = lambda params: True
        """Asked before every update of ``params``; if it says no, weights, moments and EMAs stay as they are."""

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Names of the state tensors that have the parameter's shape."""
        return ("exp_avg", "exp_avg_sq", *map(ema_key, self.ema_decays))

    @torch.no_grad()
    def initialize_state(self, params: Iterable[Tensor]) -> None:
        """Create the state of those ``params`` that have none yet; the EMAs start at the weights."""
        for param in params:
            state = self.state[param]  # DeepSpeed touches this default dict early: an empty state is no state
            if state:
                continue
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
            for decay in self.ema_decays:
                state[ema_key(decay)] = param.detach().clone()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update. DeepSpeed calls this once per flat partition, so nothing here may count calls."""
        params = [param for group in self.param_groups for param in group["params"]]
        if not self.accepts(params):
            return
        self.initialize_state(params)
        super().step(closure)
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for decay in self.ema_decays if params else ():
                emas = [self.state[param][ema_key(decay)] for param in params]
                torch._foreach_lerp_(emas, params, 1 - decay)
