"""What a worker's load phase costs with the engine's loader, and with what was learned of it.

    python benchmarks/replay.py growth                 # cost per tensor, 1,000 to 100,000 tensors
    python benchmarks/replay.py update --layers 11     # whole updates into stacked experts
    python benchmarks/replay.py vllm --tp 2            # a real vLLM; in the environment that has it

``growth`` and ``update`` use a loader that stacks as vLLM's do; ``vllm`` its own, of a mixture of
experts whose tensors are so small that only Python is measured. Every figure is of the same run as
the one it is compared with, and everything loaded is compared bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import limits
import torch
from worker_process import WorkerProcess, device

from checkpoint_engine.data_types import align_up
from checkpoint_engine.replay import Replayed, replayed
from checkpoint_engine.worker import VllmColocateWorkerExtension, update_weights_from_ipc

Layout = list[tuple[str, tuple[int, ...]]]
EXPERTS = 128


def moe_layout(layers: int, hidden: int, inner: int, heads: int, kv_heads: int) -> Layout:
    """A Qwen3 mixture of experts: per layer 6 tensors and 3 for each of 128 experts, all bf16."""
    layout: Layout = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        layout += [
            (f"{prefix}.input_layernorm.weight", (hidden,)),
            (f"{prefix}.post_attention_layernorm.weight", (hidden,)),
            (f"{prefix}.self_attn.q_proj.weight", (heads, hidden)),
            (f"{prefix}.self_attn.k_proj.weight", (kv_heads, hidden)),
            (f"{prefix}.self_attn.v_proj.weight", (kv_heads, hidden)),
            (f"{prefix}.self_attn.o_proj.weight", (hidden, heads)),
        ]
        for expert in range(EXPERTS):
            of_expert = f"{prefix}.mlp.experts.{expert}"
            layout += [
                (f"{of_expert}.down_proj.weight", (hidden, inner)),
                (f"{of_expert}.gate_proj.weight", (inner, hidden)),
                (f"{of_expert}.up_proj.weight", (inner, hidden)),
            ]
    return layout


class StackedModel(torch.nn.Module):
    """Holds a mixture of experts as vLLM does: ``qkv``, and ``w13`` and ``w2`` over all experts.

    Its loader goes by names and by each parameter's ``weight_loader``, as vLLM's models do.
    """

    STACKED = (
        (".q_proj.", ".qkv.", "q"),
        (".k_proj.", ".qkv.", "k"),
        (".v_proj.", ".qkv.", "v"),
    )
    PARTS: ClassVar = {"gate_proj": ("w13", 0), "up_proj": ("w13", 1), "down_proj": ("w2", 0)}

    def __init__(self, layout: Layout, device: str) -> None:
        super().__init__()
        shapes = dict(layout)
        self._targets: dict[str, torch.nn.Parameter] = {}
        for name, shape in layout:
            if name.endswith("q_proj.weight"):
                rows = [
                    shapes[name.replace("q_proj", x)][0] for x in ("q_proj", "k_proj", "v_proj")
                ]
                qkv = self._add(name.replace("q_proj", "qkv"), (sum(rows), shape[1]), device)
                starts = dict(zip("qkv", (0, rows[0], rows[0] + rows[1]), strict=True))
                qkv.weight_loader = _stacked_loader(starts)
            elif ".experts.0." in name:
                self._add_experts(name, shape, device)
            elif ".experts." not in name and not name.endswith(("k_proj.weight", "v_proj.weight")):
                self._add(name, shape, device).weight_loader = _whole_loader

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            if ".experts." in name:
                prefix, _, rest = name.partition(".experts.")
                expert, part, _ = rest.split(".")
                stack, half = self.PARTS[part]
                target = f"{prefix}.experts.{stack}"
                parameter = self._targets[target]
                parameter.weight_loader(parameter, tensor, int(expert), half)
            else:
                for part, fused, shard in self.STACKED:
                    if part in name:
                        target = name.replace(part, fused)
                        parameter = self._targets[target]
                        parameter.weight_loader(parameter, tensor, shard)
                        break
                else:
                    target = name
                    parameter = self._targets[target]
                    parameter.weight_loader(parameter, tensor)
            loaded.add(target)
        return loaded

    def wrong(self, expected: dict[str, torch.Tensor]) -> list[str]:
        """The tensors of a checkpoint that are not in their places, bit for bit."""
        wrong = []
        for name, tensor in expected.items():
            if not torch.equal(
                self._place(name, tensor).cpu().view(torch.int16), tensor.view(torch.int16)
            ):
                wrong.append(name)
        return wrong

    def _place(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if ".experts." in name:
            prefix, _, rest = name.partition(".experts.")
            expert, part, _ = rest.split(".")
            stack, half = self.PARTS[part]
            whole = self._targets[f"{prefix}.experts.{stack}"].data[int(expert)]
            return whole[half * len(tensor) :][: len(tensor)]
        for part, fused, shard in self.STACKED:
            if part in name:
                qkv = self._targets[name.replace(part, fused)]
                end = len(qkv)
                start = {"q": 0, "k": end - 2 * len(tensor), "v": end - len(tensor)}[shard]
                return qkv.data[start : start + len(tensor)]
        return self._targets[name].data

    def _add(self, name: str, shape: tuple[int, ...], device: str) -> torch.nn.Parameter:
        data = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        parameter = torch.nn.Parameter(data, requires_grad=False)
        self.register_parameter(name.replace(".", "_"), parameter)
        self._targets[name] = parameter
        return parameter

    def _add_experts(self, name: str, shape: tuple[int, ...], device: str) -> None:
        prefix, part = name.split(".experts.0.")
        if part == "down_proj.weight":
            self._add(
                f"{prefix}.experts.w2", (EXPERTS, *shape), device
            ).weight_loader = _expert_loader
        elif part == "gate_proj.weight":
            w13 = (EXPERTS, 2 * shape[0], shape[1])
            self._add(f"{prefix}.experts.w13", w13, device).weight_loader = _expert_loader


def _whole_loader(parameter: torch.nn.Parameter, tensor: torch.Tensor) -> None:
    parameter.data.copy_(tensor)


def _stacked_loader(starts: dict[str, int]) -> Any:
    def load(parameter: torch.nn.Parameter, tensor: torch.Tensor, shard: str) -> None:
        parameter.data.narrow(0, starts[shard], tensor.shape[0]).copy_(tensor)

    return load


def _expert_loader(
    parameter: torch.nn.Parameter, tensor: torch.Tensor, expert: int, half: int
) -> None:
    data = parameter.data[expert]
    data.narrow(0, half * tensor.shape[0], tensor.shape[0]).copy_(tensor)


# ---------------------------------------------------------------------- buckets in one process


class Bucket:
    """Tensors one behind the other in a buffer, and the message that would announce them."""

    def __init__(self, layout: Layout, seed: int) -> None:
        self._layout, self._offsets, size = layout, [], 0
        for _, shape in layout:
            self._offsets.append(size)
            size += align_up(2 * torch.Size(shape).numel())
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randint(0, 2**14, (size // 2,), dtype=torch.int16, generator=generator)
        self.buffer = noise.view(torch.uint8)
        self.message = pickle.dumps(list(zip(layout, self._offsets, strict=True)))

    def weights(self) -> list[tuple[str, torch.Tensor]]:
        return [
            (
                name,
                self.buffer[at : at + 2 * torch.Size(shape).numel()]
                .view(torch.bfloat16)
                .view(shape),
            )
            for (name, shape), at in zip(self._layout, self._offsets, strict=True)
        ]


def growth(arguments: argparse.Namespace) -> None:
    """CPU time per tensor. Small tensors, as is the default: all of it is Python's."""
    print(
        f"{'tensors':>8} {'GB':>6} {'plain us':>9} {'first us':>9} {'second us':>10} "
        f"{'third us':>9} {'later us':>9} {'plan bytes':>11}"
    )
    _grow(1, arguments)  # what torch imports and keeps for it
    for layers in arguments.layers_of_growth:
        tensors, nbytes, plain, learned, plan = _grow(layers, arguments)
        first, second, third, *later = (seconds * 1e6 / tensors for seconds in learned)
        print(
            f"{tensors:8} {nbytes / 1e9:6.2f} {plain * 1e6 / tensors:9.2f} {first:9.2f} "
            f"{second:10.2f} {third:9.2f} {statistics.median(later):9.3f} {plan:11}",
            flush=True,
        )


