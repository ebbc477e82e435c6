"""Metrics in Prometheus' text form, with vLLM's names, so that its dashboards show this server.

The four that llm-d's scheduler needs are among them: requests that wait and that run, cache usage, and the
block size, a label of vllm:cache_config_info.  Everything is read at each scrape: engine and cache count, and
this file gives the counts their names.

Imports prometheus_client (the extra `serve`) and service.
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from ..serving.counters import Histogram
from .service import Service

#: (name, what it is), histograms of Counters.
HISTOGRAMS = {
    "time_to_first_token_seconds": ("first_token_seconds", "From a request's arrival to its first token."),
    "inter_token_latency_seconds": ("token_seconds", "Between two tokens of a sample."),
    "time_per_output_token_seconds": ("token_seconds", "The same, by its older name."),
    "e2e_request_latency_seconds": ("request_seconds", "From a request's arrival to its end."),
    "request_queue_time_seconds": ("queue_seconds", "From a request's arrival to its first step."),
    "request_prefill_time_seconds": ("prefill_seconds", "From a request's first step to its first token."),
    "request_decode_time_seconds": ("decode_seconds", "From a request's first token to its end."),
    "request_inference_time_seconds": ("inference_seconds", "From a request's first step to its end."),
    "request_params_n": ("num_samples", "Samples of a request."),
    "request_max_num_generation_tokens": ("max_tokens", "New tokens that a request may have."),
    "request_prompt_tokens": ("prompt_tokens", "Prompt tokens of a request."),
    "request_generation_tokens": ("new_tokens", "New tokens of a request."),
}


#: vLLM's labels; there is one engine.
LABELS, ENGINE = ("model_name", "engine"), "0"


class Metrics:
    """The metrics of one service, in a registry of its own."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, service: Service) -> None:
        self._service, self._registry = service, CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """All metrics of now."""
        text: bytes = generate_latest(self._registry)
        return text

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        engine, label = self._service.engine, self._service.name
        counters, report, stats = engine.counters, engine.report, engine.cache.stats()
        used = stats.num_used_pages
        gauges = {
            "num_requests_running": (engine.num_running, "Samples that run."),
            "num_requests_waiting": (engine.num_waiting, "Requests that wait."),
            "kv_cache_usage_perc": (used / stats.num_pages, "Pages that sequences hold, of all; 1 is full."),
            "gpu_cache_usage_perc": (used / stats.num_pages, "The same, by its older name."),
        }
        for name, (value, text) in gauges.items():
            yield _gauge(f"vllm:{name}", text, value, label)
        counts = {
            "prompt_tokens": (counters.num_prompt_tokens, "Prompt tokens of requests that are done."),
            "generation_tokens": (counters.num_new_tokens, "New tokens."),
            "num_preemptions": (report.num_preemptions, "Requests that were sent back to wait."),
            "prefix_cache_queries": (stats.num_queried_tokens, "Prompt tokens that were looked up."),
            "prefix_cache_hits": (stats.num_hit_tokens, "Of these, those that were found."),
            "admission_rejections": (counters.num_refused, "Requests that found the queue full."),
            "request_prefill_kv_computed_tokens": (report.num_prompt_tokens, "Prompt tokens computed."),
        }
        for name, (value, text) in counts.items():
            yield _counter(f"vllm:{name}", text, value, label)
        success = CounterMetricFamily(
            "vllm:request_success", "Samples by how they ended.", labels=[*LABELS, "finished_reason"]
        )
        for reason in ("stop", "length", "cancelled", "timeout", "error"):
            vllm_name = {"cancelled": "abort"}.get(reason, reason)
            success.add_metric([label, ENGINE, vllm_name], counters.finished[reason])
        yield success
        for name, (field, text) in HISTOGRAMS.items():
            yield _histogram(f"vllm:{name}", text, getattr(counters, field), label)
        config = InfoMetricFamily("vllm:cache_config", "How the cache was built.")
        config.add_metric(
            [],
            {
                "block_size": str(engine.cache.page_size),
                "num_gpu_blocks": str(stats.num_pages),
                "enable_prefix_caching": str(engine.cache.prefix_caching),
                "engine": ENGINE,
            },
        )
        yield config
        pages = GaugeMetricFamily("paged_kv:pages", "Pages of the pool by state.", labels=["state"])
        for state, count in {
            "used": used,
            "pinned": stats.num_pinned_pages,
            "kept": stats.num_kept_pages,
            "free": stats.num_free_pages,
        }.items():
            pages.add_metric([state], count)
        yield pages
        yield _gauge("paged_kv:utilization", "Tokens over the slots of used pages.", stats.utilization, label)
        yield _counter("paged_kv:evictions", "Cached pages that gave way.", stats.num_evictions, label)
        yield _counter(
            "paged_kv:bytes_saved", "Of keys and values that were found.", stats.bytes_saved, label
        )
        misses = CounterMetricFamily(
            "paged_kv:prefix_cache_misses", "Prompts that were not found whole, by reason.", labels=["reason"]
        )
        for reason, count in stats.misses.items():
            misses.add_metric([reason], count)
        yield misses


def _gauge(name: str, text: str, value: float, label: str) -> Any:
    family = GaugeMetricFamily(name, text, labels=LABELS)
    family.add_metric([label, ENGINE], value)
    return family


def _counter(name: str, text: str, value: float, label: str) -> Any:
    family = CounterMetricFamily(name, text, labels=LABELS)
    family.add_metric([label, ENGINE], value)
    return family


def _histogram(name: str, text: str, histogram: Histogram, label: str) -> Any:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    family = HistogramMetricFamily(name, text, labels=LABELS)
    family.add_metric([label, ENGINE], list(zip(bounds, histogram.cumulative, strict=True)), histogram.sum)
    return family
