"""What a served cluster tells of itself: metrics that add up, to whom they may be told, `tinsmith
top`, and logs without keys."""

from __future__ import annotations

import io
import json
import logging
import re

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tinker import types
from typer.testing import CliRunner

from tests.data import text_datum
from tests.gateway.sdk import prompt, sdk_datum
from tests.gateway.serving import serving
from tinsmith.cli import app
from tinsmith.gateway.access import Access
from tinsmith.gateway.keys import KeyFile
from tinsmith.primitives import logs

ADAM = types.AdamParams(learning_rate=1e-2)
LENGTH = 8


def scrape(url: str, key: str | None = None) -> dict[str, list]:
    """Samples by name, as Prometheus's own parser reads them."""
    headers = {} if key is None else {"x-api-key": key}
    answer = httpx.get(f"{url}/metrics", headers=headers, timeout=60).raise_for_status()
    assert answer.headers["content-type"].startswith("text/plain")
    found: dict[str, list] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def total(samples: dict[str, list], name: str, **labels: str) -> float:
    return sum(
        s.value for s in samples.get(f"tinsmith_{name}", []) if labels.items() <= s.labels.items()
    )


def series_of(samples: dict[str, list], run: str) -> set[str]:
    return {name for name, found in samples.items() for s in found if s.labels.get("run") == run}


def work(training, steps: int) -> None:
    datum = sdk_datum(text_datum(np.random.default_rng(0), LENGTH))
    for _ in range(steps):
        training.forward_backward([datum], "cross_entropy").result()
        training.optim_step(ADAM).result()
    sampler = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=5, stop=[], seed=0)
    sampler.sample(prompt([1, 2, 3]), 2, params).result()


def test_counts_are_those_of_the_operations_sent_and_go_with_the_run(service, url, training):
    run = training.model_id
    work(training, 3)
    samples = scrape(url)
    for kind, count in (("forward_backward", 3), ("optim_step", 3), ("publish", 1)):
        assert total(samples, "ops_total", run=run, kind=kind, outcome="ok") == count
    assert total(samples, "ops_total", run=run) == 7
    tokens = total(samples, "learner_tokens_total", run=run)
    assert tokens == 3 * text_datum(np.random.default_rng(0), LENGTH).model_input.length
    assert total(samples, "prompt_tokens_total", run=run) == 3
    assert total(samples, "sampled_tokens_total", run=run) == 10
    assert total(samples, "sample_requests_total", run=run, outcome="ok") == 1
    assert total(samples, "run_version", run=run) == 3
    assert total(samples, "published_version", run=run) == 3
    assert total(samples, "staleness_versions", run=run) == 0
    assert total(samples, "queued_ops", run=run) == 0
    assert total(samples, "run_bytes", run=run) > 0
    memory = samples["tinsmith_process_resident_memory_bytes"]
    processes = {s.labels["process"] for s in memory if s.value > 1e6}
    # Which number the sampler has depends on how many died before, in other tests.
    assert {"controller", "learner", "sampler", "gateway"} <= {p.split()[0] for p in processes}
    steps = {"method": "POST", "route": "/api/v1/optim_step", "status": "200"}
    assert total(samples, "http_requests_total", **steps) >= 3
    # No series is there twice, and none without bounds.
    for name, found in samples.items():
        keys = [tuple(sorted(s.labels.items())) for s in found]
        assert len(keys) == len(set(keys)), name

    service.sync.delete_training_run(run)
    assert series_of(scrape(url), run) == set()


def test_top_shows_a_run_that_trains(url, training):
    work(training, 2)
    top = CliRunner(env={"COLUMNS": "200"})
    done = top.invoke(app, ["top", "--url", url, "--once", "--json", "--interval", "0.1"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    (row,) = (r for r in facts["runs"] if r["run"] == training.model_id)
    assert (row["version"], row["published"], row["staleness"]) == (2, 2, 0)
    assert (row["ops_done"], row["ops_failed"], row["queued_ops"]) == (5, 0, 0)
    assert {p["process"] for p in facts["processes"]} >= {"controller", "learner", "gateway"}
    shown = top.invoke(app, ["top", "--url", url, "--once", "--interval", "0.1"])
    assert shown.exit_code == 0, shown.output
    assert training.model_id[:8] in shown.stdout
    assert re.search(r"sampler \d", shown.stdout)


def test_top_says_where_nobody_answers():
    done = CliRunner().invoke(app, ["top", "--url", "http://127.0.0.1:1", "--once"])
    assert done.exit_code == 2
    assert "no service answers at http://127.0.0.1:1/metrics" in done.output


@pytest.fixture
def written():
    """What this process logs as JSON at the lowest level, meanwhile."""
    logger, text = logging.getLogger("tinsmith"), io.StringIO()
    before = (logger.handlers[:], logger.level, logger.propagate)
    patch = pytest.MonkeyPatch()
    patch.setenv("TINSMITH_LOG", "json")
    patch.setenv("TINSMITH_LOG_LEVEL", "debug")
    logs.set_up("gateway")
    logger.handlers[0].setStream(text)
    yield text
    patch.undo()
    logger.handlers[:], logger.level, logger.propagate = before


def test_with_keys_each_owner_sees_its_own_runs_and_the_operator_all(
    service, sdk_environment, tmp_path, written
):
    import tinker

    file = KeyFile(tmp_path / "keys.json")
    alice, bob, operator = (file.add(owner) for owner in ("alice", "bob", "operator"))
    with serving(service, access=Access(file)) as (url, _):
        with tinker.ServiceClient(base_url=url, api_key=alice) as client:
            training = client.create_lora_training_client("tiny-llama", rank=4).result()
            work(training, 1)
            run = training.model_id
            assert series_of(scrape(url, alice), run)
            assert series_of(scrape(url, operator), run)
            assert not series_of(scrape(url, bob), run)
            assert total(scrape(url, bob), "process_resident_memory_bytes") > 0
            assert httpx.get(f"{url}/metrics").status_code == 401
            bad = [sdk_datum(text_datum(np.random.default_rng(0), LENGTH))]
            with pytest.raises(Exception, match="no loss"):
                training.forward_backward(bad, f"nonsense-{alice}").result()
        logging.getLogger("tinsmith.gateway").warning("refused: Authorization: Bearer %s", bob)
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert lines
    assert {"time", "level", "process", "pid", "message"} <= lines[-1].keys()
    for key in (alice, bob, operator):
        assert key not in written.getvalue()


def test_log_lines_carry_the_ids_that_they_are_about(written):
    logger = logging.getLogger("tinsmith.tests")
    with logs.about(run="r1", op=7):
        logger.info("hello", extra={"kind": "optim_step"})
        try:
            raise ValueError("key tml-abcdefghijkl is wrong")
        except ValueError:
            logger.exception("failed")
    logger.info("outside")
    hello, failed, outside = map(json.loads, written.getvalue().splitlines())
    assert (hello["run"], hello["op"], hello["kind"]) == ("r1", 7, "optim_step")
    assert "key [secret] is wrong" in failed["error"]
    assert "run" not in outside
