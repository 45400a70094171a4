"""Two processes next to one: DDP, the whole command, and a memory that the ranks share. Real gloo, on the CPU."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from conftest import SMALL, SMALL_STEPS, command, compose_config
from nvf import InputError, Pipeline
from nvf.data.datamodule import VectorDataModule
from nvf.data.queries import Nearest, QueryBatch
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.words import WordScores
from nvf.training.build import build_source, check_sharded
from nvf.training.devices import part_processes, shares_memory, start_processes
from nvf.training.fit import fit
from nvf.training.sharded import ShardedAttention, ShardedMemory, own_rows, whole
from nvf.training.stages import attention_stage, reranker_stage
from programs import PATIENCE, Program, state, wait_for

RANKS = 2
TWO = ["trainer.devices=2", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def in_processes(work: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """What `work(rank, folder)` returns in each of two processes that know of each other."""
    mp.start_processes(_process, (work, folder, free_port()), nprocs=RANKS, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


def _process(rank: int, work: Callable[[int, Path], Any], folder: Path, port: int) -> None:
    about = {"LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in about.items()})
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    torch.save(work(rank, folder), folder / f"rank{rank}.pt")
    part_processes()


# --- a memory that the ranks share ---

CASES = ("one", "several", "ties", "half", "learned", "all learned", "words")
ROWS = 11  # not divisible by the ranks


def stage_one(case: str) -> tuple[SoftAttention, QueryBatch]:
    """Stage 1 with nothing at zero, and queries; the rows of `ties` are equal to the last bit."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, 6, generator=generator)
    if case == "ties":
        rows = torch.eye(6)[torch.arange(ROWS) % 4]  # their products with a query are its coordinates
    torch.manual_seed(0)
    memory = VectorMemory(rows, dtype="bfloat16" if case == "half" else "float32")
    settings: dict[str, Any] = {"transform": "mlp", "beta": 5.0, "keys": "learned" if "learned" in case else "frozen"}
    if case == "learned":
        settings["moving"] = torch.tensor([0, 2, 3, 4, 9])  # four of the one rank's rows, one of the other's
    attention = SoftAttention(memory, biased=case == "words", worded=case == "words", **settings)
    queries = torch.randn(9, 6, generator=generator, requires_grad=True)
    targets, words = torch.randint(ROWS, (9, 1), generator=generator), None
    if case == "several":
        targets = torch.rand(9, ROWS, generator=generator).argsort(dim=-1)[:, :3]
        targets[1::2, 1:] = -1
        targets[2::4, 2] = -1
    if attention.delta is not None:
        attention.delta.data = torch.randn(attention.delta.shape, generator=generator)
    if case == "words":
        attention.bias = 0.1 * torch.randn(ROWS, generator=generator)
        attention.word_weights = torch.tensor([0.3, 0.2])
        listed = torch.rand(9, ROWS, generator=generator).argsort(dim=-1)[:, :4].sort(dim=-1).values
        words = WordScores(listed, torch.rand(9, 4, 2, generator=generator))
    return attention, QueryBatch(queries, targets, words)


def found_by(attention: SoftAttention, batch: QueryBatch) -> dict[str, Any]:
    """What a stage 1, whole or sharded, computes: a loss with its gradients, and searches without any."""
    queries, targets, words = batch[:3]
    losses = {"all rows": attention.loss(*batch[:3])}
    if words is None:
        losses["a sample"] = attention.sampled_loss(queries, targets, sample=torch.tensor([1, 3, 6, 9]))
    loss: Tensor = sum(losses.values())  # type: ignore[assignment]
    loss.backward()
    named = {"query": queries.grad, **{name: weight.grad for name, weight in attention.named_parameters()}}
    with torch.no_grad():
        top, (ranked,) = attention.candidates(queries, 7, words=words), attention.ranked(queries, targets, 9, words)
        found = {"losses": losses, "logits": attention(queries, words), "candidates": top.scores, "ranked": ranked[:1]}
        found |= {"logsumexp": ranked.logsumexp, "keys": attention.keys_of(targets.clamp(min=0))}
        found |= {"exact": attention.memory.search(queries, 3).scores, "vectors": attention.memory.take(targets[:, :1])}
        if attention.bias is None:
            found["hubness"] = attention.memory.hubness(queries, attention.keys(), 2.0)
        found["rows"] = [top.rows, ranked.rows, ranked.ranks, attention.memory.search(queries, 3).rows]
    return {**found, "gradients": named}


