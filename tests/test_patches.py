"""The patch for vLLM 0.10.2, against that release's own files: a few ranges of its wheel."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import pytest
import torch

from packages import some_files

pytestmark = pytest.mark.timeout(180)

PATCH = Path(__file__).resolve().parents[1] / "patches" / "vllm_fp8.patch"
RELEASE = "0.10.2"
LAYERS = "vllm/model_executor/layers/"
QUANTIZATION = LAYERS + "quantization/"
UNPATCHED = [  # run as released; what is in neither list is replaced by a stand-in
    LAYERS + "fused_moe/layer.py",
    LAYERS + "linear.py",
    QUANTIZATION + "base_config.py",
    QUANTIZATION + "utils/flashinfer_utils.py",
    QUANTIZATION + "utils/fp8_utils.py",
    QUANTIZATION + "utils/quant_utils.py",
    QUANTIZATION + "utils/w8a8_utils.py",
    "vllm/model_executor/parameter.py",
    "vllm/model_executor/utils.py",
]
IMPORTED_IN_VAIN = {  # by those files, for what is not tested here
    "fastsafetensors",
    "filelock",
    "gguf",
    "huggingface_hub",
    "regex",
    "runai_model_streamer",
    "tqdm",
    "triton",
}


def patched_files() -> list[str]:
    return re.findall(r"^\+\+\+ b/(\S+)", PATCH.read_text(), re.MULTILINE)


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages folder with the released files that the patch is about."""
    folder = tmp_path_factory.mktemp("released")
    return some_files("vllm", RELEASE, patched_files() + UNPATCHED, folder)


