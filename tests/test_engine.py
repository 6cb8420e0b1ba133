"""Both engines take the same steps: plain torch on one or two ranks, DeepSpeed's four stages; and their state comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from midpo_ray import config
from midpo_ray.training.engine import (
    Engine,
    deepspeed,
    deepspeed_settings,
    plain,
    prepare,
    trained_state,
)

OPTIM = config.Optim(lr=0.01, weight_decay=0.1, clip=0.05)
MICRO = (1, 3, 2, 1, 2)  # micro-batches of each step
PERSIST = {
    "zero_optimization": {"stage3_param_persistence_threshold": 0}
}  # so that small parameters are partitioned too


class Net(nn.Module):
    """A frozen map and a trained low-rank one, and odd sizes so that partitions cut through parameters."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.a, self.b = nn.Linear(7, 5), nn.Linear(7, 3, bias=False), nn.Linear(3, 5)
        self.base.requires_grad_(False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def loss_of(engine: Engine, step: int, micro: int, rank: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(
        4, 7, generator=torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    ).to(dtype)
    return engine(x).float().square().mean() / MICRO[step]


def train(
    engine: Engine, first: int, last: int, dtype: torch.dtype, share: tuple[int, int] | None = None
) -> list[float]:
    """Gradient norms; ``share``: (world to imitate on one rank, unused)."""
    norms = []
    for step in range(first, last):
        engine.set_lr(OPTIM.lr * (step + 1))
        ranks = range(share[0]) if share else (engine.group.rank,)
        parts = [(micro, rank) for micro in range(MICRO[step]) for rank in ranks]
        for number, (micro, rank) in enumerate(parts):
            engine.backward(
                loss_of(engine, step, micro, rank, dtype) / len(ranks),
                last=number == len(parts) - 1,
            )
        norms.append(float(engine.step()))
    return norms


def make(kind: int | str, dtype: torch.dtype) -> Engine:
    if kind == "plain":
        return plain(Net(dtype), OPTIM)
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    section = config.DeepSpeed(
        stage=kind % 10, offload_optimizer="cpu" if kind > 9 else "none", extra=PERSIST
    )
    settings = deepspeed_settings(section, OPTIM, name, torch.distributed.get_world_size())
    kept = prepare(settings, on_gpu=False)
    engine = deepspeed(Net(dtype), OPTIM, settings, "cpu")
    del kept
    return engine


def every_engine(
    rank: int, world: int, kinds: tuple[int | str, ...], dtype: torch.dtype
) -> dict[Any, Any]:
    results = {}
    for kind in kinds:
        engine = make(kind, dtype)
        norms = train(engine, 0, 3, dtype)
        middle = engine.state()
        norms += train(engine, 3, len(MICRO), dtype)
        again = make(kind, dtype)
        again.load(middle, 3, lambda engine=again: loss_of(engine, 0, 0, rank, dtype))
        returned = again.state()
        resumed = train(again, 3, len(MICRO), dtype)
        results[kind] = {
            "norms": norms,
            "state": engine.state(),
            "exact": all(torch.equal(middle[k], returned[k]) for k in middle),
            "resumed_norms": resumed,
            "resumed": again.state(),
            "trained": trained_state(engine, engine.module.b),
        }
    return results


def both_dtypes(
    rank: int, world: int, kinds: tuple[int | str, ...]
) -> dict[torch.dtype, dict[Any, Any]]:
    return {
        dtype: every_engine(rank, world, kinds, dtype) for dtype in (torch.float32, torch.bfloat16)
    }


@pytest.mark.slow
def test_engines_agree_and_resume_to_the_last_bit():
    kinds = ("plain", 0, 1, 2, 3, 12)
    ranks = run_ranks(both_dtypes, 2, kinds)
    for dtype in (torch.float32, torch.bfloat16):
        for kind in kinds:
            mine, other = ranks[0][dtype][kind], ranks[1][dtype][kind]
            assert mine["exact"], f"{kind}: the state that went in did not come out"
            assert mine["norms"][3:] == mine["resumed_norms"], kind
            for name, value in mine["state"].items():
                assert torch.equal(value, other["state"][name]), f"{kind}: ranks differ in {name}"
                assert torch.equal(value, mine["resumed"][name]), (
                    f"{kind}: resumed differs in {name}"
                )
            assert set(mine["trained"]) == {"weight", "bias"}
            if dtype == torch.float32:
                torch.testing.assert_close(
                    mine["norms"], ranks[0][dtype]["plain"]["norms"], rtol=1e-5, atol=1e-7
                )
                torch.testing.assert_close(
                    mine["state"], ranks[0][dtype]["plain"]["state"], rtol=1e-5, atol=1e-7
                )


@pytest.mark.slow
def test_two_ranks_are_one_with_twice_the_micro_batches():
    engine = plain(Net(), OPTIM)
    norms = train(engine, 0, len(MICRO), torch.float32, share=(2, 0))
    two = run_ranks(plain_ranks, 2)
    torch.testing.assert_close(two[0][0], norms, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(two[0][1], engine.state(), rtol=1e-5, atol=1e-7)


def plain_ranks(rank: int, world: int) -> tuple[list[float], dict[str, Tensor]]:
    engine = plain(Net(), OPTIM)
    return train(engine, 0, len(MICRO), torch.float32), engine.state()
