"""One trace of an operation, through all processes that it goes through."""

from __future__ import annotations

import json

from tests.actors.script import run_script
from tinsmith.primitives import tracing

EXPORTED = """
import gzip, os, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

asked = []

class Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        asked.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass

server = HTTPServer(("127.0.0.1", 0), Collector)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

from opentelemetry import trace
from tinsmith.actors import telemetry
from tinsmith.primitives import tracing

telemetry.set_up("learner")
with tracing.start("forward_backward", run="r", op=7):
    pass
trace.get_tracer_provider().force_flush()
for path, request in asked:
    for resource in request.resource_spans:
        about = {a.key: a.value.string_value for a in resource.resource.attributes}
        for scope in resource.scope_spans:
            for span in scope.spans:
                print(path, about["service.name"], about["tinsmith.process"], span.name)
"""

SCRIPT = """
import asyncio, sys
import httpx, numpy as np, tinsmith
from tests.data import text_datum
from tests.gateway.serving import serving

PARENT = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"

def over_http(url):
    http = httpx.Client(base_url=f"{url}/api/v1", timeout=120)
    def post(path, headers=None, **body):
        return http.post(path, json=body, headers=headers).raise_for_status().json()
    session = post("create_session", sdk_version="0")["session_id"]
    asked = post("create_model", session_id=session, model_seq_id=0, base_model="tiny-llama",
                 lora_config={"rank": 4})
    run = post("retrieve_future", request_id=asked["request_id"])["model_id"]
    adam = {"learning_rate": 1e-3}
    asked = post("optim_step", {"traceparent": PARENT}, model_id=run, seq_id=1, adam_params=adam)
    post("retrieve_future", request_id=asked["request_id"])

async def main(home, trace_file):
    options = dict(num_cpus=2, learner_threads=1, sampler_threads=1, kv_bytes=1 << 24)
    async with tinsmith.connect(home=home, trace_file=trace_file, **options) as service:
        training = await service.create_lora_training_client("tiny-llama", rank=4, seed=0)
        policy = await training.save_weights_and_get_sampling_client()
        await training.forward_backward([text_datum(np.random.default_rng(0))])
        await policy.sample(np.arange(5), 2, tinsmith.SamplingParams(max_tokens=4, stop=[]))
        with serving(service) as (url, _):
            await asyncio.to_thread(over_http, url)
        print(training.run_id)

asyncio.run(main(*sys.argv[1:]))
"""


def chain(spans: dict[str, dict], root: dict) -> dict:
    """The names below a span, as a tree, in the order of their beginnings."""
    below = [s for s in spans.values() if s["parent_id"] == root["span_id"]]
    below.sort(key=lambda s: s["start"])
    for span in below:
        assert span["trace_id"] == root["trace_id"]
        # Two clocks of one machine: a millisecond.
        assert root["start"] - 1e-3 <= span["start"] <= span["end"] <= root["end"] + 1e-3
    return {span["name"]: chain(spans, span) for span in below}


def test_a_trace_has_every_stage_of_an_operation_with_its_parents(tiny_home, tmp_path):
    file = tmp_path / "traces" / "spans.jsonl"
    run = run_script(SCRIPT, tiny_home, file).split()[-1]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    spans = {line["span_id"]: line for line in lines}
    assert len(spans) == len(lines)

    def first(name: str, **wanted) -> dict:
        found = [s for s in lines if s["name"] == name and wanted.items() <= s.items()]
        assert found, name
        return found[0]

    batch = first("forward_backward", parent_id=None, process="client")
    assert chain(spans, batch) == {
        "learner.forward_backward": {
            "queue": {},
            "pack": {},
            "turn": {},
            "pass": {"forward": {}, "backward": {}},
        }
    }
    applied = first("learner.forward_backward", process="learner")["attributes"]
    assert applied["tinsmith.run"] == run
    assert (applied["tinsmith.op"], applied["tinsmith.tokens"] > 0) == (2, True)

    sample = first("sample", parent_id=None, process="client")
    assert chain(spans, sample) == {"sampler.sample": {"queue": {}, "prefill": {}, "decode": {}}}
    assert first("sampler.sample")["attributes"]["tinsmith.prompt_tokens"] == 5

    step = first("gateway.optim_step")
    assert (step["trace_id"], step["parent_id"]) == ("a" * 32, "b" * 16)
    assert chain(spans, step) == {"learner.optim_step": {"queue": {}, "optimizer": {}}}


def test_spans_go_to_the_collector_that_the_environment_names():
    told = run_script(EXPORTED).splitlines()
    assert told == ["/v1/traces tinsmith learner forward_backward"]


def test_without_a_tracer_nothing_is_recorded():
    assert tracing.start("forward_backward", run="r") is tracing.NOTHING
    assert tracing.NOTHING.traceparent is None
    assert tracing.record("queue", None, 0.0, 1.0) is None
