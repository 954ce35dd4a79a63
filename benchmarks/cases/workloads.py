"""Weight shapes of real models, and the tensors that the providers are timed on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CORE = (
    "sngan_cifar_resnet_D",
    "real_esrgan_unet_D",
    "densenet40_k12",
    "emulator_175",
    "biggan_128_D_ch96",
    "gpt2_xl/24",
    "1x4096x4096",
    "real_esrgan_unet_D@bfloat16",
)
QUICK = CORE[:2]
FILE = Path(__file__).with_name("workloads.json")
FLOAT_BYTES = 4
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FLOOR_PASSES = {"forward": 2, "evaluation": 2, "backward": 3, "forward_backward": 5}


@dataclass(frozen=True)
class Workload:
    """The matrices of one model, (rows, columns) each."""

    name: str
    source: str
    shapes: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.float32

    @property
    def parameters(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)

    @classmethod
    def from_record(cls, name: str, record: Mapping[str, Any]) -> Workload:
        """Raises ValueError if the layers do not add up to the recorded total."""
        shapes = tuple(
            (rows, columns) for rows, columns, count in record["layers"] for _ in range(count)
        )
        workload = cls(name, record["source"], shapes)
        if workload.parameters != record["total_params"]:
            raise ValueError(
                f"workload {name}: the layers hold {workload.parameters} parameters, "
                f"total_params says {record['total_params']}"
            )
        return workload


def load(path: Path = FILE) -> dict[str, Workload]:
    """Every workload by name, its total checked."""
    records = json.loads(path.read_text())
    return {name: Workload.from_record(name, record) for name, record in records.items()}


def find(name: str) -> Workload:
    """A workload by its name, or by one of two forms made from numbers.

    ``gpt2_xl/8`` keeps every eighth matrix of a model; ``64x512x256`` is 64 matrices of (512, 256).
    ``@bfloat16`` or ``@float16`` after any of these is the same with weights of that dtype.
    Raises ValueError if there is no such workload.
    """
    plain, at, dtype = name.partition("@")
    if at:
        if dtype not in HALF:
            raise ValueError(f"workload {name!r}: the dtype must be one of {', '.join(HALF)}")
        return replace(find(plain), name=name, dtype=HALF[dtype])
    known = load()
    if name in known:
        return known[name]
    model, _, step = name.partition("/")
    if model in known and step.isdecimal() and int(step) > 0:
        return Workload(name, known[model].source, known[model].shapes[:: int(step)])
    numbers = name.split("x")
    if len(numbers) == 3 and all(n.isdecimal() and int(n) > 0 for n in numbers):
        count, rows, columns = map(int, numbers)
        return Workload(name, "synthetic", ((rows, columns),) * count)
    raise ValueError(
        f"workload {name!r} is none of {', '.join(known)}; a part of one is written gpt2_xl/8, "
        "matrices of one shape 64x512x256"
    )


@dataclass(frozen=True)
class Problem:
    """What all providers of a workload share: weights, dL/dW_hat, and the first u and v."""

    workload: Workload
    weights: list[Tensor]
    upstream: list[Tensor]
    us: list[Tensor]
    vs: list[Tensor]
    n_power_iterations: int = 1

    def target_ranks(self, rank_ratio: float) -> list[float]:
        if rank_ratio == 1:
            return [math.inf] * len(self.weights)
        return [max(1.0, rank_ratio * min(w.shape)) for w in self.weights]


def flat_matrix(rows: int, columns: int) -> Tensor:
    """A float32 matrix with all singular values 1: rows of a cosine transform."""
    if rows > columns:
        return flat_matrix(columns, rows).T.contiguous()
    # The phase pi i (2 j + 1) / (2 columns), reduced as integers: exact for any size.
    phase = torch.arange(rows).unsqueeze(1) * (2 * torch.arange(columns) + 1) % (4 * columns)
    matrix = torch.cos(phase.float() * (math.pi / (2 * columns))) * math.sqrt(2 / columns)
    matrix[0] *= math.sqrt(0.5)
    return matrix


def make_problem(workload: Workload, seed: int = 0, n_power_iterations: int = 1) -> Problem:
    """Weights as after an orthogonal initialisation and some training.

    A flat spectrum plus noise keeps the stable rank above 0.7 of its maximum, so that stable rank
    normalisation has to act on every layer. u and v are drawn at random.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = {shape: flat_matrix(*shape) for shape in set(workload.shapes)}
    weights, upstream, us, vs = [], [], [], []
    for rows, columns in workload.shapes:
        noise = torch.randn(rows, columns, generator=generator)
        scale = 0.1 / (math.sqrt(rows) + math.sqrt(columns))
        weights.append(noise.mul_(scale).add_(flat[rows, columns]).to(workload.dtype))
        upstream.append(torch.randn(rows, columns, generator=generator).to(workload.dtype))
        for vectors, n in ((us, rows), (vs, columns)):
            vector = torch.randn(n, generator=generator)
            vectors.append(vector / vector.norm())
    return Problem(workload, weights, upstream, us, vs, n_power_iterations)


def floor_bytes(workload: Workload, mode: str) -> int:
    """The bytes that a mode has to move: read W, write W_hat; read G and W, write dL/dW."""
    return FLOOR_PASSES[mode] * workload.parameters * workload.dtype.itemsize
