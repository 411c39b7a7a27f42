"""A training run is a log of operations, applied in order and exactly once, whatever else runs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import tinsmith
from tests.conftest import THREADS
from tests.data import VOCAB, changed, policy_datum, text_datum, untimed
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine
from tinsmith.primitives.op import Op
from tinsmith.primitives.paths import CheckpointPath
from tinsmith.primitives.types import AdamParams, LoraConfig

MODEL = "tiny-llama"
LORA = LoraConfig(rank=4, seed=1)


@contextlib.contextmanager
def engine_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def backbone(tiny_home) -> Backbone:
    return Backbone(str(tiny_home / "models" / MODEL))


async def new_run(service, lora: LoraConfig = LORA, model: str = MODEL):
    return await service.create_lora_training_client(
        model, rank=lora.rank, seed=lora.seed, train_mlp=lora.train_mlp
    )


async def same_weights_logprobs(training) -> list[np.ndarray]:
    """What the run makes of a fixed text: equal bits mean equal weights."""
    data = [text_datum(np.random.default_rng(100 + i), 40) for i in range(2)]
    output = await training.forward(data)
    return [out["logprobs"] for out in output.loss_fn_outputs]


def assert_same_outputs(a, b) -> None:
    assert untimed(a.metrics) == untimed(b.metrics)
    for x, y in zip(a.loss_fn_outputs, b.loss_fn_outputs, strict=True):
        np.testing.assert_array_equal(x["logprobs"], y["logprobs"])


def script(seed: int, count: int):
    """A run's operations: mostly gradients of several losses, sometimes a step."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        if i % 3 == 2:
            yield "optim_step", (AdamParams(learning_rate=1e-2, grad_clip_norm=i % 2),)
        else:
            loss = ["ppo", "cross_entropy", "cispo"][i // 3 % 3]
            make = text_datum if loss == "cross_entropy" else policy_datum
            data = [make(rng, int(rng.integers(4, 16))) for _ in range(2)]
            yield "forward_backward", (data, loss)


async def test_hundreds_of_operations_without_an_await_equal_the_engines_own_bitwise(
    service, backbone
):
    training = await new_run(service)
    ops = [getattr(training, kind)(*args) for kind, args in script(0, 300)]
    results = await asyncio.gather(*ops)
    got = await same_weights_logprobs(training)

    with engine_threads():
        engine = LearnerEngine(backbone)
        engine.create_run("r", LORA)
        for (kind, args), result in zip(script(0, 300), results, strict=True):
            expected = getattr(engine, kind)("r", *args)
            if kind == "optim_step":
                assert result.version == expected.version
                assert untimed(result.metrics) == untimed(expected.metrics)
            else:
                assert_same_outputs(result, expected)
        data = [text_datum(np.random.default_rng(100 + i), 40) for i in range(2)]
        for a, b in zip(
            got, engine.forward("r", data, "cross_entropy").loss_fn_outputs, strict=True
        ):
            np.testing.assert_array_equal(a, b["logprobs"])
    assert [r.version for r in results[2::3]] == list(range(1, 101))


async def test_runs_side_by_side_do_not_change_each_others_results(service):
    alone = await new_run(service)
    for kind, args in script(1, 30):
        await getattr(alone, kind)(*args)
    expected = await same_weights_logprobs(alone)

    among = await new_run(service)
    others = [
        await new_run(service, LoraConfig(rank=rank, seed=rank, train_mlp=False)) for rank in (2, 7)
    ]
    ops = []
    mine = list(script(1, 30))
    for i, (kind, args) in enumerate(mine):
        ops.append(getattr(among, kind)(*args))
        for seed, other in enumerate(others):
            other_kind, other_args = list(script(seed + 2, 30))[i]
            ops.append(getattr(other, other_kind)(*other_args))
    await asyncio.gather(*ops)
    for a, b in zip(expected, await same_weights_logprobs(among), strict=True):
        np.testing.assert_array_equal(a, b)


async def test_a_run_that_waits_does_not_hold_up_another(service):
    waiting, other = await new_run(service), await new_run(service)
    learner = waiting._grant.learner
    gap = Op(learner.call("submit", waiting.run_id, 5, "get_info", {}))
    assert (await other.get_info()).run_id == other.run_id
    assert not gap.done()


async def test_a_resubmitted_operation_returns_the_recorded_result_and_is_not_applied_again(
    service,
):
    training = await new_run(service)
    learner = training._grant.learner
    args = {"adam_params": AdamParams()}
    first = await training.optim_step()
    again = await Op(learner.call("submit", training.run_id, 1, "optim_step", args))
    assert (
        again == first == await Op(learner.call("submit", training.run_id, 1, "optim_step", args))
    )
    assert (await training.get_info()).version == 1


async def test_operations_that_arrive_out_of_order_wait_for_their_turn(service):
    training = await new_run(service)
    learner = training._grant.learner
    early = [
        Op(learner.call("submit", training.run_id, n, "optim_step", {"adam_params": AdamParams()}))
        for n in (3, 2)
    ]
    await asyncio.sleep(0.1)
    assert not any(op.done() for op in early)
    first = training.optim_step()
    assert [(await op).version for op in (first, early[1], early[0])] == [1, 2, 3]


async def test_a_withdrawn_operation_raises_and_the_others_go_on(service):
    training = await new_run(service)
    data = [policy_datum(np.random.default_rng(0), 200) for _ in range(8)]
    first = training.forward_backward(data, "ppo")
    doomed = training.forward_backward(data, "ppo")
    step = training.optim_step()
    assert await doomed.cancel() is True
    with pytest.raises(tinsmith.OpCancelled, match="forward_backward"):
        await doomed
    assert (await step).version == 1
    await first
    assert await first.cancel() is False
    assert await doomed.cancel() is False

    only_one = await new_run(service)
    only_one.forward_backward(data, "ppo")
    await only_one.optim_step()
    for a, b in zip(
        await same_weights_logprobs(training), await same_weights_logprobs(only_one), strict=True
    ):
        np.testing.assert_array_equal(a, b)


async def test_a_cancelled_await_does_not_undo_the_operation(service):
    training = await new_run(service)
    step = training.optim_step()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(step, 1e-6)
    assert (await training.get_info()).version == 1
    assert (await step).version == 1


async def test_a_failed_operation_blocks_nothing_and_leaves_the_gradient_unchanged(service):
    rng = np.random.default_rng(0)
    good, bad = policy_datum(rng), changed(policy_datum(rng), advantages=np.full(12, np.nan))
    runs = [await new_run(service) for _ in range(2)]
    for training, batches in zip(runs, ([[good], [good, bad]], [[good]]), strict=True):
        ops = [training.forward_backward(batch, "ppo") for batch in batches]
        step = training.optim_step()
        await asyncio.gather(*ops, return_exceptions=True)
        await step
    for a, b in zip(*[await same_weights_logprobs(run) for run in runs], strict=True):
        np.testing.assert_array_equal(a, b)


GOOD = policy_datum(np.random.default_rng(0))


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([], {}, tinsmith.InvalidInput, "the batch is empty"),
        (
            [GOOD, tinsmith.Datum([1, VOCAB], {**GOOD.loss_fn_inputs})],
            {},
            tinsmith.InvalidInput,
            f"datum 1: model_input holds token {VOCAB} at position 1",
        ),
        (
            [GOOD, changed(GOOD, target_tokens=np.full(12, VOCAB))],
            {},
            tinsmith.InvalidInput,
            r"datum 1: loss_fn_inputs\['target_tokens'\] holds token 336 at position 0",
        ),
        (
            [GOOD, changed(GOOD, advantages=np.ones(5))],
            {},
            tinsmith.InvalidInput,
            r"datum 1: loss_fn_inputs\['advantages'\] has shape \(5,\)",
        ),
        (
            [changed(GOOD, target_tokens=np.ones(12))],
            {},
            tinsmith.InvalidInput,
            r"datum 0: loss_fn_inputs\['target_tokens'\] must be integers",
        ),
        (
            [changed(GOOD, advantages=np.ones(12, bool))],
            {},
            tinsmith.InvalidInput,
            r"datum 0: loss_fn_inputs\['advantages'\] must be numbers",
        ),
        (
            [changed(GOOD, advantages=np.full(12, np.nan))],
            {},
            tinsmith.InvalidInput,
            r"datum 0: loss_fn_inputs\['advantages'\] is nan at position 0",
        ),
        (
            [changed(GOOD, logprobs=np.full(12, -np.inf))],
            {},
            tinsmith.InvalidInput,
            r"datum 0: loss_fn_inputs\['logprobs'\] is -inf at position 0",
        ),
        (
            [changed(GOOD, logprobs=np.full(12, -1e5))],
            {},
            tinsmith.InvalidInput,
            "gradient of 'ppo' on this batch is not finite",
        ),
        (
            [changed(GOOD, advantages=None)],
            {},
            tinsmith.InvalidInput,
            r"datum 0: loss_fn_inputs\['advantages'\] is missing",
        ),
        (
            [changed(GOOD, weights=np.ones(12))],
            {},
            tinsmith.InvalidInput,
            r"datum 0: loss_fn_inputs\['weights'\] is not an input of this loss",
        ),
        (
            [policy_datum(np.random.default_rng(0), 513)],
            {},
            tinsmith.InvalidInput,
            "datum 0: model_input has 513 tokens, the model's context is 512",
        ),
        ([tinsmith.Datum([], {})], {}, tinsmith.InvalidInput, "datum 0: model_input is empty"),
        ([GOOD, "text"], {}, tinsmith.InvalidInput, r"data\[1\] is a str, not a Datum"),
        ([GOOD], {"loss_fn": "reinforce"}, tinsmith.NotFound, "no loss 'reinforce'"),
        (
            [GOOD],
            {"loss_fn_config": {"beta": 1.0}},
            tinsmith.InvalidInput,
            "loss 'ppo' has no setting 'beta'",
        ),
        (
            [GOOD],
            {"loss_fn_config": {"clip_low_threshold": float("nan")}},
            tinsmith.InvalidInput,
            r"loss_fn_config\['clip_low_threshold'\] must be a finite number",
        ),
        ([GOOD], {"logprobs": "some"}, tinsmith.InvalidInput, 'logprobs must be "all" or "loss"'),
    ],
)
async def test_bad_input_is_a_typed_error_that_names_datum_and_field(
    bad_run, data, options, error, message
):
    with pytest.raises(error, match=message):
        await bad_run.forward_backward(data, **{"loss_fn": "ppo", **options})
    await bad_run.forward([GOOD], "ppo")