def _grow(layers: int, arguments: argparse.Namespace) -> tuple[int, int, float, list[float], int]:
    """Tensors, bytes, CPU seconds of a plain load and of learned ones, the plan's bytes."""
    hidden, inner = arguments.hidden, arguments.inner
    layout = moe_layout(layers, hidden, inner, heads=2 * hidden, kv_heads=hidden // 2)
    bucket = Bucket(layout, seed=1)
    model = StackedModel(layout, "cpu")
    load = replayed(model.load_weights)
    plain = [_timed(model.load_weights, bucket.weights()) for _ in range(5)]
    learned = []
    for seed in range(3 + arguments.repeats):
        if seed:
            del bucket  # before there is another one
        bucket = Bucket(layout, seed)
        weights = [] if load.knows(bucket.message) else bucket.weights()
        learned.append(_timed(_load_and_finish, load, bucket, weights))
    assert load.report["replayed"] == len(layout), load.report
    wrong = model.wrong(dict(bucket.weights()))
    assert not wrong, wrong[:3]
    plan = load.report["plan_bytes"]
    return len(layout), bucket.buffer.numel(), statistics.median(plain), learned, plan


def _load_and_finish(
    load: Replayed, bucket: Bucket, weights: list[tuple[str, torch.Tensor]]
) -> None:
    if weights:
        load.load_bucket(weights, bucket.message, bucket.buffer)
    else:
        load.replay(bucket.message, bucket.buffer)
    weights.clear()
    load.finish()


def _timed(function: Any, *arguments: Any) -> float:
    began = time.process_time()
    function(*arguments)
    return time.process_time() - began


# ---------------------------------------------------------------------- whole updates


def update(arguments: argparse.Namespace) -> None:
    """One server rank and one worker process, plain and replayed in turns."""
    from checkpoint_engine.ps import ParameterServer

    os.environ["PS_MAX_BUCKET_SIZE_GB"] = f"{arguments.bucket_gb:g}"
    hidden, inner = arguments.hidden, arguments.inner
    layout = moe_layout(arguments.layers, hidden, inner, heads=2 * hidden, kv_heads=hidden // 4)
    worker = WorkerProcess(_Engine, layout)
    ps = ParameterServer(rank=0, world_size=1)
    total = 2 * sum(torch.Size(shape).numel() for _, shape in layout)
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    loading: dict[str, list[float]] = {"off": [], "on": []}
    tensors = _tensors(layout, seed=1)
    ps.register_checkpoint("benchmark", named_tensors=tensors)
    ps.gather_metas("benchmark")
    first: dict[str, list[float]] = {"off": [], "on": []}
    for turn in range(2 + arguments.repeats):
        for mode in seconds:
            spent: list[float] = []
            worker.call("clear")
            began = time.perf_counter()
            ps.update(
                "benchmark",
                lambda paths, mode=mode, spent=spent: spent.append(
                    worker.call("update", paths[0][1], mode)["seconds"]
                ),
            )
            took = time.perf_counter() - began
            wrong = worker.call("check", 1)
            if wrong:
                raise SystemExit(f"PS_REPLAY={mode}: {len(wrong)} tensors differ: {wrong[:3]}")
            if turn < 2:
                first[mode].append(took)
            else:
                seconds[mode].append(took)
                loading[mode] += spent
    report = worker.call("report")
    rate = limits.host_to_device()
    print(f"{len(layout)} tensors, {total / 1e9:.2f} GB; pinned host to device {rate:.1f} GB/s")
    plain = statistics.median(seconds["off"])
    for mode, how in (("off", "plain"), ("on", "recorded")):
        told = ", ".join(f"{s:.4f} s ({s / plain:.2f} plain ones)" for s in first[mode])
        print(f"first and second update, {how}: {told}")
    print(f"last report: {report}")
    rows = []
    for mode, how in (("off", "plain"), ("on", "replayed")):
        median = statistics.median(seconds[mode])
        own = statistics.median(loading[mode])
        share = total / 1e9 / median / rate
        rows.append({"how": how, "seconds": median, "loading": own, "of_copy_rate": share})
        print(
            f"{how:9} {median:8.4f} s  {total / 1e9 / median:7.2f} GB/s  {share:5.2f} of the copy "
            f"rate  loading {own:8.4f} s  n={len(seconds[mode])}"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"copy_rate": rate, "rows": rows}, indent=1))


