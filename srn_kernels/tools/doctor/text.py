"""What the doctor found, as text for people and as data for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from srn_kernels.backends import available_backends
from srn_kernels.tools.doctor.examine import APPLY, CONVERT, NOTHING, Diagnosis, Difference, Timing

_SHOWN = 40  # layers; models of hundreds repeat themselves


def lines(found: Diagnosis, rank_ratio: float, device: str) -> list[str]:
    """The whole diagnosis."""
    text = []
    if found.normalised:
        text += [f"{len(found.normalised)} parameters are normalised by srn_kernels already", ""]
    if found.how != NOTHING:
        text.append(f"{found.how} would take {len(found.taken)} parameters:")
        text += [
            f"  {t.name}  {t.shape[0]}x{t.shape[1]}{'  from a ' + t.form if t.form else ''}"
            for t in found.taken[:_SHOWN]
        ]
        text += _more(len(found.taken))
    else:
        text.append("nothing in this model would be normalised")
    if found.left:
        text += ["", f"left as they are: {len(found.left)}"]
        text += [f"  {name}: {reason}" for name, reason in found.left[:_SHOWN]]
        text += _more(len(found.left))
    text += ["", f"evaluation output: {_output(found, rank_ratio)}", *_timing(found, device)]
    return text + (["", "lines to add:", "", *to_add(found, rank_ratio)] if found.taken else [])


def _more(count: int) -> list[str]:
    return [f"  and {count - _SHOWN} more"] if count > _SHOWN else []


def _output(found: Diagnosis, rank_ratio: float) -> str:
    out = found.output
    if not isinstance(out, Difference):
        return f"NOT CHECKED: {out}"
    share = f" ({out.largest / out.scale:.1g} of it)" if out.scale else ""
    size = f"by {out.largest:.2g} at most, where the largest number is {out.scale:.3g}{share}"
    verdict = "stays" if out.stays else "CHANGES"
    if found.how == CONVERT and rank_ratio == 1:
        return f"{verdict}: the converted model differs {size}"
    return (
        "changes, because the constraint is new to this model; a plain copy by srn_kernels.export "
        f"has the same: it {'differs' if out.stays else 'DIFFERS'} {size}"
    )


def _timing(found: Diagnosis, device: str) -> list[str]:
    timing = found.timing
    if not isinstance(timing, Timing):
        return [f"training round: NOT TIMED: {timing}"]
    names = {
        "before": "as it is" + (", without normalisation" if found.how == APPLY else ""),
        "torch": "with torch's own spectral norm on these layers",
        "srn_kernels": "with srn_kernels",
    }
    text = [f"training round, forward and backward, median ms (quartiles) on {device}:"]
    text += [
        f"  {s.median:9.2f} ({s.p25:.2f} to {s.p75:.2f})  {names[name]}"
        for name, s in timing.ms.items()
    ]
    for name, s in timing.ratio.items():
        text.append(
            f"  {s.median:9.2f} ({s.p25:.2f} to {s.p75:.2f})  times, {names[name]} / with "
            "srn_kernels, paired"
        )
    if any(s.p75 > 1.5 * s.p25 for s in timing.ms.values()):
        text.append("  the quartiles are far apart: the machine is busy, or the model very small")
    live = [n for n, reason in available_backends().items() if reason is None and n != "reference"]
    if not live:
        text.append("  only plain PyTorch is live, which is slower: python -m srn_kernels.info")
    return text


def to_add(found: Diagnosis, rank_ratio: float) -> list[str]:
    """Python that does what was tried."""
    ratio = f", rank_ratio={rank_ratio:g}"
    if found.how == CONVERT:
        call = f"model = srn.convert_spectral_norm(model{ratio if rank_ratio < 1 else ''})"
        place = "# where the model is built; old checkpoints load before and after it"
    else:
        call = f"model = srn.apply_stable_rank_norm(model{ratio})"
        place = "# where the model is built; 1 is spectral norm, less bounds the stable rank too"
    return ["    import srn_kernels as srn", "", f"    {place}", f"    {call}"]


def to_dict(found: Diagnosis, rank_ratio: float) -> dict[str, Any]:
    """The same for programs; what was not checked has its reason in place of numbers."""
    document = asdict(found)
    if isinstance(found.output, Difference):
        document["output"]["stays"] = found.output.stays
    return {**document, "lines": [line.strip() for line in to_add(found, rank_ratio)]}
