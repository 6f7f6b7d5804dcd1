from __future__ import annotations

from checkpoint_engine.ground.report import Stage, UpdateReport


def report(by_rank: dict[int, dict[str, float]]) -> UpdateReport:
    return UpdateReport(
        checkpoint_name="c",
        rank=0,
        world_size=3,
        tensors=3,
        buckets=1,
        bucket_bytes=256,
        bytes=2_000_000_000,
        seconds=2.0,
        phases={"plan": 0.5, "reload": 1.0, "comparison": 0.5},
        by_rank=by_rank,
    )


def test_the_slowest_rank_is_the_one_beyond_the_others_in_a_phase() -> None:
    spent = {rank: {"transfer": 1.0, "reload": 1.0} for rank in range(3)}
    spent[1]["reload"] = 1.5
    spent[2]["transfer"] = 1.1
    assert report(spent).slowest == (1, "reload", 0.5)
    assert "slowest: rank 1 in reload, 0.5000 s" in report(spent).table()


def test_a_phase_that_only_some_ranks_had_counts_as_none_for_the_others() -> None:
    spent = {0: {"plan": 1.0}, 1: {"plan": 1.0}, 2: {"plan": 1.0, "process group": 2.0}}
    assert report(spent).slowest == (2, "process group", 2.0)


def test_rates_only_where_bytes_move() -> None:
    lines = {line.split()[0]: line for line in report({}).table().splitlines()[1:]}
    assert "2.00 GB/s" in lines["reload"]
    assert "GB/s" not in lines["plan"]
    assert "50.0%" in lines["reload"]


def test_it_survives_json() -> None:
    made = report({0: {"plan": 0.5}})
    assert UpdateReport.model_validate_json(made.model_dump_json()) == made


def test_the_rank_that_the_others_waited_for() -> None:
    waits = {0: {0: 9.0, 1: 0.5, 2: 0.1}, 1: {2: 0.2}, 2: {1: 1.5}}
    made = report({}).model_copy(update={"waited_for_by_rank": waits})
    assert made.most_waited_for == (1, 1.0)
    assert "most waited for: rank 1, 1.0000 s by each other rank" in made.table()
    assert report({}).most_waited_for is None


def test_the_table_says_what_host_memory_is_held() -> None:
    made = report({}).model_copy(
        update={"checkpoint_memory": 1_500_000_000, "retained_memory": 250_000_000}
    )
    last = made.table().splitlines()[-1]
    assert last == "host memory: 1.500 GB of checkpoints, 0.250 GB kept for later ones"


def test_stages_have_rates() -> None:
    stages = {"broadcast": Stage(bytes=2_000_000_000, seconds=0.5)}
    table = report({}).model_copy(update={"stages": stages}).table().splitlines()
    line = table[table.index("stages, which overlap:") + 1]
    assert line.split() == ["broadcast", "0.5000", "s", "4.00", "GB/s"]
