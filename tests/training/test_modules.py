"""The modules under a real Trainer: they learn, freeze what they must, log what they say, and resume exactly."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ndcg_of
from nvf.data.datamodule import VectorDataModule
from nvf.data.queries import Noisy, QueryBatch, Recorded, Warped
from nvf.errors import InputError
from nvf.evaluation.calibration import quality
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.models.queries_and_keys import neighbours
from nvf.models.reranker import Reranker
from nvf.training.callbacks import LogGradients
from nvf.training.modules import AttentionModule, JointModule, RerankerModule
from nvf.training.stage import StageModule

STAGES = ("attention", "reranker", "joint")


class StopAfter(Callback):
    """Ends a run after an epoch, as a time limit would."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


def stage(name: str, schedule: str = "onecycle") -> tuple[StageModule, VectorDataModule]:
    torch.manual_seed(0)
    memory = VectorMemory.synthetic(rows=30, dim=8, seed=0)
    attention = SoftAttention(memory, transform="identity" if name == "reranker" else "mlp")
    settings = {"seed": 0, "batch_size": 32, "steps_per_epoch": 5, "val_samples": 300}
    if name == "attention":
        module: StageModule = AttentionModule(attention, lr=3e-2, schedule=schedule, k=4)
        return module, VectorDataModule(Noisy(memory, sigma=0.2), **settings)
    reranker = Reranker(8, kind="mlp", hidden=(16, 8), dropout=0.3)
    pipeline = Pipeline(attention, reranker, k=4)
    if name == "joint":
        module = JointModule(
            pipeline,
            lr=3e-2,
            schedule=schedule,
            scalar_lr_ratio=1.0,
            seed=0,
            relaxation=(1.0, 0.1),
            attention_weight=0.5,
        )
        return module, VectorDataModule(Noisy(memory, sigma=0.2), stage="joint", k=4, **settings)
    module = RerankerModule(pipeline, lr=3e-3, schedule=schedule, scalar_lr_ratio=100.0, seed=0)
    return module, VectorDataModule(Noisy(memory, sigma=0.2), attention=attention, k=4, **settings)


def trainer(folder: Path, *callbacks: Callback, epochs: int = 4) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[ModelCheckpoint(folder, save_last=True, monitor="val/top1", mode="max"), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        inference_mode=False,
        use_distributed_sampler=False,
    )


@pytest.mark.parametrize("name", STAGES)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(name: str, tmp_path: Path) -> None:
    whole, data = stage(name)
    trainer(tmp_path / "whole").fit(whole, data)

    first, data = stage(name)
    trainer(tmp_path / "parts", StopAfter(1)).fit(first, data)
    second, data = stage(name)
    torch.rand(17)  # another process has another global random state
    resumed = trainer(tmp_path / "parts")
    resumed.fit(second, data, ckpt_path=str(tmp_path / "parts" / "last.ckpt"), weights_only=True)

    assert resumed.global_step == 20
    before, expected, found = first.state_dict(), whole.state_dict(), second.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert any(not torch.equal(before[key], found[key]) for key in found)


@pytest.mark.parametrize("schedule", ["onecycle", "constant"])
@pytest.mark.parametrize("name", STAGES)
def test_training_learns(name: str, schedule: str, tmp_path: Path) -> None:
    module, data = stage(name, schedule)
    before = trainer(tmp_path / "before").validate(module, data, verbose=False)[0]
    gradients = LogGradients()
    engine = trainer(tmp_path / "fit", gradients, epochs=8)
    engine.fit(module, data)
    after = engine.callback_metrics
    assert after["val/top1"] > before["val/top1"] + 0.1
    assert after["val/loss"] < before["val/loss"]
    assert after["val/top1"] <= after["val/coverage"] <= 1
    assert {"train/loss", "train/top1", "train/lr", "train/temperature", "val/top5"} <= set(after)
    parts = {"attention": ["transform", "temperature"], "reranker": ["reranker"]}
    parts["joint"] = [*parts["attention"], *parts["reranker"]]
    assert {metric for metric in after if metric.startswith("gradients/")} == {
        f"gradients/{part}" for part in ["query", *parts[name]]
    }
    assert gradients.summary()["steps"] == engine.global_step