def plain(found: Any, attention: SoftAttention) -> Any:
    """Tensors without graphs, and of DTensors, which are learned keys, the rows of all ranks."""
    if isinstance(found, dict):
        return {name: plain(value, attention) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [plain(value, attention) for value in found]
    if isinstance(attention, ShardedAttention) and hasattr(found, "full_tensor"):
        found = found.full_tensor()[attention.kept]
    return found.detach()


def of_shards(rank: int, folder: Path) -> dict[str, Any]:
    mesh, results = init_device_mesh("cpu", (RANKS,)), {}
    for case in CASES:
        attention, batch = stage_one(case)
        sharded = ShardedAttention.of(attention, ShardedMemory(attention.memory, mesh))
        results[case] = {**plain(found_by(sharded, batch), sharded), "held": len(sharded.keys())}
        again = whole(sharded).state_dict()
        assert all(torch.equal(again[name], weight) for name, weight in attention.state_dict().items())
    return results


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_processes(of_shards, tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_memory_finds_what_a_whole_one_finds(shards: list[dict[str, Any]], case: str) -> None:
    attention, batch = stage_one(case)
    expected = plain(found_by(attention, batch), attention)
    assert [found[case].pop("held") for found in shards] == [6, 5]
    for found in (found[case] for found in shards):
        assert all(map(torch.equal, found["rows"], expected["rows"]))  # of equal scores too
        torch.testing.assert_close(found, expected)
    for name, gradient in shards[0][case]["gradients"].items():
        assert gradient.abs().sum() > 0
        assert torch.equal(gradient, shards[1][case]["gradients"][name])


def test_rows_that_some_rank_would_lack_are_refused() -> None:
    four = [SimpleNamespace(size=lambda: 4, get_local_rank=lambda rank=rank: rank) for rank in range(4)]
    assert [(own.start, own.stop) for own in (own_rows(7, mesh) for mesh in four)] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    with pytest.raises(InputError, match=r"4 devices would share 5 rows, 2 each, and one has none; lower devices"):
        own_rows(5, four[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer=sharded", "stage=joint"], r"trainer=sharded .*stage=reranker"),
        (["trainer=sharded", "attention.keys=moved"], r"trainer=sharded .*attention\.keys="),
        (["trainer=sharded", "attention.sample=9", "attention.hard=2"], r"trainer=sharded .*attention\.hard=0"),
        (["trainer=sharded", "reranker.folds=2"], r"trainer=sharded .*reranker\.folds=null"),
        (["trainer=sharded", "attention.keys=learned", "+trainer.gradient_clip_val=1"], r"trainer.gradient_clip_val=1"),
        (["trainer=ddp", "trainer.strategy=ddp_spawn"], r"trainer.strategy=ddp_spawn is not supported; choose ddp"),
        (["trainer=ddp", "trainer.accelerator=abacus"], r"^trainer: .*abacus.*; correct trainer="),
    ],
)
def test_what_several_devices_cannot_do_is_refused_before_they_start(words: list[str], message: str) -> None:
    config = compose_config(*TWO, *words)

    def start() -> None:
        check_sharded(config)
        start_processes(config["trainer"], threads=None)

    with pytest.raises(InputError, match=message):
        start()


# --- fits ---

FEW = [*SMALL, "queries.val_samples=201", "train_samples=96", "reranker.dropout=0", "k=8"]
FEW += ["attention.lr=0.1", "reranker=mlp", "reranker.lr=0.3"]
EPOCHS = ["attention.epochs=2", "attention.steps_per_epoch=3", "reranker.epochs=2", "reranker.steps_per_epoch=3"]


def fitted(stage: str, folder: Path, *words: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that a fit by gradient descent kept, and those that it ended with.

    Adam would hide a gradient that is too long, and where one is zero but for rounding, step by its sign.
    """
    config = compose_config(*FEW, *EPOCHS, *words)
    config["trainer"]["enable_progress_bar"] = False
    source = build_source(config)
    module, data, how, *_ = attention_stage(config, source)
    exact = SoftAttention(source.memory, transform="identity")  # every target is a candidate
    if shares_memory(config["trainer"]):
        source.memory = ShardedMemory(source.memory, init_device_mesh("cpu", (RANKS,)))
        module.model, exact = (ShardedAttention.of(one, source.memory) for one in (module.model, exact))
    if stage == "reranker":
        module, data, how, *_ = reranker_stage(config, source, exact)
    module.optimizer = partial(torch.optim.SGD, momentum=0.9)
    fit(module, data, how, folder=folder, name=stage, start_competes=True)
    assert not any(weight.requires_grad for weight in module.parameters())
    last = torch.load(folder / "checkpoints" / stage / "last.ckpt", weights_only=True)["state_dict"]
    if isinstance(module.attention, ShardedAttention):
        module.model = whole(module.model)
    return module.state_dict(), last


FITS = {  # name: the stage, the words for two processes, and for the one that does the same
    "ddp attention": ("attention", ["trainer=ddp", "attention.batch_size=16"], ["attention.batch_size=32"]),
    "ddp reranker": ("reranker", ["trainer=ddp", "reranker.batch_size=16"], ["reranker.batch_size=32"]),
    "ddp start": (  # which validates best
        "attention",
        ["trainer=ddp", "attention=linear", "attention.lr=3", "attention.batch_size=16"],
        ["attention=linear", "attention.lr=3", "attention.batch_size=32"],
    ),
    "sharded attention": ("attention", ["trainer=sharded", "attention.batch_size=32"], ["attention.batch_size=32"]),
    "sharded keys": (
        "attention",
        ["trainer=sharded", "attention.keys=learned", "attention.sample=20"],
        ["attention.keys=learned", "attention.sample=20"],
    ),
    "sharded reranker": (
        "reranker",
        ["trainer=sharded", "reranker.batch_size=32", "reranker.dropout=0.1"],  # all ranks drop the same
        ["reranker.batch_size=32", "reranker.dropout=0.1"],
    ),
}


def of_fits(rank: int, folder: Path) -> dict[str, Any]:
    with patch.object(DistributedDataParallel, "_sync_buffers") as sent:
        found: dict[str, Any] = {
            name: fitted(stage, folder / name, *TWO, *words) for name, (stage, words, _) in FITS.items()
        }
    return {**found, "sent": sent.call_count}


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_processes(of_fits, tmp_path_factory.mktemp("fits"))


@pytest.mark.parametrize("name", FITS)
def test_two_processes_fit_what_one_fits(fits: list[dict[str, Any]], tmp_path: Path, name: str) -> None:
    stage, _, words = FITS[name]
    kept, last = fitted(stage, tmp_path, *words)
    start = fitted(stage, tmp_path / "start", *words, f"{stage}.epochs=1", f"{stage}.lr=1e-9")[1]
    for found in (found[name] for found in fits):
        torch.testing.assert_close(found[0], kept, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], last, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(weight, fits[1][name][0][part]) for part, weight in fits[0][name][0].items())
    moved = [part for part, weight in last.items() if (weight - start[part]).abs().max() > 1e-3]
    assert len(moved) >= len(last) // 2  # or all of this would say little
    if name == "ddp start":
        assert not kept["model.transform.network.weight"].any()


def test_no_step_of_ddp_sends_the_memory(fits: list[dict[str, Any]]) -> None:
    assert [found["sent"] for found in fits] == [0, 0]


@pytest.mark.parametrize("count", [1, 3, 32, 35, 64, 70])
def test_ranks_have_equal_shares_of_every_batch(count: int) -> None:
    source = Nearest(VectorMemory.synthetic(rows=30, dim=8, seed=0))

    def batches(ranks: int, size: int) -> list[list[Tensor]]:
        found = []
        for rank in range(ranks):
            data = VectorDataModule(source, seed=0, batch_size=size, train_samples=count)
            strategy = SimpleNamespace(root_device=torch.device("cpu"))
            data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, strategy=strategy)  # type: ignore
            found.append([batch.queries for batch in data.train_dataloader()])
        return found

    (whole,), shared = batches(1, 32), batches(2, 16)
    assert [len(batch) for batch in whole] == [min(32, count - start) for start in range(0, count, 32)]
    for expected, *parts in zip(whole, *shared, strict=True):
        assert len({len(part) for part in parts}) == 1  # so the mean of their means is the mean
        union = torch.cat(parts)
        assert torch.equal(union[: len(expected)], expected)
        assert len(union) - len(expected) < RANKS  # a sample that is there twice evens them out


# --- the whole command ---


def test_ddp_leaves_one_run(tmp_path: Path) -> None:
    joint = ["joint.epochs=1", "joint.steps_per_epoch=2"]
    words = [*SMALL, *SMALL_STEPS, "stage=joint", *joint, "dashboards=none", "queries.val_samples=2049"]
    done = command(*words, "trainer=ddp", *TWO, cwd=tmp_path)  # one rank has more validation batches than the other
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test queries: 300") == done.stdout.count("fitting joint") == 1
    assert "Warning" not in done.stdout + done.stderr
    (run,) = tmp_path.glob("outputs/[0-9]*/*")
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["pipeline"]["top1"]["value"] > 0
    assert results["joint"]["before"]["coverage"]["value"] <= 1
    assert results["gradients"]["training"].keys() == {"attention", "reranker", "joint"}
    for stage in ("attention", "reranker", "joint"):
        assert {path.name for path in (run / "checkpoints" / stage).iterdir()} == {
            "best.ckpt",
            "best.safetensors",
            "last.ckpt",
        }
    assert (run / "train.log").read_text().count("test queries") == 1
    assert len(Pipeline.load(run / "pipeline").search(torch.randn(3, 8), k=5).rows) == 3


def test_an_error_of_all_processes_is_told_once(tmp_path: Path) -> None:
    done = command(*SMALL, "trainer=ddp", *TWO, "trainer.precision=65", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: trainer.precision=65 ")
    assert done.stderr.count("\n") == 1


def test_a_stopped_run_stops_all_its_processes(tmp_path: Path) -> None:
    words = [*SMALL, "stage=attention", "attention.steps_per_epoch=1", "attention.epochs=10000", "trainer=ddp", *TWO]
    with Program(*words, cwd=tmp_path) as process:
        wait_for(lambda: list(tmp_path.glob("outputs/*/*/checkpoints/attention/best.ckpt")), unless=process.ended)
        others = process.children()
        process.send(signal.SIGTERM)
        assert process.wait() == 143
        assert others
        wait_for(lambda: all(state(pid) == "Z" for pid in others))
        assert "Traceback" not in process.stderr


SHARED = [*SMALL, *SMALL_STEPS, "dashboards=none", "data.rows=41", "attention.keys=learned", "trainer=sharded"]


def check_figures(folder: Path, run: Callable[..., dict[str, Any]], *words: str) -> None:
    """A run of several processes has the figures of one."""
    (results,) = folder.glob("outputs/[0-9]*/*/results.json")
    found, expected = json.loads(results.read_text()), run(*words, "trainer.devices=1", "trainer.accelerator=cpu")
    for method in ("exact", "oracle", "attention", "pipeline"):
        for metric, figure in expected["test"][method].items():
            assert found["test"][method][metric]["value"] == pytest.approx(figure["value"], abs=0.01)
    for name in ("queries", "memory"):
        assert found[name] == expected[name]
    parts = expected["gradients"]["parameters"]
    assert found["gradients"]["parameters"] == {name: pytest.approx(norm, rel=0.05) for name, norm in parts.items()}


@pytest.mark.slow
def test_a_sharded_run_finds_what_a_run_on_one_device_finds(tmp_path: Path, run: Callable[..., dict[str, Any]]) -> None:
    done = command(*SHARED, *TWO, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test queries: 300") == 1
    assert "Warning" not in done.stdout + done.stderr
    check_figures(tmp_path, run, *SHARED)
    (saved,) = tmp_path.glob("outputs/[0-9]*/*/pipeline")
    assert Pipeline.load(saved).search(torch.randn(3, 8), k=41).rows.sort().values.equal(torch.arange(41).expand(3, -1))


@pytest.mark.slow
def test_two_nodes_find_what_one_finds(tmp_path: Path, run: Callable[..., dict[str, Any]]) -> None:
    words = [*SHARED, "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    nodes = []
    for number, port in enumerate([free_port()] * 2):
        agent = ["--nnodes=2", f"--node_rank={number}", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
        start = [sys.executable, "-m", "torch.distributed.run", *agent, f"--master_port={port}", "-m", "nvf.train"]
        said: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [*start, *words, "trainer.num_nodes=2", "trainer.devices=1"]
        nodes.append(subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, **said))
    (printed, fault), (silent, other) = (node.communicate(timeout=PATIENCE) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], fault + other
    assert (printed.count("test queries: 300"), silent.count("test queries: 300")) == (1, 0)
    check_figures(tmp_path, run, *SHARED)
