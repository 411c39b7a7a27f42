"""`tinsmith serve` stopped and killed: what was finished is still there, what was not says so."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest
import tinker
from tinker import types

from tests.gateway.sdk import prompt
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

LONG = types.SamplingParams(max_tokens=400, stop=[], seed=1)


def datum(first: int = 1) -> types.Datum:
    """Different ones share no prefix, and so no work."""
    return types.Datum(
        model_input=types.ModelInput.from_ints([first, *(i % 300 + 1 for i in range(399))]),
        loss_fn_inputs={"target_tokens": [2] * 400, "weights": [1.0] * 400},
    )


DATUM = datum()


class Server:
    """`tinsmith serve` in a process of its own, with its own home, started again at will."""

    def __init__(self, home) -> None:
        self.home = home
        make_tiny_model(home / "models" / "tiny-llama")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        threads = ["--learner-threads", "1", "--sampler-threads", "1"]
        command = [f"{sys.prefix}/bin/tinsmith", "serve", "--home", str(self.home)]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), *threads], start_new_session=True
        )
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{self.url}/api/v1/healthz")
                return
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def interrupt(self) -> None:
        """Ctrl-C goes to the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def serving(self) -> psutil.Process:
        """The process that serves, which the one that was started looks after."""
        for child in psutil.Process(self.process.pid).children():
            if "spawn_main" in " ".join(child.cmdline()):
                return child
        raise AssertionError("no process serves")

    def post(self, path: str, **body) -> httpx.Response:
        return httpx.post(f"{self.url}/api/v1/{path}", json=body, timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("restarted"))
    server.start()
    yield server
    if server.process.poll() is None:
        server.interrupt()
        server.process.wait(60)


class Work:
    """A client that has trained, saved, and asked for more."""

    def __init__(self, server: Server) -> None:
        self.client = tinker.ServiceClient(base_url=server.url)
        self.session_id = self.client.holder.get_session_id()
        self.training = self.client.create_lora_training_client("tiny-llama", rank=4).result()
        self.run_id = self.training.model_id
        self.loss = self.train().metrics["loss:sum"]
        self.saved = self.training.save_state("saved").result().path
        self.sampler = self.client.create_sampling_client(base_model="tiny-llama").result()
        self.finished = self.sampler.sample(prompt([1, 2]), 1, LONG).result().sequences[0].tokens

    def train(self):
        return self.training.forward_backward([DATUM], "cross_entropy").result()

    def asked(self, server: Server) -> list[str]:
        """Requests whose answers nobody has fetched."""
        body = {"prompt": {"chunks": [{"tokens": [1, 2]}]}, "sampling_params": {"max_tokens": 3}}
        sampler = self.sampler._sampling_session_id
        ids = [
            server.post("asample", sampling_session_id=sampler, seq_id=i, **body).json()
            for i in (1000, 1001)
        ]
        return [answer["request_id"] for answer in ids]

    def still_there(self, server: Server, finished: list[str]) -> None:
        rest = tinker.RestClient(base_url=server.url)
        runs = rest.list_training_runs().result().training_runs
        assert self.run_id in [run.training_run_id for run in runs]
        checkpoints = rest.list_checkpoints(self.run_id).result().checkpoints
        assert [c.tinker_path for c in checkpoints] == [self.saved]
        assert self.session_id in rest.list_sessions().result().sessions
        for request_id in (*finished, f"{self.run_id}:op:1"):
            answer = server.post("retrieve_future", request_id=request_id)
            assert answer.status_code == 200
            assert "protobuf" in answer.headers["content-type"]
        lost = server.post("retrieve_future", request_id=f"{self.sampler._sampling_session_id}:777")
        assert lost.status_code == 410
        sampled = self.sampler.sample(prompt([1, 2]), 1, LONG).result().sequences[0].tokens
        assert sampled == self.finished
        again = self.client.create_training_client_from_state_with_optimizer(self.saved).result()
        assert again.forward([DATUM], "cross_entropy").result().metrics["loss:sum"] == self.loss

    def goes_on(self, steps: int) -> None:
        """The run is where it was, the gradient of `steps` backward passes still to be applied."""
        assert self.train().metrics["loss:sum"] == self.loss
        norm = self.training.optim_step(types.AdamParams()).result().metrics["grad_norm"]
        one = self.client.create_training_client_from_state(self.saved).result()
        one.forward_backward([DATUM], "cross_entropy")
        alone = one.optim_step(types.AdamParams()).result().metrics["grad_norm"]
        assert norm == pytest.approx(alone * steps, rel=1e-3)


def test_interrupted_it_finishes_what_is_under_way(server):
    work = Work(server)
    left = work.asked(server)
    under_way = [work.training.forward_backward([DATUM] * 200, "cross_entropy") for _ in range(4)]
    time.sleep(1)  # accepted, and begun
    server.interrupt()
    started = time.monotonic()
    assert server.process.wait(60) == 0
    assert time.monotonic() - started < 45
    server.start()
    for request in under_way:
        assert len(request.result().loss_fn_outputs) == 200
    work.still_there(server, left)
    work.goes_on(1 + 4 * 200 + 1)


def test_killed_it_comes_back_and_finishes_what_was_under_way(server):
    work = Work(server)
    left = work.asked(server)
    for request_id in left:
        server.post("retrieve_future", request_id=request_id)
    samples = [work.sampler.sample(prompt([1, 2]), 16, LONG) for _ in range(4)]
    operations = [
        work.training.forward_backward([datum(i) for i in range(100)], "cross_entropy")
        for _ in range(3)
    ]
    time.sleep(1)  # accepted, and begun
    serving = server.serving()
    family = serving.children(recursive=True)
    serving.kill()
    for sample in samples:  # the SDK asks for them again by itself
        sequences = sample.result().sequences
        assert len(sequences) == 16
        assert sequences[0].tokens == work.finished
    for operation in operations:  # the run's log has them
        assert len(operation.result().loss_fn_outputs) == 100
    assert server.process.poll() is None
    assert not psutil.wait_procs(family, 30)[1]
    work.still_there(server, left)
    # The run goes on where its log ends: no step was taken, so the loss is the same.
    assert work.train().metrics["loss:sum"] == work.loss


def test_it_ends_with_the_process_that_looks_after_it(server):
    serving = server.serving()
    family = [serving, *serving.children(recursive=True)]
    server.process.kill()
    assert server.process.wait(30) == -signal.SIGKILL
    assert not psutil.wait_procs(family, 30)[1]
