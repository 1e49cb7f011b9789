"""Flow times to train at: uniform, or logit-normal, which spends most draws where the velocity is hard to tell.

Shapes: N rows, N1 one time per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIME_SAMPLINGS = ("uniform", "logit_normal")


def sample_times(
    num_rows: int,
    kind: str,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw `t_N1` in [0, 1], float32 on `device`: U(0, 1), or sigmoid(N(mean, std^2)) (arXiv 2403.03206, section 3.1).

    The draw itself runs on the generator's device, so that one seed gives the same times everywhere.
    """
    if kind not in TIME_SAMPLINGS:
        raise ValueError(f"time_sampling is {kind!r}; it must be one of {', '.join(TIME_SAMPLINGS)}")
    source = generator.device if generator is not None else device
    if kind == "uniform":
        return torch.rand(num_rows, 1, generator=generator, device=source).to(device)
    return torch.sigmoid(torch.randn(num_rows, 1, generator=generator, device=source) * std + mean).to(device)


def sample_time_pairs(
    num_rows: int,
    from_noise: float = 0.5,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Draw `s_N1 <= t_N1` to distil jumps at: two uniform times in order, or s = 0 on a share `from_noise` of the rows.

    Not logit-normal: that hardly ever draws long jumps, and the longest, from noise, is what one-step sampling takes.
    """
    source = generator.device if generator is not None else device
    first_N1, second_N1, choice_N1 = torch.rand(3, num_rows, 1, generator=generator, device=source).to(device)
    s_N1, t_N1 = torch.minimum(first_N1, second_N1), torch.maximum(first_N1, second_N1)
    noise_N1 = choice_N1 < from_noise
    return torch.where(noise_N1, 0.0, s_N1), torch.where(noise_N1, first_N1, t_N1)
