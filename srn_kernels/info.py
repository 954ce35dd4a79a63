"""``python -m srn_kernels.info``: versions, compiled architectures and live backends."""

from __future__ import annotations

import platform

import torch

import srn_kernels
from srn_kernels.backends import available_backends, built, cpu


def lines() -> list[str]:
    """What a bug report needs, one fact a line."""
    facts = [
        f"srn_kernels {srn_kernels.__version__}",
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"CPU instruction set: {cpu.instruction_set() or 'no native extension'}, "
        f"{torch.get_num_threads()} threads",
        f"CUDA of torch: {torch.version.cuda or 'none'}",
    ]
    if against := built.record().get("torch"):
        facts.append(f"compiled backends: built against torch {against}")
    elif cpu.instruction_set():
        facts.append("compiled backends: present, without setup.py's record of the build")
    else:
        facts.append("compiled backends: none; plain PyTorch serves, several times slower")
    for name, reason in available_backends().items():
        facts.append(f"backend {name}: {'live' if reason is None else 'not available: ' + reason}")
    return facts


if __name__ == "__main__":
    print("\n".join(lines()))
