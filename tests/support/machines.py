"""The numerical tests as other processors would compute them: ``make test-machines``.

A setting stands for a kind of machine: which code MKL, torch's own loops and our kernels take, and
over how many threads. What it changes on the processor at hand is measured, not believed: MKL
ignores MKL_ENABLE_INSTRUCTIONS on AMD, for instance. One that changes nothing is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1]
# Those that compare floating-point computations; test_cpu.py goes through our own instruction sets
# by itself, and the kernels of the GPU backends do not run on the CPU.
NUMERICAL = (
    *("linalg", "power_method", "turning", "reference", "functional", "autograd", "exact", "top_k"),
    *("bound", "projection", "operator_norm", "parametrization", "precision", "convert", "loading"),
    *("migration", "layers", "looking", "module_kinds", "rounds", "shared_round", "copies"),
    *("histories", "training", "activation_checkpoint", "scaled", "checkpoint", "known"),
)
# name: (variables, instruction set of our kernels, expression that leaves tests out)
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}  # more threads than cores: who waits leaves the core
NO_INDUCTOR = "not inductor"  # ATEN_CPU_CAPABILITY=default breaks the C++ that inductor writes
SETTINGS: dict[str, tuple[dict[str, str], str, str]] = {
    "no AVX, 1 thread": (
        {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
        "baseline",
        NO_INDUCTOR,
    ),
    "AVX2, 2 threads": (
        {"MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "2"},
        "avx2",
        "",
    ),
    "AVX-512, 4 threads": (
        {"MKL_CBWR": "AVX512", "ATEN_CPU_CAPABILITY": "avx512", "OMP_NUM_THREADS": "4"},
        "avx512",
        "",
    ),
    "Intel's MKL held to SSE4.2": ({"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, "auto", ""),
    "Intel's MKL held to AVX2": ({"MKL_ENABLE_INSTRUCTIONS": "AVX2"}, "auto", ""),
    "1 thread": ({"OMP_NUM_THREADS": "1"}, "auto", ""),
    "4 threads": ({"OMP_NUM_THREADS": "4"}, "auto", ""),
}


def fingerprint(instruction_set: str) -> dict[str, str]:
    """The bits of results of each library: equal bits, the same arithmetic."""
    from srn_kernels import functional
    from srn_kernels.backends import load

    if not (extension := load("cpu")._cpu).select_instruction_set(instruction_set):
        return {}

    def integers(*shape: int) -> torch.Tensor:  # exact under every setting, unlike randn
        generator = torch.Generator().manual_seed(0)
        return torch.randint(-999, 999, shape, generator=generator).double() / 999

    a, b = integers(300, 200), integers(200, 100)
    image, kernel = integers(4, 16, 20, 20), integers(24, 16, 3, 3)
    weights, us, vs = [a.float()], [torch.ones(300) / 300**0.5], [torch.ones(200) / 200**0.5]
    results = {
        "matrix products": [x @ y for x, y in ((a, b), (a.float(), b.float()))],
        "factorisations": [torch.linalg.svdvals(a), torch.linalg.qr(a.float()).R],
        "torch's loops": [a.float().sum(), a.norm(), a.float().exp(), a.float().softmax(1)],
        "convolutions": [
            torch.nn.functional.conv2d(x, k)
            for x, k in ((image, kernel), (image.float(), kernel.float()))
        ],
        "our kernels": functional.stable_rank_normalize(weights, us, vs, [3.0]),
    }
    assert extension.instruction_set() == instruction_set or instruction_set == "auto"
    return {
        name: str([hash(x.numpy().tobytes()) for x in found]) for name, found in results.items()
    }


def ask(variables: dict[str, str], instruction_set: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, __file__, "--fingerprint", instruction_set],
        env=os.environ | variables | {"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def files() -> list[str]:
    found = {path.stem.removeprefix("test_"): path for path in TESTS.rglob("test_*.py")}
    return [str(found[name]) for name in NUMERICAL]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fingerprint", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")
    options = parser.parse_args()
    if options.fingerprint:
        json.dump(fingerprint(options.fingerprint), sys.stdout)
        return 0
    print(f"default: torch uses {torch.backends.cpu.get_cpu_capability()}, ", end="")
    print(f"{'MKL' if torch.backends.mkl.is_available() else 'no MKL'}, ", end="")
    print(f"{torch.get_num_threads()} threads", flush=True)
    plain, failed, seen = ask({}, "auto"), [], {}
    for name, (variables, instruction_set, left_out) in SETTINGS.items():
        if options.only not in name:
            continue
        said = " ".join(f"{k}={v}" for k, v in variables.items())
        print(f"\n{name} ({said}, our kernels {instruction_set})", flush=True)
        found = ask(variables, instruction_set)
        changed = [what for what, bits in found.items() if bits != plain[what]]
        if not found:
            print(f"  not run: this processor cannot run {instruction_set}")
        elif not changed:
            print("  not run: changes nothing here")
        elif (twin := seen.get(key := json.dumps(found))) is not None:
            print(f"  not run: computes as '{twin}'")
        else:
            seen[key] = name
            print(f"  changes {', '.join(changed)}", flush=True)
            if left_out:
                print(f"  leaves out {left_out.removeprefix('not ')}: the setting itself breaks it")
            began = time.perf_counter()
            # inductor's cache does not tell settings apart, and would mix their vector widths
            cache = tempfile.TemporaryDirectory()
            own = PATIENT | {"TORCHINDUCTOR_CACHE_DIR": cache.name}
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal"),
                    *("--require-backend", "cpu", "--instruction-set", instruction_set),
                    *(["-k", left_out] if left_out else []),
                    *files(),
                    *options.pytest,
                ],
                env=os.environ | own | variables,
                cwd=TESTS.parent,
                stdout=subprocess.PIPE,
                text=True,
            )
            cache.cleanup()
            lines = done.stdout.strip().splitlines()
            print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))), end="")
            print(f"  {lines[-1]} ({time.perf_counter() - began:.0f} s)", flush=True)
            if done.returncode:
                failed.append(name)
    print(f"\nfailed under: {', '.join(failed)}" if failed else "\nno setting failed")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
