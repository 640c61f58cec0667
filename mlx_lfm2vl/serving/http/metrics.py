"""Counters in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds to a first token
COUNTERS = {
    "requests_total": "requests by endpoint and status",
    "prompt_tokens_total": "positions of prompts, images included",
    "cached_tokens_total": "positions of prompts that were known already",
    "generated_tokens_total": "tokens of answers",
    "encoded_images_total": "images that went through the vision tower",
    "prefill_seconds_total": "seconds from an answer's beginning to its first token",
    "decode_seconds_total": "seconds from an answer's first token to its last",
}


class Metrics:
    """What has happened so far; only the event loop's thread counts."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.first_tokens: list[int] = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0

    def add(self, name: str, amount: float = 1, labels: str = "") -> None:
        """Counts something."""
        self.counts[name, labels] += amount  # type: ignore[assignment]

    def total(self, name: str) -> float:
        """What was counted under a name without labels."""
        return self.counts[name, ""]

    def first_token(self, seconds: float) -> None:
        """Notes how long somebody waited for a first token."""
        place = next((n for n, most in enumerate(BUCKETS) if seconds <= most), len(BUCKETS))
        self.first_tokens[place] += 1
        self.seconds += seconds

    def render(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All of it; gauges are (meaning, value) by name."""
        lines = []
        for name, meaning in COUNTERS.items():
            lines += _head(name, "counter", meaning)
            found = sorted((labels, n) for (key, labels), n in self.counts.items() if key == name)
            lines += [f"lfm2vl_{name}{labels} {n:.15g}" for labels, n in found or [("", 0)]]
        for name, (meaning, value) in gauges.items():
            lines += [*_head(name, "gauge", meaning), f"lfm2vl_{name} {value:.10g}"]
        name, so_far = "time_to_first_token_seconds", 0
        lines += _head(name, "histogram", "seconds from a request to its first token")
        for bound, count in zip((*BUCKETS, "+Inf"), self.first_tokens, strict=True):
            so_far += count
            lines.append(f'lfm2vl_{name}_bucket{{le="{bound}"}} {so_far}')
        lines += [f"lfm2vl_{name}_sum {self.seconds:.6g}", f"lfm2vl_{name}_count {so_far}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP lfm2vl_{name} {meaning}", f"# TYPE lfm2vl_{name} {kind}"]