@pytest.fixture(scope="session")
def patched(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patched") / "site-packages"
    shutil.copytree(released, folder)
    subprocess.run(["patch", "-p1", "-s", "-i", PATCH], cwd=folder, check=True, timeout=30)
    return folder


def output_of(command: list[str | Path], folder: Path) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_patch_applies_cleanly(released: Path) -> None:
    said = output_of(["patch", "-p1", "--dry-run", "-i", PATCH], released)
    assert "fuzz" not in said
    assert "offset" not in said


def test_git_applies_it_too(released: Path) -> None:
    assert "Skipped" not in output_of(["git", "apply", "--check", "--verbose", PATCH], released)


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports what is in ``folder``; every other module of ``packages`` holds mocks only.

    Names that look like classes become empty classes, as they are inherited from.
    """

    def __init__(self, folder: Path, packages: set[str]) -> None:
        self.folder = folder
        self.packages = packages

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in self.packages:
            return None
        file = self.folder / (name.replace(".", "/") + ".py")
        if file.exists():
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return MockModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def mocked_attribute(owner: Any, name: str) -> Any:
    if name.startswith("_") and not name.startswith("_custom"):
        raise AttributeError(name)
    is_class = re.match("[A-Z]+[a-z]", name)
    value = MockClass(name, (), {}) if is_class else mock.MagicMock()
    setattr(owner, name, value)
    return value


class MockClass(type):
    __getattr__ = mocked_attribute

    def __getitem__(cls, item: Any) -> Any:
        return cls


class MockModule(ModuleType):
    __getattr__ = mocked_attribute


class Vllm(NamedTuple):
    """The modules under test, and what their stand-ins can be told."""

    fp8: Any
    kv_cache: Any
    linear: Any
    mla: Any
    platform: mock.MagicMock
    envs: Any
    weight_utils: Any


@pytest.fixture
def vllm(patched: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vllm]:
    """The patched release on a pretended Hopper GPU without DeepGEMM."""
    mocked = {"vllm", *IMPORTED_IN_VAIN}
    before = dict(sys.modules)
    for name in [name for name in sys.modules if name.split(".")[0] in mocked]:
        del sys.modules[name]
    monkeypatch.setattr(sys, "meta_path", [StandIn(patched, mocked), *sys.meta_path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    try:
        yield import_patched()
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in mocked]:
            del sys.modules[name]
        sys.modules.update({n: m for n, m in before.items() if n.split(".")[0] in mocked})


def import_patched() -> Vllm:
    distributed: Any = importlib.import_module("vllm.distributed")
    distributed.get_tensor_model_parallel_rank = lambda: 0
    distributed.get_tensor_model_parallel_world_size = lambda: 1
    distributed.divide = lambda a, b: a // b
    importlib.import_module("vllm.model_executor.custom_op").CustomOp = CustomOp
    fused_moe: Any = importlib.import_module("vllm.model_executor.layers.fused_moe")
    rocm: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.rocm_aiter_fused_moe")
    rocm.is_rocm_aiter_moe_enabled = lambda: False
    rocm.shuffle_weights = lambda *weights: tuple(as_bytes(reverse, w) for w in weights)
    layer = importlib.import_module("vllm.model_executor.layers.fused_moe.layer")
    for name in ("FusedMoE", "FusedMoEMethodBase", "FusedMoeWeightScaleSupported"):
        setattr(fused_moe, name, getattr(layer, name))
    platform = importlib.import_module("vllm.platforms").current_platform
    for question in ("is_rocm", "is_xpu", "is_tpu", "is_fp8_fnuz"):
        getattr(platform, question).return_value = False
    platform.is_device_capability.side_effect = lambda capability: capability == 90
    envs: Any = importlib.import_module("vllm.envs")
    envs.VLLM_TEST_FORCE_FP8_MARLIN = envs.VLLM_USE_FLASHINFER_MOE_FP8 = False
    envs.VLLM_USE_DEEP_GEMM = envs.VLLM_ROCM_FP8_PADDING = False
    fp8: Any = importlib.import_module("vllm.model_executor.layers.quantization.fp8")
    fp8.Fp8LinearOp = mock.MagicMock()  # used without blocks only
    fp8.is_deep_gemm_e8m0_used = lambda: False
    fp8.should_use_deepgemm_for_fp8_linear = lambda *_: False
    return Vllm(
        fp8=fp8,
        kv_cache=importlib.import_module("vllm.model_executor.layers.quantization.kv_cache"),
        linear=importlib.import_module("vllm.model_executor.layers.linear"),
        mla=importlib.import_module("vllm.v1.attention.backends.mla.common"),
        platform=platform,
        envs=envs,
        weight_utils=importlib.import_module("vllm.model_executor.model_loader.weight_utils"),
    )


class CustomOp(torch.nn.Module):
    """vLLM's base of layers, without its choice of kernels."""

    @staticmethod
    def register(name: str) -> Callable[[type], type]:
        return lambda layer: layer


BLOCK = 16


def config_of(vllm: Vllm) -> Any:
    return vllm.fp8.Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[BLOCK, BLOCK])


