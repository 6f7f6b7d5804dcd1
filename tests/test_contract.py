"""What programs written for the original's releases 0.2 and 0.4 import, patch, call and expect."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from checkpoint_engine import data_types, ps
from checkpoint_engine.device_utils import DeviceManager

HERE = Path(__file__).parent


def cases(name: str) -> list[dict[str, Any]]:
    return json.loads((HERE / "contract" / name).read_text())["cases"]


# ---------------------------------------------------------------------- the contract files


@pytest.mark.parametrize("case", cases("hca_cases.json"), ids=lambda case: repr(case["value"]))
def test_hca_cases(case: dict[str, Any]) -> None:
    with patch("checkpoint_engine.ps.logger") as logger:
        found = ps._parse_NCCL_IB_HCA(case["value"], case["available"])
    assert found == case["expected"]
    if case["warning"] is not None:
        logger.warning.assert_called_once_with(case["warning"])


@pytest.mark.parametrize("case", cases("receiver_cases.json"))
def test_receiver_cases(case: dict[str, Any]) -> None:
    def topology(of: dict[str, list[int]]) -> dict[str, set[int]]:
        return {nic: set(ranks) for nic, ranks in of.items()}

    buckets = [tuple(bucket) for bucket in case["buckets"]]
    assigned = ps._assign_receiver_ranks(
        buckets, topology(case["local_topo"]), topology(case["remote_topo"])
    )
    assert set(assigned) == {tuple(entry) for entry in case["expected"]}
    assert len(assigned) == len(buckets)


# ---------------------------------------------------------------------- where names live

NAMES = {
    "checkpoint_engine": "__version__ ParameterServer P2PStore request_inference_to_update "
    "update_weights_from_ipc VllmColocateWorkerExtension FlattenedTensorMetadata ParameterMeta "
    "BucketRange H2DBucket MemoryBufferMetas MemoryBuffer MemoryBufferMetaList DataToGather "
    "DeviceManager get_ip npu_generate_uuid",
    "checkpoint_engine.ps": "ParameterServer P2PStore request_inference_to_update ParameterMeta "
    "BucketRange H2DBucket MemoryBufferMetas MemoryBuffer MemoryBufferMetaList DataToGather "
    "_assign_receiver_ranks _gen_h2d_buckets _to_named_tensor _get_physical_gpu_id "
    "_get_rdma_devices _get_my_rdma_device _ibv_get_device_list _parse_NCCL_IB_HCA "
    "_get_master_port _get_bcast_rank_map _align_size _init_api run_from_cli logger",
    "checkpoint_engine.worker": "update_weights_from_ipc VllmColocateWorkerExtension "
    "FlattenedTensorMetadata",
    "checkpoint_engine.data_types": "ParameterMeta BucketRange H2DBucket MemoryBufferMetas "
    "MemoryBuffer MemoryBufferMetaList DataToGather",
    "checkpoint_engine.device_utils": "DeviceManager get_ip npu_generate_uuid _get_rdma_devices "
    "_get_my_rdma_device _ibv_get_device_list _parse_NCCL_IB_HCA logger",
    "checkpoint_engine.p2p_store": "P2PStore _get_rdma_devices _get_my_rdma_device "
    "_ibv_get_device_list _parse_NCCL_IB_HCA logger",
    "checkpoint_engine.api": "request_inference_to_update _init_api",
    "checkpoint_engine.distributed": "init_process_group destroy_process_group is_initialized "
    "all_gather_object all_reduce broadcast barrier new_group use_backend",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_callers_import_them(module: str) -> None:
    imported = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(imported, name)] == []


def test_a_name_in_two_modules_is_one_thing() -> None:
    package = importlib.import_module("checkpoint_engine")
    api = importlib.import_module("checkpoint_engine.api")
    assert package.ParameterServer is ps.ParameterServer
    assert package.H2DBucket is ps.H2DBucket is data_types.H2DBucket
    assert api.request_inference_to_update is ps.request_inference_to_update
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = package.nonsense


# ---------------------------------------------------------------------- signatures

SIGNATURES = {
    "__init__": "(self, *, rank=None, world_size=None, auto_pg=None, gpu_count=None, "
    "mem_fraction=None, master_addr=None, master_port=None)",
    "register_checkpoint": "(self, checkpoint_name, *, files=None, named_tensors=None, "
    "use_shared_memory_pool=False, use_inplace_pin_memory=False)",
    "unregister_checkpoint": "(self, checkpoint_name, force=False)",
    "gather_metas": "(self, checkpoint_name)",
    "get_metas": "(self)",
    "load_metas": "(self, metas)",
    "init_process_group": "(self, *, master_addr=None, master_port=None, "
    f"timeout={timedelta(minutes=10)!r})",
    "init_process_group_for_ranks": "(self, ranks, *, master_port=None, "
    f"timeout={timedelta(minutes=10)!r})",
    "store_based_barrier": f"(self, timeout={timedelta(minutes=5)!r})",
    "update": "(self, checkpoint_name, req_func, *, ranks=None, "
    f"timeout={timedelta(minutes=10)!r})",
    "_copy_to_buffer": "(self, checkpoint_name, bucket, buffer, owner_rank=None)",
    "_bind_zmq_socket": "(self)",
}


OURS = {
    "register_checkpoint": ["on_progress"],
    "gather_metas": ["timeout"],
    "update": ["version", "on_instance_failure", "on_progress", "compare_ranks", "trace"],
}
"""What the original's methods do not take: by keyword alone, and never needed."""


