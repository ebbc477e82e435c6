"""Metrics: what dashboards made for vLLM query is there."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from running import NAME, served

#: Samples that the dashboards query; each with the labels by which they select or group.
#: Sources: vLLM, examples/online_serving/prometheus_grafana/grafana.json; Grafana's dashboard 25591;
#: the model server protocol of Kubernetes' inference gateway, which llm-d's scheduler reads.
QUERIED = {
    **{
        f"vllm:{name}_{part}": {"model_name"}
        for name in (
            "e2e_request_latency_seconds",
            "time_per_output_token_seconds",
            "inter_token_latency_seconds",
            "time_to_first_token_seconds",
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "request_inference_time_seconds",
            "request_prompt_tokens",
            "request_generation_tokens",
            "request_max_num_generation_tokens",
        )
        for part in ("bucket", "sum", "count")
    },
    "vllm:num_requests_running": {"model_name"},
    "vllm:num_requests_waiting": {"model_name"},
    "vllm:kv_cache_usage_perc": {"model_name"},
    "vllm:gpu_cache_usage_perc": {"model_name"},
    "vllm:prompt_tokens_total": {"model_name"},
    "vllm:generation_tokens_total": {"model_name"},
    "vllm:prefix_cache_queries_total": {"model_name"},
    "vllm:prefix_cache_hits_total": {"model_name"},
    "vllm:num_preemptions_total": {"model_name"},
    "vllm:request_success_total": {"model_name", "finished_reason"},
    "vllm:cache_config_info": {"block_size", "num_gpu_blocks"},
}
#: Those that are 0 when nothing waits, runs or was preempted.
MAY_BE_ZERO = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:num_preemptions_total",
}


@pytest.fixture(scope="module")
def samples():
    with served() as running, httpx.Client(base_url=running.url, timeout=30) as client:
        for _ in range(3):
            body = {"prompt": "Hello" * 9, "max_tokens": 12, "n": 2, "temperature": 1}
            assert client.post("/v1/completions", json=body).status_code == 200
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        families = list(text_string_to_metric_families(answer.text))
    return [sample for family in families for sample in family.samples]


@pytest.mark.parametrize("name", QUERIED)
def test_a_dashboard_that_was_made_for_vllm_finds_its_metrics(samples, name):
    found = [sample for sample in samples if sample.name == name]
    assert found and all(QUERIED[name] <= set(sample.labels) for sample in found)
    if "model_name" in QUERIED[name]:
        assert {sample.labels["model_name"] for sample in found} == {NAME}
    if name not in MAY_BE_ZERO:
        assert sum(sample.value for sample in found) > 0


def test_counts_are_those_of_the_requests(samples):
    values = {sample.name: sample.value for sample in samples}
    assert values["vllm:generation_tokens_total"] == values["vllm:request_generation_tokens_sum"] <= 72
    assert values["vllm:prompt_tokens_total"] == 3 * 45
    assert values["vllm:prefix_cache_queries_total"] == 3 * 45
    assert values["vllm:prefix_cache_hits_total"] == 2 * 44
    reasons = {
        s.labels["finished_reason"]: s.value for s in samples if s.name == "vllm:request_success_total"
    }
    assert sum(reasons.values()) == 6 and reasons["abort"] == reasons["error"] == 0
    states = {s.labels["state"]: s.value for s in samples if s.name == "paged_kv:pages"}
    assert states["used"] + states["kept"] + states["free"] == 512


def test_buckets_are_cumulative_and_end_with_the_count(samples):
    name = "vllm:e2e_request_latency_seconds"
    buckets = [sample.value for sample in samples if sample.name == f"{name}_bucket"]
    (count,) = [sample.value for sample in samples if sample.name == f"{name}_count"]
    assert buckets == sorted(buckets) and buckets[-1] == count == 3
