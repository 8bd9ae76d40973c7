"""AdamW on half-precision parameters without float32 copies: compensated, or rounded stochastically.

Rounding to nearest loses every update below half a unit in the last place: bfloat16 has 8 significant bits, so at a
rate of 1e-5 most weights would never move. Either the error of rounding is kept beside the parameter in a second
bfloat16 number (Kahan summation; together they hold 16 bits), or the update is rounded up with the probability that
makes the mean right (Gupta et al., arXiv 1502.02551; both compared for bfloat16 training in arXiv 2010.06192).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from lensmith.engine.options import AdamW

SLICE = 1 << 24
"""Values updated at once. An update holds up to 24 bytes for each in float32: 384 MiB."""


@dataclass
class LeanState:
    update: str
    step: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    residual: torch.Tensor | None
    """float32 value less the parameter; of compensated parameters only."""

    def moments(self) -> dict[str, torch.Tensor]:
        return {"step": self.step, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq} if self.step else {}


class LeanAdamW:
    """AdamW's formulas (arXiv 1711.05101) in float32, slice by slice, results rounded into what is kept.

    The random numbers of an update are a function of seed, name and number of the update: a resumed run has the same.
    """

    def __init__(self, options: AdamW, seed: int):
        self.betas, self.eps, self.seed = options.betas, options.eps, seed
        self.state: dict[str, LeanState] = {}

    def add(self, name: str, p: torch.Tensor, update: str, dtype: torch.dtype, moments: torch.dtype) -> None:
        """`dtype`: what the parameter will have; what rounding it takes away is kept if compensated."""
        value = p.detach()
        residual = _residual(value.float(), value.to(dtype)) if update == "compensated" else None
        zeros = torch.zeros_like(value, dtype=moments)
        self.state[name] = LeanState(update, torch.zeros((), device=p.device), zeros, zeros.clone(), residual)

    @torch.no_grad()
    def step(self, name: str, p: torch.Tensor, lr: float, weight_decay: float) -> None:
        if p.grad is None:
            return
        s = self.state[name]
        s.step += 1
        count = int(s.step)
        random = self._random(name, count, p.device)
        flat = [t.view(-1) for t in (p.detach(), s.exp_avg, s.exp_avg_sq)]
        residual, grad = None if s.residual is None else s.residual.view(-1), p.grad.reshape(-1)
        for begin in range(0, p.numel(), SLICE):
            here = slice(begin, begin + SLICE)
            value, m, v = (t[here] for t in flat)
            own = LeanState(s.update, s.step, m, v, None if residual is None else residual[here])
            self._step(own, value, grad[here], count, lr, weight_decay, random)

    def _step(
        self,
        s: LeanState,
        p: torch.Tensor,
        grad: torch.Tensor,
        count: int,
        lr: float,
        weight_decay: float,
        random: torch.Generator,
    ) -> None:
        """The `count`th update of a slice."""
        (b1, b2), grad = self.betas, grad.float()
        m = s.exp_avg.float().lerp_(grad, 1 - b1)
        v = s.exp_avg_sq.float().mul_(b2).addcmul_(grad, grad, value=1 - b2)
        value = _whole(p, s.residual).mul_(1 - lr * weight_decay)
        denominator = (v / (1 - b2**count)).sqrt_().add_(self.eps)
        value.addcdiv_(m, denominator, value=-lr / (1 - b1**count))
        _store(s.exp_avg, m, random)
        _store(s.exp_avg_sq, v, random)
        if s.residual is not None:
            _split(value, p, s.residual)
        elif s.update == "stochastic":
            _store(p, value, random)
        else:  # plain float32 parameters whose moments are kept in half precision
            p.copy_(value)

    def value(self, name: str, p: torch.Tensor) -> torch.Tensor:
        """The parameter in float32, with what rounding took away."""
        return _whole(p, self.state[name].residual)

    @torch.no_grad()
    def load(self, name: str, p: torch.Tensor, value: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        s = self.state[name]
        if s.residual is None:
            p.copy_(value)
        else:
            _split(value.float(), p, s.residual)
        for key, saved in state.items():
            getattr(s, key).copy_(saved)

    def _random(self, name: str, count: int, device: torch.device) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed} {count} {name}".encode(), digest_size=7).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def _whole(p: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    value = p.detach().to(torch.float32, copy=True)
    return value if residual is None else value.add_(residual)


def _residual(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    return (value - rounded.float()).to(rounded.dtype)


def _split(value: torch.Tensor, p: torch.Tensor, residual: torch.Tensor) -> None:
    """`value` as parameter and residual. Twice: the first residual may round to half a unit, and then the sum of both
    rounds to the parameter's neighbour; from the sum the same two numbers come back after a save."""
    rounded = value.to(p.dtype)
    value = rounded.float() + _residual(value, rounded).float()
    p.copy_(value)
    residual.copy_(_residual(value, p))


def _store(target: torch.Tensor, value: torch.Tensor, random: torch.Generator) -> None:
    """Into bfloat16, rounded up with the probability of the part that is cut off; into float32 as it is.

    bfloat16 is the upper half of float32's bits: adding 16 random bits below them carries with that probability.
    """
    if target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=random)
    bits = value.contiguous().view(torch.int32).add(noise).bitwise_and_(-(1 << 16))
    target.copy_(bits.view(torch.float32))
