"""What the benchmarks measure is what they say: their registry is sound, and its last rule decides."""

from bench.routing import routing_us


def test_routing_is_measured_on_a_sound_registry() -> None:
    """A few requests of the benchmark; how long they take is not this test's matter."""
    assert routing_us(requests=100)["value"] > 0