@pytest.fixture(scope="module")
async def bad_run(service):
    return await new_run(service)


async def test_arguments_of_the_wrong_type_are_refused_and_leave_no_gap_in_the_log(bad_run):
    with pytest.raises(tinsmith.InvalidInput, match="adam_params must be AdamParams, got float"):
        await bad_run.optim_step(1e-4)
    with pytest.raises(tinsmith.InvalidInput, match="user_metadata must hold JSON values"):
        await bad_run.save_state("a", user_metadata={"lock": threading.Lock()})
    with pytest.raises(tinsmith.InvalidInput, match=r"data\[0\] is a int, not a Datum"):
        await bad_run.forward_backward_custom([3], lambda data, logprobs: None)
    with pytest.raises(tinsmith.InvalidInput, match="every datum needs target_tokens"):
        await bad_run.forward_backward_custom([tinsmith.Datum([1], {})], lambda d, p: None)
    await asyncio.wait_for(bad_run.get_info(), 10)


async def test_an_unusable_model_or_rank_is_refused(service, tmp_path):
    with pytest.raises(tinsmith.InvalidInput, match="rank must be an integer of at least 1"):
        await service.create_lora_training_client(MODEL, rank=0)
    with pytest.raises(tinsmith.NotFound, match="there is no model folder"):
        await service.create_lora_training_client("/no/such/model")
    with pytest.raises(tinsmith.InvalidInput, match=r"it has no config\.json"):
        await service.create_lora_training_client(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(tinsmith.InvalidInput, match="family 'gpt2'; supported: "):
        await service.create_lora_training_client(str(tmp_path))
    assert (await new_run(service)).base_model == MODEL


# ---- custom losses ----


def custom_ppo(data, logprobs):
    """Tinker's ppo with its default thresholds, written anew."""
    loss = torch.zeros(())
    for datum, p in zip(data, logprobs, strict=True):
        q = torch.tensor(datum.loss_fn_inputs["logprobs"])
        a = torch.tensor(datum.loss_fn_inputs["advantages"])
        r = torch.exp(p - q)
        loss = loss - torch.minimum(r * a, r.clamp(0.8, 1.2) * a).sum()
    return loss, {"mean_ratio": 0.5}


async def gradient(service, submit) -> np.ndarray:
    """The run's gradient, seen through a step: with both betas 0 and a huge eps, Adam's update is
    `-lr / eps * gradient`."""
    training = await new_run(service)
    before = await saved_parameters(service, training, "before")
    submit(training)
    training.optim_step(AdamParams(learning_rate=1e6, beta1=0, beta2=0, eps=1e6))
    return before - await saved_parameters(service, training, "after")


async def saved_parameters(service, training, name: str) -> np.ndarray:
    path = (await training.save_weights_for_sampler(name)).path
    folder = Path(service.home) / CheckpointPath.parse(path).folder
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    return torch.cat([t.double().flatten() for _, t in sorted(tensors.items())]).numpy()


async def test_a_custom_loss_has_the_gradient_of_the_same_built_in_loss(service):
    data = [policy_datum(np.random.default_rng(i), 12 + i) for i in range(4)]
    built_in = await gradient(service, lambda t: t.forward_backward(data, "ppo"))
    custom = await gradient(service, lambda t: t.forward_backward_custom(data, custom_ppo))
    assert np.linalg.norm(built_in) > 0
    assert np.linalg.norm(custom - built_in) < 1e-5 * np.linalg.norm(built_in)


def soft_cross_entropy(data, logprobs):
    weights = [torch.tensor(datum.loss_fn_inputs["weights"]) for datum in data]
    return -sum((w * p).sum() for w, p in zip(weights, logprobs, strict=True)), {}


async def test_a_custom_loss_over_several_targets_has_cross_entropys_gradient(service):
    rng = np.random.default_rng(0)
    data = [
        tinsmith.Datum(
            rng.integers(0, VOCAB, 12),
            {"target_tokens": rng.integers(0, VOCAB, (12, k)), "weights": rng.random((12, k))},
        )
        for k in (2, 5)
    ]
    built_in = await gradient(service, lambda t: t.forward_backward(data))
    custom = await gradient(service, lambda t: t.forward_backward_custom(data, soft_cross_entropy))
    assert np.linalg.norm(custom - built_in) < 1e-5 * np.linalg.norm(built_in)
    training = await new_run(service)
    output = await training.forward_backward_custom(data, soft_cross_entropy)
    assert [o["logprobs"].shape for o in output.loss_fn_outputs] == [(12, 2), (12, 5)]


async def test_a_custom_losses_metrics_come_with_the_outputs(service):
    training = await new_run(service)
    data = [policy_datum(np.random.default_rng(i)) for i in range(2)]
    output = await training.forward_backward_custom(data, custom_ppo)
    reference = await training.forward(data, "ppo")
    assert output.metrics["mean_ratio"] == 0.5
    assert output.metrics["custom_loss:sum"] == pytest.approx(
        reference.metrics["loss:sum"], rel=1e-5
    )
    for a, b in zip(output.loss_fn_outputs, reference.loss_fn_outputs, strict=True):
        np.testing.assert_array_equal(a["logprobs"], b["logprobs"])


async def test_what_does_not_fit_waits_in_the_client_and_gives_the_same(service):
    data = [policy_datum(np.random.default_rng(i), 12) for i in range(3)]

    async def trained(window: int | None) -> tuple[list[np.ndarray], int]:
        training = await new_run(service)
        link = training._link
        if window is not None:
            link._window.size = window
        most = 0
        for _ in range(4):
            training.forward_backward_custom(data, custom_ppo)
            training.forward_backward(data, "ppo")
            stepped = training.optim_step()
            most = max(most, len(link._window._under_way))
        await stepped
        return await same_weights_logprobs(training), most

    free, many = await trained(None)
    tight, few = await trained(1)
    for a, b in zip(free, tight, strict=True):
        np.testing.assert_array_equal(a, b)
    assert few <= 2 < many


async def test_what_cannot_be_carried_fails_alone(service):
    training = await new_run(service)
    data = [policy_datum(np.random.default_rng(0))]
    with pytest.raises(TypeError, match="pickle"):
        await training._submit("set_share", share=threading.Lock())  # whatever checks let through
    assert (await training.forward_backward(data, "ppo")).metrics["loss:sum"] != 0


async def test_what_is_submitted_after_a_custom_loss_waits_for_it(service):
    training = await new_run(service)
    started, go_on = threading.Event(), threading.Event()

    def slow(data, logprobs):
        started.set()
        assert go_on.wait(60)
        return custom_ppo(data, logprobs)

    data = [policy_datum(np.random.default_rng(0))]
    custom = training.forward_backward_custom(data, slow)
    step = training.optim_step()
    await asyncio.to_thread(started.wait, 60)
    await asyncio.sleep(0.1)
    assert not step.done()
    go_on.set()
    assert (await step).metrics["grad_norm"] > 0
    assert custom.done()


async def test_a_custom_loss_that_raises_blocks_nothing(service):
    training = await new_run(service)

    def broken(data, logprobs):
        raise ZeroDivisionError("my own mistake")

    def no_scalar(data, logprobs):
        return logprobs[0], {}

    data = [policy_datum(np.random.default_rng(0))]
    ops = [training.forward_backward_custom(data, loss) for loss in (broken, no_scalar)]
    step = training.optim_step()
    with pytest.raises(ZeroDivisionError, match="my own mistake"):
        await ops[0]
    with pytest.raises(tinsmith.InvalidInput, match="must return"):
        await ops[1]
    assert (await step).metrics["grad_norm"] == 0


async def test_a_custom_loss_need_not_depend_on_every_datum(service):
    training = await new_run(service)
    data = [policy_datum(np.random.default_rng(i)) for i in range(2)]
    await training.forward_backward_custom(data, lambda d, p: (-p[0].sum(), {}))
    assert (await training.optim_step()).metrics["grad_norm"] > 0
    with pytest.raises(tinsmith.InvalidInput, match="does not depend on the logprobs"):
        await training.forward_backward_custom(data, lambda d, p: (torch.zeros(()), {}))