@pytest.mark.parametrize("name", STAGES)
def test_a_checkpoint_gives_the_module_back_and_tests_as_it_validates(name: str, tmp_path: Path) -> None:
    module, data = stage(name)
    trainer(tmp_path, epochs=1).fit(module, data)
    fresh, _ = stage(name)
    given = {"attention" if name == "attention" else "pipeline": fresh.model}
    loaded = type(module).load_from_checkpoint(tmp_path / "last.ckpt", **given, weights_only=True)
    assert loaded.lr == module.lr
    queries = torch.randn(5, 8)
    found, expected = (one.eval()(queries) for one in (loaded, module))
    assert torch.equal(*((one if name == "attention" else one.log_probs) for one in (found, expected)))
    data.samples["test"], data._sets["test"] = 300, data.samples_of("val")  # the queries that validation asks
    engine = trainer(tmp_path / "test")
    (tested,), (validated,) = engine.test(loaded, data, verbose=False), engine.validate(loaded, data, verbose=False)
    assert tested == {metric.replace("val/", "test/"): value for metric, value in validated.items()}


@pytest.mark.parametrize("warmup", [0.1, 0.05, 0.2])
def test_a_rate_may_rise_for_one_step(warmup: float, tmp_path: Path) -> None:
    memory = VectorMemory.synthetic(rows=30, dim=8, seed=0)
    module = AttentionModule(SoftAttention(memory), lr=3e-2, schedule="onecycle", warmup=warmup)
    data = VectorDataModule(Noisy(memory, sigma=0.2), seed=0, batch_size=32, steps_per_epoch=5, val_samples=300)
    rates: list[float] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(tmp_path, Watch(), epochs=2).fit(module, data)  # 10 steps, so that 0.1 of them is one
    peak = rates.index(max(rates))
    assert peak <= 1
    assert max(rates) == pytest.approx(3e-2, rel=0.05)
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_the_reranker_stage_leaves_stage_one_alone(tmp_path: Path) -> None:
    module, data = stage("reranker")
    before = {name: value.clone() for name, value in module.attention.state_dict().items()}
    trainer(tmp_path, epochs=1).fit(module, data)
    assert all(torch.equal(before[name], value) for name, value in module.attention.state_dict().items())


def test_the_memory_stays_out_of_checkpoints(tmp_path: Path) -> None:
    module, data = stage("attention")
    trainer(tmp_path, epochs=1).fit(module, data)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not any("memory" in name for name in checkpoint["state_dict"])


