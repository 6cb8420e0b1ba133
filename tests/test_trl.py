"""DPO's losses and gradients are TRL's, on the same model and batch."""

from __future__ import annotations

import os
import random

import pytest
import torch

from midpo_ray.data.batching import Document, collate
from midpo_ray.models.logprobs import ResponseLogProbs
from midpo_ray.training.steps import ExpertStep, StepBatch


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, tiny_llama, byte_tokenizer):
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    text = Dataset.from_list([{"prompt": "say a", "chosen": " a", "rejected": " b"}])
    options = {
        "output_dir": str(tmp_path_factory.mktemp("trl")),
        "beta": 0.3,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
    }
    arguments = trl.DPOConfig(disable_dropout=True, gradient_checkpointing=False, **options)
    model, reference = tiny_llama(seed=1), tiny_llama(seed=0)
    return trl.DPOTrainer(
        model,
        ref_model=reference,
        args=arguments,
        train_dataset=text,
        processing_class=byte_tokenizer,
    )


def pairs(count: int) -> list[dict[str, list[int]]]:
    draw = random.Random(5)
    sizes = {"prompt_ids": (3, 12), "chosen_ids": (1, 15), "rejected_ids": (1, 15)}
    return [
        {k: [draw.randrange(3, 250) for _ in range(draw.randint(*s))] for k, s in sizes.items()}
        for _ in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
def test_losses_and_gradients_are_trl_s(trainer, tiny_llama, layout):
    rows = pairs(6)
    documents = [
        Document(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in rows
    ]
    policy = ResponseLogProbs(tiny_llama(seed=1))
    with torch.no_grad():
        reference = ResponseLogProbs(tiny_llama(seed=0))(collate(documents, layout))
    ones, zeros = torch.ones(len(rows)), torch.zeros(len(rows))
    signals = {
        "reference_chosen": reference[0::2],
        "reference_rejected": reference[1::2],
        "margin": zeros,
    }
    signals |= {"weight_chosen": ones, "weight_rejected": ones, "scale": ones}
    step = ExpertStep(policy, beta=trainer.beta)
    loss, _ = step(StepBatch(collate(documents, layout), signals))
    (loss / len(rows)).backward()
    trainer.model.zero_grad()
    theirs = trainer._compute_loss(trainer.model, trainer.data_collator(rows), return_outputs=False)
    theirs.backward()
    torch.testing.assert_close(loss.detach() / len(rows), theirs.detach(), rtol=1e-5, atol=1e-5)
    gradients = {
        name.removeprefix("model."): p.grad
        for name, p in policy.named_parameters()
        if p.grad is not None
    }
    compared = [
        n
        for n, p in trainer.model.named_parameters()
        if n in gradients and _close(gradients[n], p.grad)
    ]
    assert len(compared) > 10
    for b, row in enumerate(rows):  # pair by pair
        alone = StepBatch(
            collate(documents[b : b + 1], layout),
            {name: value[b : b + 1] for name, value in signals.items()},
        )
        their = trainer._compute_loss(
            trainer.model, trainer.data_collator([row]), return_outputs=False
        )
        torch.testing.assert_close(step(alone)[0].detach(), their.detach(), rtol=1e-5, atol=1e-5)


def _close(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    return True
