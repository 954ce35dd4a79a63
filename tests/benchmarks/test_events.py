"""The simulation of CUDA launches: closed cases, no deadlock, and what its output states."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from benchmarks.cases import workloads
from benchmarks.gpu.events import CARDS, Cycles, Launch, Stuck, assumptions, table
from srn_kernels.backends.cuda import planning
from srn_kernels.backends.tiling.config import MB

H200 = CARDS["h200"]
# Nothing but device memory takes time.
IDEAL = replace(
    H200,
    l2_rate=math.inf,
    sm_rate=math.inf,
    clock=math.inf,
    l2_seconds=0.0,
    device_seconds=0.0,
    counter_seconds=0.0,
)
SMALL = ["sngan_cifar_resnet_D", "real_esrgan_unet_D", "densenet40_k12"]


def launch(shapes, card=H200, backward=False, **keywords):
    return Launch(shapes, card, backward, **keywords)


@pytest.mark.parametrize("backward", [False, True])
def test_one_slab_on_one_sm_takes_its_bytes_and_the_latencies_on_its_way(backward):
    shapes, reads = [(4, 256)], 4 * 256 * 4 * (2 if backward else 1)
    card = replace(IDEAL, processors=1)
    made = launch(shapes, card, backward)
    assert len(made.tiles) == 2  # a slab, which is kept, and its rescale
    assert made.run().seconds == pytest.approx(reads / card.device_rate, rel=1e-12)
    # A ticket (an L2 access), the miss, the counter before the kept slab is rescaled, and the
    # ticket that says that there is no more.
    slow = replace(card, l2_seconds=3e-6, device_seconds=5e-6, counter_seconds=7e-6)
    # Forward adds up what its one slab gave, and forms u and v: loads of L2 one after the other.
    finish = 0 if backward else (math.ceil(256 / 96) + 2) * slow.l2_seconds
    seconds = launch(shapes, slow, backward).run().seconds
    bytes_ = reads / card.device_rate
    assert seconds == pytest.approx(bytes_ + 3e-6 + 5e-6 + finish + 7e-6 + 3e-6, rel=1e-9)


def test_arithmetic_alone_takes_the_instructions_it_has():
    """One CTA, memory without limits: cycles add up over pieces, slabs and layers."""
    free = replace(IDEAL, processors=1, device_rate=math.inf, clock=1e9)
    cycles = Cycles(piece=0, slab_end=0, finish=0)
    once = launch([(64, 2048)], free, True, cycles=cycles).run()
    thrice = launch([(64, 2048)] * 3, free, True, cycles=cycles).run()
    assert thrice.seconds == pytest.approx(3 * once.seconds, rel=1e-9)
    assert once.busy == pytest.approx(1.0)
    twice = replace(cycles, instructions=tuple(2 * n for n in cycles.instructions))
    assert 1.8 < launch([(64, 2048)], free, True, cycles=twice).run().seconds / once.seconds < 2


@pytest.mark.parametrize("backward", [False, True])
def test_a_large_model_on_an_ideal_card_is_bound_by_its_bytes(backward):
    made = launch([(1024, 1024)] * 40, IDEAL, backward).run()
    assert made.seconds >= made.floor_seconds * 0.6  # outputs may stay in L2
    assert made.time <= 1.02 and made.traffic == pytest.approx(1.0, abs=0.03)
    bound = launch([(1024, 1024)] * 40, H200, backward).run()
    assert bound.seconds > made.seconds


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_no_number_of_ctas_gets_stuck_and_more_are_hardly_ever_slower(name, backward):
    shapes = workloads.find(name).shapes
    times = [launch(shapes, backward=backward, ctas=n).run().seconds for n in (1, 2, 5, 33, 132)]
    # Lists of tiles have anomalies: one more worker may delay the one that all wait for.
    assert all(later <= 1.03 * sooner for sooner, later in itertools.pairwise(times))
    assert times[-1] < times[0] / 5


@pytest.mark.parametrize("card", CARDS)
def test_every_card_finishes_wide_rows_odd_rows_and_bfloat16(card):
    shapes = [(96, 13824), (130, 27), (64, 9216), (1, 4096), (300, 15)]
    for backward in (False, True):
        for other in (planning.FLOAT32, planning.BFLOAT16):
            made = launch(shapes, CARDS[card], backward, other_type=other).run()
            assert 0 < made.busy <= 1 and made.time > 0.5 and made.traffic >= 0.9


def test_slower_memory_and_longer_waits_never_help():
    shapes = [(512, 1152)] * 12
    base = launch(shapes).run().seconds
    for worse in ({"device_rate": 2e12}, {"counter_seconds": 4e-6}, {"l2_rate": 2e12}):
        assert launch(shapes, replace(H200, **worse)).run().seconds > base


def test_a_circle_of_waits_is_found():
    made = launch([(64, 256)] * 2, ctas=1)
    made.tiles.sort(key=lambda tile: -tile[1])  # rescales first: nobody comes to their slabs
    with pytest.raises(Stuck, match="wait without end"):
        made.run()


def test_partial_sums_and_kept_slabs_are_counted():
    """4 MB fit the SMs' shared memory: the weight is read once, and nothing else from memory."""
    made = launch([(256, 512)] * 8, replace(H200, l2_bytes=200 * MB))
    assert made.run().kept == 1.0
    assert made.l2.device_read == 8 * 256 * 512 * 4


def test_the_output_states_its_assumptions():
    made = launch([(8, 16)]).run()
    text = table([("one", "float32", made, made)], H200)
    assert assumptions(H200) in text and "Simulated, not measured" in text
    for figure in ("132 SMs", "4.3 TB/s", "650 ns", "1.0 us"):
        assert figure in text