def plain(function: Any, without: Sequence[str] = ()) -> str:
    parameters = inspect.signature(function).parameters
    bare = [
        p.replace(annotation=inspect.Parameter.empty)
        for name, p in parameters.items()
        if name not in without
    ]
    return str(inspect.Signature(bare))


@pytest.mark.parametrize("method", SIGNATURES)
def test_methods_take_what_callers_pass(method: str) -> None:
    function, ours = getattr(ps.ParameterServer, method), OURS.get(method, [])
    assert plain(function, ours) == SIGNATURES[method]
    for name in ours:
        parameter = inspect.signature(function).parameters[name]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty


def test_functions_take_what_callers_pass() -> None:
    assert plain(ps.request_inference_to_update) == "(url, socket_paths, timeout=300.0, uds=None)"
    assert plain(ps._gen_h2d_buckets) == (
        "(global_metas, bucket_size, local_topo, remote_topo, ranks=None)"
    )
    worker = importlib.import_module("checkpoint_engine.worker")
    for call in (  # SGLang, and the original's own caller
        {"device_id": 0, "run": print, "post_hook": print},
        {"device_id": 0, "run": print},
    ):
        inspect.signature(worker.update_weights_from_ipc).bind("context", "address", **call)


# ---------------------------------------------------------------------- a server as clients see it

ATTRIBUTES = (
    "_rank _world_size _gpu_count _local_rank _auto_pg _p2p_store _memory_pool _device_uuid "
    "_current_global_parameter_metas _local_rdma_devices _remote_rdma_devices _rdma_device"
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> ps.ParameterServer:
    def start(*args: Any, **options: Any) -> None:
        raise RuntimeError("not in this test")

    monkeypatch.setenv("PS_DEVICE", "cpu")
    monkeypatch.setattr(ps, "P2PStore", start)
    return ps.ParameterServer(rank=0, world_size=1)


def test_attributes_that_clients_touch(server: ps.ParameterServer) -> None:
    assert [name for name in ATTRIBUTES.split() if not hasattr(server, name)] == []
    assert server.device_manager.device_type == "cpu"
    module = server.device_manager.device_module
    assert (module.current_device, module.Stream) == (torch.cpu.current_device, torch.cpu.Stream)
    module.empty_cache()
    free, total = module.mem_get_info()
    assert 0 < free <= total
    assert server.device_manager.backend == "gloo"
    server._p2p_store = None
    server.my_own_method = print  # verl puts a method of its own on the instance


def test_as_verl_drives_it(server: ps.ParameterServer) -> None:
    """It never calls ``update``: it cuts buckets itself and copies them where it wants them."""
    tensors = {f"w.{i}": torch.arange(100 * i, dtype=torch.float32) for i in range(4)}
    server.register_checkpoint("c", files=[], named_tensors=tensors)
    server.gather_metas("c")
    received = {}
    for _, owner, bucket in ps._gen_h2d_buckets(
        server._current_global_parameter_metas,
        2048,
        server._local_rdma_devices,
        server._remote_rdma_devices,
    ):
        buffer = torch.empty(bucket.size, dtype=torch.uint8)
        server._copy_to_buffer("c", bucket, buffer, owner)
        for entry in ps._to_named_tensor(bucket.items, 0):
            nbytes = entry["dtype"].itemsize * entry["shape"].numel()
            flat = buffer[entry["offset"] : entry["offset"] + nbytes]
            received[entry["name"]] = flat.view(entry["dtype"]).view(entry["shape"])
    assert received.keys() == tensors.keys()
    assert all(torch.equal(received[name], tensors[name]) for name in tensors)


def test_copying_another_ranks_memory_needs_p2p(server: ps.ParameterServer) -> None:
    server.register_checkpoint("c", named_tensors={"w": torch.zeros(4)})
    server.gather_metas("c")
    ((_, _, bucket),) = ps._gen_h2d_buckets(server.get_metas(), 4096, {}, {})
    with pytest.raises(RuntimeError, match="P2P: not in this test"):
        server._copy_to_buffer("c", bucket, torch.empty(256, dtype=torch.uint8), 1)


def test_binding_a_socket(
    server: ps.ParameterServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path))
    socket, paths = server._bind_zmq_socket()
    try:
        assert paths == [(server._device_uuid, socket.last_endpoint.decode())]
        assert all(isinstance(path, tuple) for path in paths)
    finally:
        socket.close(0)