def checkpoint(sizes: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A block-quantised weight and its scales, as they lie in files."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(sizes, generator=generator).to(torch.float8_e4m3fn)
    blocks = (sizes[0] // BLOCK, sizes[1] // BLOCK)
    return weight, torch.rand(blocks, generator=generator) + 0.01


class Qkv:
    """vLLM's own fused projection: three shards, loaded one by one."""

    SHARDS: ClassVar = {"q": 4 * BLOCK, "k": 2 * BLOCK, "v": 2 * BLOCK}
    HIDDEN = 512

    def __init__(self, vllm: Vllm) -> None:
        self.layer = vllm.linear.QKVParallelLinear(
            hidden_size=self.HIDDEN,
            head_size=BLOCK,
            total_num_heads=4,
            total_num_kv_heads=2,
            bias=False,
            quant_config=config_of(vllm),
            params_dtype=torch.bfloat16,
        )

    def load(self, seed: int, only: Iterable[str] = SHARDS) -> None:
        params = dict(self.layer.named_parameters())
        for shard in only:
            tensors = checkpoint((self.SHARDS[shard], self.HIDDEN), seed + self.SHARDS[shard])
            for name, tensor in zip(("weight", "weight_scale_inv"), tensors, strict=True):
                params[name].weight_loader(params[name], tensor, shard)


class MoE:
    """Experts of one rank, with vLLM's own loader; what chooses kernels is left out."""

    EXPERTS = 3
    HIDDEN = 4 * BLOCK
    INTERMEDIATE = 2 * BLOCK

    def __init__(self, vllm: Vllm) -> None:
        self.layer = layer = vllm.fp8.FusedMoE.__new__(vllm.fp8.FusedMoE)
        torch.nn.Module.__init__(layer)
        layer.quant_config = config_of(vllm)
        layer.moe_config = mock.MagicMock()
        layer.moe_parallel_config = mock.MagicMock(tp_rank=0, tp_size=1)
        layer.expert_map = None
        layer.local_num_experts = self.EXPERTS
        layer.quant_method = vllm.fp8.Fp8MoEMethod(layer.quant_config, layer)
        layer.quant_method.create_weights(
            layer,
            self.EXPERTS,
            self.HIDDEN,
            self.INTERMEDIATE,
            torch.bfloat16,
            weight_loader=layer.weight_loader,
        )

    def load(self, seed: int) -> None:
        params = dict(self.layer.named_parameters())
        rows, columns = self.INTERMEDIATE, self.HIDDEN
        for expert in range(self.EXPERTS):
            for shard in ("w1", "w2", "w3"):
                weight = "w2_weight" if shard == "w2" else "w13_weight"
                sizes = (columns, rows) if shard == "w2" else (rows, columns)
                seed += 1
                tensors = checkpoint(sizes, seed)
                for name, tensor in zip((weight, weight + "_scale_inv"), tensors, strict=True):
                    params[name].weight_loader(params[name], tensor, name, shard, expert)


def as_bytes(action: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """On the CPU torch cannot flip FP8."""
    return action(x.view(torch.uint8)).view(x.dtype) if x.element_size() == 1 else action(x)


def reverse(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1).contiguous()


def hopper(vllm: Vllm) -> None:
    """CUTLASS wants the scales of linear layers transposed."""


def deep_gemm_e8m0(vllm: Vllm) -> None:
    vllm.fp8.is_deep_gemm_e8m0_used = lambda: True
    vllm.fp8.should_use_deepgemm_for_fp8_linear = lambda *_: True
    deep_gemm: Any = importlib.import_module("vllm.utils.deep_gemm")
    deep_gemm.per_block_cast_to_fp8 = per_block_cast_to_fp8


def per_block_cast_to_fp8(
    x: torch.Tensor, block_size: list[int], use_ue8m0: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    (m, k), (block_m, block_k) = x.shape, block_size
    blocks = x.view(m // block_m, block_m, k // block_k, block_k)
    scales = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(dim=(1, 3)) / 448)))
    quantized = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return quantized.view(m, k), scales


def rocm_fnuz(vllm: Vllm) -> None:
    """Weights padded and in AMD's own format, so their scales are doubled."""
    vllm.platform.is_rocm.return_value = vllm.platform.is_fp8_fnuz.return_value = True
    vllm.platform.is_device_capability.side_effect = lambda capability: False
    vllm.envs.VLLM_ROCM_FP8_PADDING = True


def rocm_aiter(vllm: Vllm) -> None:
    """Experts are shuffled as well."""
    rocm_fnuz(vllm)
    rocm: Any = sys.modules["vllm.model_executor.layers.fused_moe.rocm_aiter_fused_moe"]
    rocm.is_rocm_aiter_moe_enabled = lambda: True


def flashinfer(vllm: Vllm) -> None:
    """The two halves of the experts' first matrix change places."""
    vllm.envs.VLLM_USE_FLASHINFER_MOE_FP8 = True
    vllm.fp8.get_flashinfer_moe_backend = mock.MagicMock()
    vllm.fp8.swap_w13_to_w31 = partial(as_bytes, vllm.fp8.swap_w13_to_w31)


def marlin(vllm: Vllm) -> None:
    """Ampere: weights and scales are repacked into others of another shape and type."""
    vllm.platform.has_device_capability.side_effect = lambda capability: capability < 89
    vllm.platform.is_device_capability.side_effect = lambda capability: False
    prepare: Any = importlib.import_module(
        "vllm.model_executor.layers.quantization.utils.marlin_utils_fp8"
    )
    prepare.marlin_make_workspace_new = lambda device, *_: torch.zeros(4, device=device)
    prepare.marlin_permute_scales = lambda s, **_: s.flip(0).contiguous()
    prepare.ops.gptq_marlin_repack = lambda b_q_weight, size_k, size_n, **_: b_q_weight.flip(
        0
    ).reshape(size_k // 16, size_n * 4)


MACHINES = [hopper, deep_gemm_e8m0, rocm_fnuz, rocm_aiter, flashinfer, marlin]
EVERYWHERE = [
    pytest.param(make, machine, id=f"{make.__name__}-{machine.__name__}")
    for make in (Qkv, MoE)
    for machine in MACHINES
]


def process(made: Qkv | MoE) -> None:
    made.layer.quant_method.process_weights_after_loading(made.layer)


def tensors_of(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the layer's kernels get: parameters, and Marlin's workspace."""
    plain = {name: value for name, value in vars(layer).items() if torch.is_tensor(value)}
    return {**dict(layer.named_parameters()), **plain}


def values_of(layer: torch.nn.Module) -> dict[str, bytes]:
    return {
        name: value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, value in tensors_of(layer).items()
    }


def fresh(vllm: Vllm, make: type[Qkv] | type[MoE], seed: int) -> dict[str, bytes]:
    made = make(vllm)
    made.load(seed)
    process(made)
    return values_of(made.layer)


@pytest.mark.parametrize(("make", "machine"), EVERYWHERE)
def test_second_load_equals_a_fresh_one_in_the_same_memory(
    vllm: Vllm, make: type[Qkv] | type[MoE], machine: Callable[[Vllm], None]
) -> None:
    machine(vllm)
    made = make(vllm)
    made.load(seed=0)
    process(made)
    first = tensors_of(made.layer)
    places = {name: (value.data_ptr(), value.stride()) for name, value in first.items()}
    assert fresh(vllm, make, seed=0) == values_of(made.layer) != fresh(vllm, make, seed=100)
    for is_loaded, seed in ((False, 0), (True, 100), (True, 200), (True, 0)):
        expected = fresh(vllm, make, seed)
        if is_loaded:
            made.load(seed)
        for _ in range(3):  # vLLM processes again where nothing was loaded
            process(made)
            again = tensors_of(made.layer)
            assert all(again[name] is first[name] for name in first)
            assert again.keys() == first.keys()
            assert {n: (value.data_ptr(), value.stride()) for n, value in again.items()} == places
            assert values_of(made.layer) == expected


@pytest.mark.parametrize("machine", [hopper, deep_gemm_e8m0, rocm_fnuz])
def test_part_of_a_layer_can_be_loaded_where_weights_keep_their_order(
    vllm: Vllm, machine: Callable[[Vllm], None]
) -> None:
    machine(vllm)
    whole, parts = Qkv(vllm), Qkv(vllm)
    for made in (whole, parts):
        made.load(seed=0)
        process(made)
    whole.load(seed=100)
    process(whole)
    for shards in (["q"], ["k", "v"]):
        parts.load(seed=100, only=shards)
        process(parts)
    torch.testing.assert_close(dequantized(parts.layer), dequantized(whole.layer), rtol=0, atol=0)


def dequantized(layer: torch.nn.Module) -> torch.Tensor:
    scales = layer.weight_scale_inv
    if scales.shape[1] == layer.weight.shape[0] // BLOCK:  # transposed
        scales = scales.T
    return layer.weight.float() * scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def test_weights_that_were_moved_are_loaded_where_they_are(vllm: Vllm) -> None:
    """CPU offloading gives the parameters other memory after each processing."""
    made = Qkv(vllm)
    for seed in (0, 100):
        made.load(seed)
        process(made)
        for param in made.layer.parameters():
            param.data = param.data.clone()
    assert values_of(made.layer) == fresh(vllm, Qkv, seed=100)


@pytest.mark.parametrize("machine", [hopper, marlin])
def test_no_weight_is_held_twice(vllm: Vllm, machine: Callable[[Vllm], None]) -> None:
    machine(vllm)
    made = Qkv(vllm)
    made.load(seed=0)
    process(made)
    assert made.layer.created_params["weight"].untyped_storage().nbytes() == 1


class Attention(torch.nn.Module):
    """What the KV cache's quantisation uses of vLLM's attention layer."""

    def __init__(self, vllm: Vllm, calculate: bool = False) -> None:
        super().__init__()
        self.kv_cache_dtype = "fp8"
        self.calculate_kv_scales = calculate
        for name in ("q", "k", "v", "prob"):
            setattr(self, f"_{name}_scale", torch.tensor(1.0))
            setattr(self, f"_{name}_scale_float", 1.0)
        self.quant_method = vllm.kv_cache.BaseKVCacheMethod(None)
        self.quant_method.create_weights(self)

    def load(self, **scales: float) -> None:
        params = dict(self.named_parameters())
        for name, scale in scales.items():
            params[f"{name}_scale"].data.copy_(torch.tensor(scale))
        self.quant_method.process_weights_after_loading(self)

    def used(self) -> list[float]:
        scales = (self._q_scale, self._k_scale, self._v_scale, self._prob_scale)
        return [round(float(scale), 4) for scale in scales]


@pytest.mark.parametrize("factor", [1, 2])
def test_kv_cache_scales_are_there_for_a_second_load(vllm: Vllm, factor: int) -> None:
    vllm.platform.is_fp8_fnuz.return_value = factor == 2
    layer = Attention(vllm)
    layer.load(q=0.5, k=0.25, v=0.125, prob=0.75)
    address = layer._k_scale.data_ptr()
    assert layer.used() == [0.5 * factor, 0.25 * factor, 0.125 * factor, 0.75 * factor]
    layer.load(q=1.5, k=1.25, v=1.125)
    expected = [1.5 * factor, 1.25 * factor, 1.125 * factor, 0.75 * factor]
    assert layer.used() == expected
    layer.load()
    assert layer.used() == expected
    assert layer._k_scale.data_ptr() == address


def test_calculated_kv_cache_scales_survive_a_load(vllm: Vllm) -> None:
    layer = Attention(vllm, calculate=True)
    layer.load()
    for name, scale in (("q", 0.5), ("k", 0.25), ("v", 0.125)):  # as calc_kv_scales does
        getattr(layer, f"_{name}_scale").fill_(scale)
        setattr(layer, f"_{name}_scale_float", scale)
    layer.calculate_kv_scales = False
    layer.load()
    assert layer.used() == [0.5, 0.25, 0.125, 1.0]


def test_dummy_weights_leave_kv_cache_scales_unset(vllm: Vllm) -> None:
    layer = Attention(vllm)
    layer.weight = torch.nn.Parameter(torch.zeros(8))
    vllm.weight_utils.initialize_dummy_weights(layer)
    assert layer.weight.abs().sum() > 0
    layer.load()
    assert layer.used() == [1.0] * 4


def test_absorbed_mla_projections_stay_in_place(vllm: Vllm) -> None:
    vllm.mla.is_rocm_aiter_fp8bmm_enabled = lambda: False
    impl, values = mock.MagicMock(), [torch.randn(8, 2 * 12) for _ in range(2)]
    attention = type("Impl", (), {})()
    attention.kv_lora_rank, attention.num_heads = 8, 2
    attention.qk_nope_head_dim, attention.v_head_dim = 5, 7
    attention.kv_b_proj = impl
    impl.input_size_per_partition = 8
    places = []
    for value in values:
        impl.weight = torch.zeros(1)
        impl.quant_method.apply.side_effect = lambda layer, x, bias, v=value: x @ v
        vllm.mla.MLACommonImpl.process_weights_after_loading(attention, torch.float32)
        uk, uv = value.view(8, 2, 12).split([5, 7], dim=-1)
        torch.testing.assert_close(attention.W_UV, uv.transpose(0, 1))
        torch.testing.assert_close(attention.W_UK_T, uk.permute(1, 2, 0))
        places.append((attention.W_UV.data_ptr(), attention.W_UK_T.data_ptr()))
    assert places[0] == places[1]
