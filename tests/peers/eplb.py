"""DeepSeek's and vLLM's balancers of experts beside tetromino_balanced_eplb: slots that differ, and CPU time.

    eplb.py LIBTETROMINO.SO EPLB.PY

EPLB.PY is the file of github.com/deepseek-ai/EPLB; of the installed package vllm one file is imported. Both sort stably
for the comparison of plans: DeepSeek's are the same then. vLLM divides in float64, which leaves other ties.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import pathlib
import sys
import time

import numpy as np
import torch

torch.set_num_threads(1)
sys.path.insert(0, str(pathlib.Path(importlib.util.find_spec("vllm").origin).parent / "distributed/eplb"))
vllm = importlib.import_module("policy.default").DefaultEplbPolicy
library = ctypes.CDLL(sys.argv[1])

# layers, experts, slots, groups, nodes, GPUs
SIZES = ((58, 256, 288, 8, 4, 32), (58, 256, 288, 1, 18, 144), (58, 256, 320, 1, 8, 64), (58, 512, 576, 8, 8, 64))


class Cluster(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("nodes", "gpus_per_node", "slots_per_gpu")]


def ours(loads, slots, groups, nodes, gpus):
    layers, experts = loads.shape
    if groups % nodes != 0:  # where groups do not divide, theirs balances all GPUs as one node
        groups = nodes = 1
    cluster = Cluster(nodes, gpus // nodes, slots // gpus)
    out = np.empty((layers, slots), np.int64)
    message, size = ctypes.create_string_buffer(200), ctypes.c_size_t
    status = library.tetromino_balanced_eplb(
        ctypes.c_void_p(loads.ctypes.data), 0, size(layers), size(experts), size(groups), ctypes.byref(cluster),
        ctypes.c_void_p(out.ctypes.data), None, None, message, size(200))
    assert status == 0, message.value
    return out


def cpu_seconds(call):
    """The best of five."""
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


@contextlib.contextmanager
def stable_sorts():
    """Makes the sorts of both put equal loads in ascending order of index."""
    of_numpy, of_torch = np.argsort, torch.Tensor.sort
    np.argsort = lambda array, axis=-1: of_numpy(array, axis=axis, kind="stable")
    torch.Tensor.sort = lambda self, dim=-1, descending=False: of_torch(self, dim=dim, descending=descending, stable=True)
    yield
    np.argsort, torch.Tensor.sort = of_numpy, of_torch


def main():
    spec = importlib.util.spec_from_file_location("eplb", sys.argv[2])
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    balancers = {"DeepSeek": lambda *sizes: published.rebalance_experts(*sizes)[0], "vLLM": vllm.rebalance_experts}
    print("layers x experts to slots, groups, nodes, GPUs   beside        theirs ms   ours ms   ratio   slots that differ")
    for layers, experts, slots, groups, nodes, gpus in SIZES:
        loads = np.random.default_rng(1).zipf(1.6, (layers, experts)).clip(1, 10000).astype(np.float32)
        tensor = torch.from_numpy(loads)
        mine = ours(loads, slots, groups, nodes, gpus)
        fast = cpu_seconds(lambda: ours(loads, slots, groups, nodes, gpus))
        for name, rebalance in balancers.items():
            with stable_sorts():
                theirs = rebalance(tensor, slots, groups, nodes, gpus).numpy()
            slow = cpu_seconds(lambda: rebalance(tensor, slots, groups, nodes, gpus))
            print(f"{layers} x {experts} to {slots}, {groups}, {nodes}, {gpus}".ljust(48), name.ljust(10),
                  f"{1e3 * slow:12.1f} {1e3 * fast:9.2f} {slow / fast:7.1f} {int((mine != theirs).sum()):12}", flush=True)


if __name__ == "__main__":
    main()
