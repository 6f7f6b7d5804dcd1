"""Updates of real vLLM engines: greedy tokens equal those of a fresh start from the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import EngineHost
from torchrun import torchrun

SMALLER_THAN_A_LAYER, EVERYTHING = "1e-4", "1"  # GiB; a layer has 0.3 to 0.5 MB
PROGRAMS = "with_vllm/vllm_programs.py"
CPU = {"PS_DEVICE": "cpu"}


@pytest.mark.timeout(300)
def test_tokens_are_those_of_a_fresh_start(
    engine_host: EngineHost,
    models: dict[str, Path],
    sources: dict[tuple[str, int], Path],
    tmp_path: Path,
) -> None:
    """There and back again: from sources of 1, 2 and 3 ranks, and from the servers' own memory.
    ``test_certify.py`` has other models, by broadcast.

    The engine that is updated was started with the second checkpoint, so that what the first
    update leaves alone is wrong. What is replayed leaves the workers with the bits that a plain
    load leaves them with.
    """
    first, second, tp = "dense-1", "dense-2", 2
    expected = {n: engine_host.tokens_of_a_fresh_start(models[n], tp) for n in (first, second)}
    assert expected[first] != expected[second]
    steps = [
        {"name": name, origin: path, "bucket_gb": bucket_gb, "replay": replay}
        for name, origin, path, bucket_gb, replay in (
            (first, "metas", str(sources[first, 1]), EVERYTHING, "off"),
            (second, "model", str(models[second]), SMALLER_THAN_A_LAYER, "off"),
            (first, "metas", str(sources[first, 1]), SMALLER_THAN_A_LAYER, "on"),
            (second, "metas", str(sources[second, 2]), EVERYTHING, "on"),
            (first, "metas", str(sources[first, 3]), SMALLER_THAN_A_LAYER, "on"),
            (second, "model", str(models[second]), SMALLER_THAN_A_LAYER, "verify"),
            (first, "model", str(models[first]), EVERYTHING, "verify"),
        )
    ]
    how = ["plain", "plain", "recorded", "recorded", "replayed", "verified", "replayed"]
    ranks = torchrun(
        tmp_path, tp, "updates", 150, CPU, script=PROGRAMS, url=engine_host.url, steps=steps
    )
    plain = {step["name"]: seen["digests"] for step, seen in zip(steps[:2], ranks[0], strict=False)}
    for step, seen, loaded in zip(steps, ranks[0], how, strict=True):
        assert seen["tokens"] == expected[step["name"]], (step, engine_host.output())
        assert seen["digests"] == plain[step["name"]], step
        for worker in seen["results"]:
            assert worker["model"]["missing"] == []
            assert worker["model"]["unused"] == []
            replay = worker["model"]["replay"]
            assert replay["loaded"] == loaded, replay
            assert loaded == "plain" or replay["reason"] == ""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("has_graphs", [True, False])
def test_what_helpers_of_layers_hold_stays_where_graphs_have_captured_it(
    engine_host: EngineHost, models: dict[str, Path], tmp_path: Path, has_graphs: bool
) -> None:
    """As the packed weights of vLLM's layers for CPUs, which each update makes anew."""
    first, second = "dense-1", "dense-2"
    expected = {n: engine_host.tokens_of_a_fresh_start(models[n], 1) for n in (first, second)}
    engine_host.start(models[first], 1, has_graphs=has_graphs)
    steps = [
        {
            "name": name,
            "model": str(models[name]),
            "bucket_gb": SMALLER_THAN_A_LAYER,
            "replay": "on",
        }
        for name in (second, first, second, first)
    ]
    (seen,) = torchrun(
        tmp_path, 1, "updates", 100, CPU, script=PROGRAMS, url=engine_host.url, steps=steps
    )
    for step, one in zip(steps, seen, strict=True):
        assert one["tokens"] == expected[step["name"]], engine_host.output()
    handlers = [
        {name: place for name, place in one["held"][0].items() if "handler" in name} for one in seen
    ]
    assert len(handlers[0]) > 4
    assert all(one == handlers[0] for one in handlers) is has_graphs


@pytest.mark.timeout(120)
@pytest.mark.parametrize("loads_early", [True, False])
def test_layer_order_leaves_little_to_hold(
    engine_host: EngineHost, models: dict[str, Path], tmp_path: Path, loads_early: bool
) -> None:
    """What had to be loaded before its layer was complete; the tokens are right all the same."""
    expected = engine_host.tokens_of_a_fresh_start(models["dense-2"], 1)
    engine_host.start(models["dense-1"], 1, loads_early=loads_early)
    options = {"model": str(models["dense-2"]), "bucket_bytes": 131072}
    (seen,) = torchrun(
        tmp_path, 1, "orders", 60, CPU, script=PROGRAMS, url=engine_host.url, **options
    )
    reports = {order: seen[order]["results"][0]["model"] for order in seen}
    for order, report in reports.items():
        print(f"{order}: {report['held_bytes']} of {report['bytes']} bytes held")
        assert seen[order]["tokens"] == expected
    assert reports["layers"]["held_bytes"] < 0.2 * reports["layers"]["bytes"]
    assert reports["layers"]["held_bytes"] < reports["shuffled"]["held_bytes"]