def test_detecting_the_bucket_size(
    server: ps.ParameterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", str(2**-10))
    server.register_checkpoint("c", named_tensors={"w": torch.zeros(4)})
    server.gather_metas("c")
    assert server._detect_bucket_size() == (1 << 20, False)
    assert server._detect_bucket_size(None, disable_h2d_buffer=True) == (1 << 20, True)


# ---------------------------------------------------------------------- helpers


@pytest.mark.parametrize("name", ["ps", "device_utils", "p2p_store"])  # of 0.2, 0.4, 0.3
def test_patching_the_device_list_changes_what_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    door = importlib.import_module(f"checkpoint_engine.{name}")
    monkeypatch.delenv("NCCL_IB_HCA", raising=False)
    monkeypatch.delenv("PS_P2P_STORE_RDMA_DEVICES", raising=False)
    with patch.object(door, "_ibv_get_device_list", return_value=["mlx5_7", "mlx5_3"]):
        assert door._get_rdma_devices() == ["mlx5_7", "mlx5_3"]
        monkeypatch.setenv("NCCL_IB_HCA", "mlx5_3")
        assert door._get_rdma_devices() == ["mlx5_3"]
        monkeypatch.setenv("NCCL_IB_HCA", "mlx4")
        assert door._get_rdma_devices() == ["mlx5_7", "mlx5_3"]
        monkeypatch.setenv("PS_P2P_STORE_RDMA_DEVICES", " b0 , a0 ")
        assert door._get_rdma_devices() == ["b0", "a0"]
    with patch.object(door, "logger") as logger:
        assert door._parse_NCCL_IB_HCA("mlx4", ["mlx5_0"]) == []
    text = "No RDMA device match device_name='mlx4' where is_exact_match=False."
    logger.warning.assert_called_once_with(text)
    assert door._get_my_rdma_device(1, 2, ["mlx5_0", "mlx5_1"]) == "mlx5_1"


def test_devices_without_libibverbs() -> None:
    assert isinstance(ps._ibv_get_device_list(), list)


def test_my_rdma_device() -> None:
    """Its rules are those of ``rdma.device_for_rank``."""
    assert ps._get_my_rdma_device(2, 4, ["a", "b"]) == "b"
    assert ps._get_my_rdma_device(1, 2, ["a", "b", "c", "d"]) == "c,d"


def test_device_identity_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_DEVICE", "cpu")
    of_two = ps._get_physical_gpu_id(2)
    assert of_two.startswith("CPU-")
    assert of_two.endswith("-2")
    assert ps._get_physical_gpu_id(DeviceManager(), 2) == of_two
    assert ps._get_physical_gpu_id(DeviceManager(), 0) == ps._get_physical_gpu_id()


def test_master_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert ps._get_master_port() == 1235
    assert ps._get_master_port(77) == 77
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(RuntimeError, match="MASTER_PORT"):
        ps._get_master_port()


def test_rank_map_of_a_broadcast() -> None:
    assert ps._get_bcast_rank_map(3, None) == {0: 0, 1: 1, 2: 2}
    assert ps._get_bcast_rank_map(3, []) == {0: 0, 1: 1, 2: 2}
    assert ps._get_bcast_rank_map(8, [5, 2]) == {5: 0, 2: 1}


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        (torch.float32, (), 256),
        (torch.bfloat16, (0, 3), 0),
        (torch.bfloat16, (128,), 256),
        (torch.bfloat16, (129,), 512),
    ],
)
def test_aligned_size(dtype: torch.dtype, shape: tuple[int, ...], expected: int) -> None:
    assert ps._align_size(dtype, torch.Size(shape)) == expected


def test_named_tensors() -> None:
    metas = [
        ps.ParameterMeta(name=f"t{i}", dtype=torch.int8, shape=torch.Size([n]), aligned_size=size)
        for i, (n, size) in enumerate([(3, 256), (0, 0), (300, 512)])
    ]
    listed = ps._to_named_tensor(metas, 1024)
    assert [set(entry) for entry in listed] == [{"name", "dtype", "shape", "offset"}] * 3
    assert [entry["offset"] for entry in listed] == [1024, 1280, 1280]
    assert ps._to_named_tensor(metas)[2]["offset"] == 256