def _tensors(layout: Layout, seed: int) -> dict[str, torch.Tensor]:
    """Random finite numbers; every tensor is another piece of them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 2**14, (9_000_000,), dtype=torch.int16, generator=generator)
    tensors = {}
    for place, (name, shape) in enumerate(layout):
        count = torch.Size(shape).numel()
        start = place * 7919 % (noise.numel() - count)
        tensors[name] = noise[start : start + count].view(torch.bfloat16).view(shape)
    return tensors


class _Engine:
    """What the worker's process serves."""

    def __init__(self, layout: Layout) -> None:
        self._model, self._layout = StackedModel(layout, device()), layout
        self._load = _TimedLoader(replayed(self._model.load_weights))

    def clear(self) -> None:
        """So that a tensor that is not loaded is noticed."""
        for parameter in self._model.parameters():
            parameter.data.zero_()

    def update(self, address: str, mode: str) -> dict[str, float]:
        import zmq

        os.environ["PS_REPLAY"] = mode
        self._load.seconds = 0.0
        with zmq.Context() as context:
            update_weights_from_ipc(context, address, 0, run=self._load)
        return {"seconds": self._load.seconds}

    def check(self, seed: int) -> list[str]:
        return self._model.wrong(_tensors(self._layout, seed))

    def report(self) -> dict[str, Any]:
        return self._load.loader.report


