"""Adam for learned keys of which a step sees few rows."""

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from nvf.data.datamodule import VectorDataModule
from nvf.data.queries import Noisy
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.ops.cross_entropy import stratified
from nvf.ops.random_streams import stream
from nvf.training.modules import AdamOfRows, AttentionModule

GIVEN = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}


def made(start: torch.Tensor) -> tuple[list[torch.nn.Parameter], AdamOfRows]:
    weight, rows = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(start.clone())
    return [weight, rows], AdamOfRows(torch.optim.Adam([weight], **GIVEN), torch.optim.SparseAdam([rows], **GIVEN))


def stepped(parameters: list[torch.nn.Parameter], optimizer: AdamOfRows, seen: torch.Tensor) -> None:
    weight, rows = parameters

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (F.embedding(seen, rows, sparse=True) * weight).square().sum()
        value.backward()
        return value

    optimizer.step(loss)


def test_a_row_moves_as_adam_moves_it_and_only_when_it_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 3, generator=generator)
    parameters, optimizer = made(start)
    plain, moments = start.double(), {row: [torch.zeros(3).double()] * 2 for row in range(6)}
    for step, seen in enumerate(([1, 4, 4], [0, 1], [4, 5], [1, 1, 0]), start=1):
        weight = parameters[0].detach().double().clone()
        stepped(parameters, optimizer, torch.tensor(seen))
        for row in set(seen):
            gradient = seen.count(row) * 2 * plain[row] * weight**2
            first, second = moments[row]
            moments[row] = first, second = 0.8 * first + 0.2 * gradient, 0.95 * second + 0.05 * gradient**2
            rate = 0.1 * (1 - 0.95**step) ** 0.5 / (1 - 0.8**step)
            plain[row] = plain[row] - rate * first / (second.sqrt() + 1e-6)
        torch.testing.assert_close(parameters[1].detach().double(), plain, atol=1e-4, rtol=1e-4)
    assert torch.equal(plain[2:4], start.double()[2:4])


def test_what_is_saved_goes_on_in_the_same_bits() -> None:
    start, batches = torch.randn(6, 3), [torch.tensor(seen) for seen in ([1, 4], [0, 1], [4, 5])]
    whole, first = made(start), made(start)
    for seen in batches:
        stepped(*whole, seen)
    for seen in batches[:2]:
        stepped(*first, seen)
    second = made(first[0][1].detach())
    second[0][0].data.copy_(first[0][0].data)
    second[1].load_state_dict(first[1].state_dict())
    stepped(*second, batches[2])
    assert all(torch.equal(*both) for both in zip(whole[0], second[0], strict=True))


SPARSE = [({}, True), ({"sample": None}, False), ({"optimizer": partial(torch.optim.AdamW, weight_decay=0.1)}, False)]


@pytest.mark.parametrize(("given", "sparse"), [*SPARSE, ({"clip": 1.0}, False)])
def test_a_sampled_step_moves_the_keys_that_it_sees(given: dict, sparse: bool, tmp_path: Path) -> None:
    memory = VectorMemory.synthetic(rows=400, dim=8, seed=0)
    attention = SoftAttention(memory, transform="identity", keys="learned", moving=torch.arange(0, 400, 2))
    settings = {"lr": 1e-2, "schedule": "constant", "sample": 20, **given}
    clip = settings.pop("clip", None)
    module = AttentionModule(attention, **settings)
    data = VectorDataModule(Noisy(memory, sigma=0.2), seed=0, batch_size=16, steps_per_epoch=1, val_samples=20)
    trainer = L.Trainer(
        max_epochs=1,
        logger=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
        gradient_clip_val=clip,
        barebones=False,
    )
    trainer.fit(module, data)
    assert module.sparse == sparse
    if sparse:
        seen = torch.zeros(400, dtype=torch.bool)
        seen[stratified(400, 20, stream(0, "sample", 0, 0))] = True
        moved = (attention.delta != 0).any(dim=-1)
        assert moved[seen[::2]].all()
        assert 10 < int(moved.sum()) <= 20 + 16 < 200  # of the sample and of the targets, no others
    else:
        assert not isinstance(trainer.optimizers[0], AdamOfRows)
