# The part of SAEBench that posae's door to it uses; it need not be installed to check types.
from typing import Any, Self

import torch
from torch import Tensor, nn

class BaseSAE(nn.Module):
    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    cfg: Any
    device: torch.device
    dtype: torch.dtype
    def __init__(
        self,
        d_in: int,
        d_sae: int,
        model_name: str,
        hook_layer: int,
        device: torch.device,
        dtype: torch.dtype,
        hook_name: str | None = ...,
    ) -> None: ...
    def to(self, *args: Any, **kwargs: Any) -> Self: ...
    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, feature_acts: Tensor) -> Tensor: ...