class _TimedLoader:
    """Counts the seconds that buckets take, until the device is done with them."""

    def __init__(self, loader: Replayed) -> None:
        self.loader = loader
        self.seconds = 0.0

    def __call__(self, weights: Any) -> None:
        self._time(self.loader, weights)

    def knows(self, message: bytes) -> bool:
        return self._time(self.loader.knows, message)

    def replay(self, message: bytes, buffer: torch.Tensor) -> None:
        self._time(self.loader.replay, message, buffer)

    def load_bucket(self, weights: Any, message: bytes, buffer: torch.Tensor) -> None:
        self._time(self.loader.load_bucket, weights, message, buffer)

    def finish(self) -> None:
        self._time(self.loader.finish)

    def abandon(self) -> None:
        self.loader.abandon()

    def _time(self, function: Any, *args: Any) -> Any:
        began = time.perf_counter()
        result = function(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - began
        return result


# ---------------------------------------------------------------------- a real vLLM


class TimedWorker(VllmColocateWorkerExtension):
    """A vLLM worker that reads a checkpoint itself and loads it as a bucket of an update."""

    def timed_update(self, folder: str, mode: str) -> dict[str, Any]:
        """Seconds of the load phase, and the worker's report."""
        from safetensors.torch import load_file

        from checkpoint_engine.loading.reload import EngineReload

        os.environ["PS_REPLAY"] = mode
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            tensors |= load_file(path)
        weights, message, buffer = _as_bucket(dict(sorted(tensors.items(), key=_natural)))
        reload = EngineReload(self, self.__dict__.setdefault("_loader_habits", {}))
        try:
            began = time.perf_counter()
            if reload.knows(message):
                reload.replay(message, buffer)
            else:
                reload.load_bucket(weights, message, buffer)
            loaded = time.perf_counter()
            weights.clear()
            reload.finish()
            return {
                "load": loaded - began,
                "finish": time.perf_counter() - loaded,
                "report": reload.summary()["model"],
            }
        finally:
            reload.close()

    def digest(self) -> str:
        """Of every parameter and buffer."""
        digest = hashlib.sha256()
        model = self.model_runner.model
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.numel():
                flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
                digest.update(name.encode() + flat.numpy().tobytes())
        return digest.hexdigest()


def _natural(item: tuple[str, Any]) -> Any:
    from checkpoint_engine.memory.sources import natural_key

    return natural_key(item[0])


def _as_bucket(
    tensors: dict[str, torch.Tensor],
) -> tuple[list[tuple[str, torch.Tensor]], bytes, torch.Tensor]:
    buffer = torch.empty(sum(align_up(t.nbytes) for t in tensors.values()), dtype=torch.uint8)
    weights, places, at = [], [], 0
    for name, tensor in tensors.items():
        part = buffer[at : at + tensor.nbytes]
        part.copy_(tensor.reshape(-1).view(torch.uint8))
        weights.append((name, part.view(tensor.dtype).view(tensor.shape)))
        places.append((name, str(tensor.dtype), tuple(tensor.shape), at))
        at += align_up(tensor.nbytes)
    return weights, pickle.dumps(places), buffer


def vllm(arguments: argparse.Namespace) -> None:
    """The mixture of experts of the issue, and the shares that the workers need of every model."""
    here = Path(__file__).resolve().parent
    tests = here.parent / "tests" / "with_vllm"
    paths = [str(here), str(here.parent), str(tests), os.environ.get("PYTHONPATH", "")]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
        "PS_DEVICE": "cpu",
    }
    sys.path.insert(0, str(tests))
    from certified_models import CI, MODELS, write

    tiny = MODELS["qwen3-moe"]
    size = {"num_hidden_layers": arguments.layers_of_vllm, "num_experts": EXPERTS}
    MODELS["large"] = replace(tiny, options={**tiny.options, **size, "moe_intermediate_size": 16})
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        large = [write("large", Path(folder) / f"large-{seed}", seed) for seed in (1, 2)]
        _time_loading(large, arguments.tp, arguments.repeats)
        for kind, _ in dict(CI).items() if arguments.shares else ():
            _show_shares(kind, write(kind, Path(folder) / kind), arguments.tp)


