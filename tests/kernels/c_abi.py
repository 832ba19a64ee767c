"""plugins/capi/ecmfq.h in ctypes, for tests and benchmarks."""

from __future__ import annotations

import ctypes
from pathlib import Path

STATUS = {"OK": 0, "ABI_VERSION": 1, "NULL_POINTER": 2, "SHAPE": 3, "DTYPE": 4, "ACTIVATION": 5, "GROUP_SIZE": 6, "WEIGHT_LAYOUT": 7,
          "WORKSPACE": 8, "DEVICE": 9, "LAUNCH": 10, "ALIGNMENT": 11}
ABI_VERSION = 1

_SIZES = ("num_tokens", "num_experts", "top_k", "hidden_size", "intermediate_size", "group_size", "activation", "dtype", "weight_layout",
          "compute_capability", "num_sms", "max_smem_per_block")
_POINTERS = ("hidden_states", "topk_ids", "topk_weights", "gate_up_qweight", "gate_up_scale", "gate_up_multiplier", "down_qweight",
             "down_scale", "down_multiplier", "output")


class EcmfqMoeParams(ctypes.Structure):
    """The struct of the same name."""

    _fields_ = [("abi_version", ctypes.c_uint32), ("struct_size", ctypes.c_uint32),
                *((name, ctypes.c_int32) for name in _SIZES), *((name, ctypes.c_void_p) for name in _POINTERS)]


def load(path: Path) -> ctypes.CDLL:
    """The library with its functions' types set."""
    library = ctypes.CDLL(str(path))
    params = ctypes.POINTER(EcmfqMoeParams)
    library.ecmfq_abi_version.restype = ctypes.c_uint32
    library.ecmfq_status_string.restype = ctypes.c_char_p
    library.ecmfq_status_string.argtypes = [ctypes.c_int32]
    library.ecmfq_routed_moe_check.argtypes = [params]
    library.ecmfq_routed_moe_workspace_size.argtypes = [params, ctypes.POINTER(ctypes.c_size_t)]
    library.ecmfq_routed_moe.argtypes = [params, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return library
