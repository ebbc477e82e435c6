"""Random requests by the server's own schema: none fails the server, and nothing is left of any."""

import os
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from running import served

schemathesis = pytest.importorskip("schemathesis")

#: Of each route, good and bad; `make test-serving` has a campaign.
NUM_CASES = int(os.environ.get("PAGED_KV_NUM_CASES", 12))
KINDS = {"good": schemathesis.GenerationMode.POSITIVE, "bad": schemathesis.GenerationMode.NEGATIVE}


@pytest.mark.parametrize("kind", KINDS)
def test_random_requests_never_fail_the_server(kind):
    num_threads, num_requests = threading.active_count(), 0
    with served(timeout=20.0) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        for found in schema.get_all_operations():
            operation = found.ok()
            if operation.path == "/pool/frames":  # it has no end
                continue

            @settings(max_examples=NUM_CASES, deadline=None, suppress_health_check=list(HealthCheck))
            @given(operation.as_strategy(generation_mode=KINDS[kind]))
            def call(case):
                nonlocal num_requests
                num_requests += 1
                answer = case.call(timeout=60)
                assert answer.status_code < 500 or answer.status_code == 504, answer.text
                if answer.status_code >= 400 and answer.content:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

            if kind == "good" or operation.method == "post":
                call()
        counters = running.service.engine.counters
        assert counters.finished["error"] == 0
        print(f"{num_requests} requests, {dict(counters.finished)}")
    assert num_requests >= 6 * min(NUM_CASES, 2) and threading.active_count() <= num_threads + 8