def _time_loading(folders: list[Path], tp: int, repeats: int) -> None:
    expected = []
    for folder in folders:
        engine = _engine(folder, tp)
        expected.append(_tokens(engine))
        engine.llm_engine.engine_core.shutdown()
    assert expected[0] != expected[1]
    engine = _engine(folders[0], tp, load_format="dummy")
    seconds: dict[str, list[tuple[float, float]]] = {"off": [], "on": []}
    digests: dict[int, Any] = {}
    for mode in seconds:
        for turn in range(2 + repeats):  # the first two record
            which = turn % 2
            answers = engine.collective_rpc("timed_update", args=(str(folders[which]), mode))
            found = digests.setdefault(which, engine.collective_rpc("digest"))
            assert found == engine.collective_rpc("digest"), "not the same bits"
            assert _tokens(engine) == expected[which], "not the tokens of a fresh start"
            if turn > 1:
                seconds[mode] += [(a["load"], a["finish"]) for a in answers]
            else:
                print(
                    f"TP {tp}, {mode}, update {turn}: load {answers[0]['load']:.4f} s", flush=True
                )
    tensors = answers[0]["report"]["tensors"]
    assert all(a["report"]["replay"]["replayed"] == tensors for a in answers), answers
    load = {mode: statistics.median(load for load, _ in some) for mode, some in seconds.items()}
    whole = {mode: statistics.median(map(sum, some)) for mode, some in seconds.items()}
    for mode, how in (("off", "plain"), ("on", "replayed")):
        print(
            f"TP {tp}, {tensors} tensors, {how:9} load {load[mode]:.4f} s = "
            f"{load[mode] / tensors * 1e6:.2f} us per tensor; "
            f"with the engine's end {whole[mode]:.4f} s"
        )
    print(f"TP {tp}: plain / replayed {load['off'] / load['on']:.1f}", flush=True)
    engine.llm_engine.engine_core.shutdown()


def _show_shares(kind: str, folder: Path, tp: int) -> None:
    engine = _engine(folder, tp, load_format="dummy")
    answers = engine.collective_rpc("timed_update", args=(str(folder), "on"))
    for rank, answer in enumerate(answers):
        report = answer["report"]["replay"]
        print(
            f"{kind}, worker {rank} of {tp}: needs {report['needed_bytes']} bytes of "
            f"{report['needed_tensors']} tensors, {report['needed_share']:.3f} of the checkpoint; "
            f"plan {report['plan_bytes']} bytes",
            flush=True,
        )
    engine.llm_engine.engine_core.shutdown()


def _engine(folder: Path, tp: int, **options: Any) -> Any:
    from vllm import LLM

    return LLM(
        str(folder),
        tensor_parallel_size=tp,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        disable_log_stats=True,
        worker_extension_cls="replay.TimedWorker",
        **options,
    )


def _tokens(engine: Any) -> list[int]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    prompt = TokensPrompt(prompt_token_ids=[3, 5, 7, 9])
    (output,) = engine.generate([prompt], greedy, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for command in (growth, update, vllm):
        one = commands.add_parser(command.__name__, help=command.__doc__)
        one.set_defaults(command=command)
        one.add_argument("--repeats", type=int, default=5)
        if command is growth:
            one.add_argument("--hidden", type=int, default=16)
            one.add_argument("--inner", type=int, default=8, help="of an expert")
            layers = [3, 13, 52, 257]
            one.add_argument(
                "--layers", dest="layers_of_growth", type=int, nargs="+", default=layers
            )
        elif command is update:
            one.add_argument("--layers", type=int, default=1)
            one.add_argument("--hidden", type=int, default=2048)
            one.add_argument("--inner", type=int, default=768, help="of an expert")
            one.add_argument("--bucket-gb", type=float, default=2.0)
            one.add_argument("--json", help="write the table there too")
        else:
            one.add_argument("--tp", type=int, default=1)
            one.add_argument("--layers", dest="layers_of_vllm", type=int, default=8)
            one.add_argument(
                "--shares", action="store_true", help="also of every model of the tests"
            )
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    main()