def test_scalars_have_a_learning_rate_of_their_own() -> None:
    torch.manual_seed(0)
    pipeline = Pipeline(SoftAttention(VectorMemory(torch.eye(8))), Reranker(8, kind="residual"), k=2)
    module = RerankerModule(pipeline, lr=1e-3, schedule="constant", scalar_lr_ratio=50.0, seed=0)
    network, scalars = module.parameter_groups()
    assert (network["lr"], scalars["lr"]) == (1e-3, 5e-2)
    assert [id(p) for p in scalars["params"]] == [id(pipeline.reranker.evidence)]
    assert len(network["params"]) + 1 == len(list(pipeline.reranker.parameters()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 is not a number above 0"),
        ({"lr": "fast"}, "lr=fast"),
        ({"schedule": "cosine"}, "schedule=cosine is unknown; choose one of onecycle, constant"),
        ({"sample": 0}, "attention.sample=0 is not a whole number of at least 1"),
        ({"sample": 31}, "attention.sample=31 is not a whole number of at least 1 and below 31; null takes all"),
        ({"sample": 8, "hard": 30}, "attention.hard=30 is not a whole number of at least 0 and below 30"),
        ({"hard": 2}, "attention.hard=2 adds to a sample of the rows; set attention.sample"),
    ],
)
def test_bad_settings_are_refused(memory: VectorMemory, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AttentionModule(SoftAttention(memory), **{"lr": 1e-3, "schedule": "constant", **settings})


@pytest.mark.parametrize("joint", [False, True])
def test_keys_that_no_query_points_at_stay(memory: VectorMemory, tmp_path: Path, joint: bool) -> None:
    torch.manual_seed(0)
    moving = torch.arange(0, 30, 2)
    attention = SoftAttention(memory, keys="learned", moving=moving)
    start = attention.keys().detach().clone()
    settings = {"lr": 0.1, "schedule": "constant"}
    module: StageModule
    if joint:
        module = JointModule(Pipeline(attention, Reranker(8), k=4), scalar_lr_ratio=1.0, seed=0, **settings)
    else:
        module = AttentionModule(attention, **settings)
    source = Noisy(memory, sigma=0.2)
    trainer(tmp_path, epochs=2).fit(module, VectorDataModule(source, seed=0, batch_size=32, steps_per_epoch=5))
    assert attention.delta.shape == (15, 8)
    moved = (attention.keys() - start).detach().abs().amax(dim=-1) > 1e-6
    assert moved.nonzero().squeeze(-1).tolist() == moving.tolist()


class Validations(Callback):
    """What each validation of learned keys should have found."""

    def __init__(self) -> None:
        self.expected: list[float] = []
        self.logged: list[float] = []

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        (batch,) = trainer.datamodule.val_dataloader()
        keys = torch.nn.functional.normalize(module.model.memory.rows + module.model.delta, dim=-1)
        self.expected.append(float(((batch.queries @ keys.T).argmax(dim=-1) == batch.targets[:, 0]).float().mean()))

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.logged.append(float(trainer.callback_metrics["val/top1"]))


def test_every_validation_is_of_the_keys_as_they_are(memory: VectorMemory, tmp_path: Path) -> None:
    module = AttentionModule(SoftAttention(memory, transform="identity", keys="learned"), lr=0.3, schedule="constant")
    data = VectorDataModule(Noisy(memory, sigma=0.4), seed=0, batch_size=32, steps_per_epoch=5, val_samples=300)
    validations = Validations()
    engine = trainer(tmp_path, validations, epochs=3)
    engine.validate(module, data, verbose=False)
    engine.fit(module, data)
    assert validations.logged == pytest.approx(validations.expected)
    assert len(set(validations.logged)) == 4


def test_the_relaxation_is_annealed_and_evaluation_is_exact(tmp_path: Path) -> None:
    module, data = stage("joint")
    used: dict[bool, list[float | None]] = {True: [], False: []}
    loss = module.model.loss

    def spy(*arguments, **settings):
        used[module.training].append(settings.get("relaxation"))
        return loss(*arguments, **settings)

    module.model.loss = spy
    trainer(tmp_path, epochs=2).fit(module, data)
    assert used[True] == pytest.approx([10 ** (-step / 9) for step in range(10)])
    assert not used[False]  # `judge` is of the exact distribution, as the next test has it


def test_a_joint_step_is_the_sum_of_both_losses(memory: VectorMemory) -> None:
    pipeline = Pipeline(SoftAttention(memory), Reranker(8), k=4).eval()
    batch = Noisy(memory, sigma=0.2).sample(50, torch.Generator().manual_seed(0))
    settings = {"lr": 1e-3, "schedule": "constant", "scalar_lr_ratio": 1.0, "seed": 0}
    found = pipeline(batch.queries)
    place = batch.targets[:, :1]
    joint, alone = (
        -log_probs.gather(-1, place).mean() for log_probs in (found.log_probs, found.logits.log_softmax(dim=-1))
    )
    for weight in (0.0, 0.3):
        module = JointModule(pipeline, attention_weight=weight, **settings).eval()
        judged = module.judge(batch)
        torch.testing.assert_close(module.loss(batch), joint + weight * alone)
        torch.testing.assert_close(judged.loss, joint + weight * alone)
        assert torch.equal(judged.covered, (found.candidates == place).any(dim=-1))
        assert torch.equal(judged.ranks == 1, found.log_probs.argmax(dim=-1) == place[:, 0])


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("k", [4, 12])
def test_every_stage_validates_the_ndcg_of_the_lists(memory: VectorMemory, k: int, graded: bool) -> None:
    torch.manual_seed(0)
    pipeline = Pipeline(SoftAttention(memory), Reranker(8), k=k).eval()
    asked = Noisy(memory, sigma=0.4).sample(50, torch.Generator().manual_seed(0))
    gains = torch.tensor([1.0, 3.0]).expand(50, 2) if graded else None
    batch = QueryBatch(asked.queries, torch.cat([asked.targets, (asked.targets + 3) % 30], dim=-1), gains=gains)
    data = VectorDataModule(Recorded(memory, {"val": batch}), seed=0, batch_size=50, attention=pipeline.attention, k=k)
    settings = {"lr": 1e-3, "schedule": "constant", "scalar_lr_ratio": 1.0, "seed": 0}
    expected, (candidates,) = quality(pipeline, batch), data.val_dataloader()
    outside = ndcg_of(pipeline(batch.queries).ranking, batch.targets, gains)
    modules = {
        "attention": (AttentionModule(pipeline.attention, lr=1e-3, schedule="constant", k=k), batch),
        "reranker": (RerankerModule(pipeline, **settings), candidates),
        "joint": (JointModule(pipeline, **settings), batch),
    }
    found = {name: module.eval().judge(given).ndcg for name, (module, given) in modules.items()}
    torch.testing.assert_close(found["attention"], quality(pipeline.attention, batch))
    torch.testing.assert_close(found["joint"], expected)
    torch.testing.assert_close(outside, expected)
    if k >= 10:
        torch.testing.assert_close(found["reranker"], expected)
    else:  # what lies outside the candidates, no reranker moves
        assert (found["reranker"] <= expected + 1e-6).all()
        assert (found["reranker"] < expected).any()


def test_a_logged_query_is_no_evidence_for_itself(weighing: Pipeline) -> None:
    module = JointModule(weighing, lr=1e-3, schedule="constant", scalar_lr_ratio=1.0, seed=0).eval()
    assert weighing.evidence is not None
    source = Recorded(weighing.memory, {"train": QueryBatch(weighing.evidence.queries, torch.zeros(90, 1).long())})
    weighing.evidence.logged = torch.arange(90)
    data = VectorDataModule(source, stage="joint", seed=0, batch_size=90, evidence=weighing.evidence)
    (batch,) = data.train_dataloader()
    alone = weighing(batch.queries, logged_as=batch.logged_as).log_probs
    with_itself = weighing(batch.queries).log_probs
    assert (alone - with_itself).abs().max() > 0.01
    assert torch.equal(weighing.evidence.queries[batch.logged_as], batch.queries)
    torch.testing.assert_close(module.loss(batch), -alone[:, 0].mean())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relaxation": 0.5}, "joint.relaxation=0.5 is not two temperatures"),
        ({"relaxation": [1.0]}, "is not two temperatures"),
        ({"relaxation": [1.0, 0.0]}, "joint.relaxation=0.0 is not a number above 0"),
        ({"attention_weight": -1}, "joint.attention_weight=-1 is not a number of at least 0"),
    ],
)
def test_bad_joint_settings_are_refused(pipeline: Pipeline, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        JointModule(pipeline, **{"lr": 1e-3, "schedule": "constant", "scalar_lr_ratio": 1.0, "seed": 0, **settings})


@pytest.mark.parametrize("keys", ["frozen", pytest.param("learned", marks=pytest.mark.slow)])
def test_a_sample_of_the_rows_teaches_what_all_of_them_do(keys: str, tmp_path: Path) -> None:
    memory = VectorMemory.synthetic(rows=400, dim=8, seed=0)
    source = Warped(memory, sigma=0.1, warp="rotation", warp_seed=0)
    reached = {}
    for sample, hard in ((None, 0), (50, 0), (50, 4)):
        torch.manual_seed(0)
        attention = SoftAttention(memory, transform="linear", keys=keys)
        module = AttentionModule(attention, lr=3e-2, schedule="onecycle", sample=sample, hard=hard)
        data = VectorDataModule(source, seed=0, batch_size=128, steps_per_epoch=100, val_samples=2000)
        fitted = trainer(tmp_path, epochs=2)
        fitted.fit(module, data)
        reached[sample, hard] = float(fitted.callback_metrics["val/top1"])
    assert min(reached.values()) > reached[None, 0] - 0.03 > 0.5


def test_hard_negatives_are_the_neighbours_of_the_target(memory: VectorMemory, tmp_path: Path) -> None:
    module = AttentionModule(SoftAttention(memory), lr=1e-3, schedule="constant", sample=5, hard=3)
    seen = []
    loss = module.model.sampled_loss

    def spy(queries: torch.Tensor, targets: torch.Tensor, **rows: torch.Tensor) -> torch.Tensor:
        seen.append((targets, rows["sample"], rows["hard"]))
        return loss(queries, targets, **rows)

    module.model.sampled_loss = spy
    data = VectorDataModule(Noisy(memory, sigma=0.2), seed=0, batch_size=16, steps_per_epoch=3, val_samples=20)
    trainer(tmp_path, epochs=1).fit(module, data)
    assert len(seen) == 3  # validation is exact
    assert not torch.equal(seen[0][1], seen[1][1])
    for targets, sample, hard in seen:
        assert sample.shape == (5,)
        similar = memory.rows[targets[:, 0]] @ memory.rows.T
        assert torch.equal(hard, similar.topk(4).indices[:, 1:])  # the first is the row itself


class NoHostWaits(TorchDispatchMode):
    """Fails where a value goes from the device to the host, by which a GPU would lose its lead."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::unique2"}
        assert function.name().partition(".")[0] not in waits, function.name()
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_nothing_in_a_step_waits_for_the_device(name: str, sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvf.ops.products._on_cpu", lambda _: False)  # what runs elsewhere
    module, data = stage(name)
    if isinstance(module, AttentionModule) and sampled:
        module.sample, module.hard, module.neighbours = 8, 2, neighbours(data.source.memory.rows, 2)
        module.attention.keys = lambda: pytest.fail("not all keys are needed")
    batches = iter(data.train_dataloader())
    optimizer = module.optimizer(module.parameter_groups())
    monkeypatch.setattr(StageModule, "device", torch.device("cpu"), raising=False)
    monkeypatch.setattr(StageModule, "global_step", 0), monkeypatch.setattr(StageModule, "global_rank", 0)
    with NoHostWaits():
        loss = module.loss(next(batches))
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
