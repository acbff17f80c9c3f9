"""What one device of a kind can do: arithmetic, memory, and its links to other devices."""

from dataclasses import dataclass

GB = 2**30


@dataclass(frozen=True)
class Chip:
    """Published figures of one device as jax counts them (a TPU7x chip is two devices).

    Attributes:
        name: as people say it.
        peak_flops: dense bfloat16 FLOP/s.
        hbm_bytes: memory a program can use; for TPUs what their compiler (libtpu 0.0.50) allows.
        link_bytes: bytes/s that leave the device over all its links to the others in its slice;
            0 where not stated here.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    link_bytes: float = 0.0


# Sources: Google Cloud's pages of the TPU versions, NVIDIA's data sheets (dense, not sparse).
_TPUS = {
    "TPU v4": Chip("TPU v4", 275e12, int(30.75 * GB), 300e9),
    "TPU v5 lite": Chip("TPU v5e", 197e12, int(15.75 * GB), 200e9),
    "TPU v5": Chip("TPU v5p", 459e12, int(95.73 * GB), 600e9),
    "TPU v6 lite": Chip("TPU v6e", 918e12, int(31.24 * GB), 400e9),
    "TPU7x": Chip("TPU7x core", 1153.5e12, int(94.74 * GB), 600e9),
}
# jax reports the name that the driver gives, e.g. "NVIDIA H100 80GB HBM3"; the longest prefix wins.
_GPUS = {
    "NVIDIA A100": Chip("A100", 312e12, 80 * GB),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40 GB", 312e12, 40 * GB),
    "NVIDIA A100-PCIE-40GB": Chip("A100 40 GB", 312e12, 40 * GB),
    "NVIDIA L4": Chip("L4", 121e12, 24 * GB),
    "NVIDIA L40S": Chip("L40S", 362e12, 48 * GB),
    "NVIDIA H100": Chip("H100", 989.4e12, 80 * GB),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12, 80 * GB),
    "NVIDIA H100 NVL": Chip("H100 NVL", 835e12, 94 * GB),
    "NVIDIA GH200": Chip("GH200", 989.4e12, 96 * GB),
    "NVIDIA H200": Chip("H200", 989.4e12, 141 * 10**9),
    "NVIDIA B200": Chip("B200", 2250e12, 180 * 10**9),
    "NVIDIA GB200": Chip("GB200", 2500e12, 186 * 10**9),
}


def chip(device_kind: str) -> Chip | None:
    """The figures of `jax.Device.device_kind`; None for a CPU or a kind not known here."""
    if device_kind in _TPUS:
        return _TPUS[device_kind]
    prefixes = [name for name in _GPUS if device_kind.startswith(name)]
    return _GPUS[max(prefixes, key=len)] if prefixes else None
