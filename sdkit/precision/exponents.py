"""Chooses each stream's exponent: the least that gives the margin, within the weights' bounds.

The conditions are differences: a layer's weight moves by e[writes] - e[reads], and may go down
until 1 % of it would become float16-subnormal, and up until it would overflow. Such a system has
one greatest solution below given limits (Bellman and Ford's, as in shortest paths), so what is
chosen is the least shift of every stream at once. Where there is no solution, the stream that asks
for too much is let up by one bit at a time; the weight that stopped it is reported.

References:
    Cormen et al., "Introduction to Algorithms", section 24.4, "Difference constraints".
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache

import torch

from sdkit.loading.sidecar import find_shift
from sdkit.precision.streams import Layer, Streams

FLOAT16_MAX = 65504.0
SMALLEST_NORMAL = 2.0**-14  # of float16
MARGIN_BITS = 2  # activations stay below 65504 / 4: calibration saw a few prompts, not all
SUBNORMAL_SHARE = 0.01
UNBOUNDED = 2**10


@dataclass(frozen=True)
class Choice:
    """Exponents, and where the bounds forbade what the margin needed.

    Attributes:
        exponents: {stream: e}, 0 left out.
        wanted: {stream: e} that the margin needed, for the streams that did not get it.
        bounds: {stream: path of the weight that stopped it}, for the same.
    """

    exponents: dict[str, int]
    wanted: dict[str, int]
    bounds: dict[str, str]


def find_needs(largest: dict[str, float]) -> dict[str, int]:
    """{stream: bits by which it must go down so that float16 fits with the margin}, 0 left out."""
    limit_bits = math.log2(FLOAT16_MAX) - MARGIN_BITS
    bits = {s: math.ceil(math.log2(v) - limit_bits) for s, v in largest.items() if v > 0}
    return {stream: need for stream, need in bits.items() if need > 0}


def choose_exponents(model, streams: Streams, needs: dict[str, int]) -> Choice:
    """Solves for the least shift of every stream.

    Args:
        model: Whose weights bound it.
        streams: See `find_streams`.
        needs: See `find_needs`.
    """
    shift = find_shift(model)
    done = shift.exponents if shift else {}

    @cache
    def room_of(layer):
        moved = done.get(layer.writes, 0) - done.get(layer.reads, 0)
        return measure_room(find_weight(model, layer), is_half=layer.is_half, moved=moved)

    needs, bounds, wanted = dict(needs), {}, dict(needs)
    while True:
        exponents, too_much = solve(streams, needs, room_of)
        if too_much is None:
            break
        stream, layer = too_much
        needs[stream] -= 1
        bounds[stream] = layer.path
    return Choice(
        exponents={stream: e for stream, e in exponents.items() if e},
        wanted={s: -wanted[s] for s in bounds if -wanted[s] != exponents[s]},
        bounds={s: path for s, path in bounds.items() if -wanted[s] != exponents[s]},
    )


def solve(streams: Streams, needs, room_of):
    """({stream: e}, None), or (.., (stream that needs too much, layer that forbids it))."""
    exponents = {name: -needs.get(name, 0) for name in streams.names}
    origin = {name: name for name in streams.names}
    is_settled = False
    while not is_settled:
        is_settled = True
        for layer in streams.layers:
            reads, writes = exponents.get(layer.reads, 0), exponents.get(layer.writes, 0)
            if reads == writes:
                continue
            lowest, highest = room_of(layer)
            if writes - reads < lowest:  # the weight would go subnormal: what it reads goes down
                if layer.reads is None:
                    return exponents, (origin[layer.writes], layer)
                exponents[layer.reads] = writes - lowest
                origin[layer.reads] = origin[layer.writes]
                is_settled = False
            elif writes - reads > highest:  # it would overflow: what it writes goes down too
                if layer.writes is None:
                    return exponents, (origin[layer.reads], layer)
                exponents[layer.writes] = reads + highest
                origin[layer.writes] = origin[layer.reads]
                is_settled = False
    return exponents, None


def find_weight(model, layer: Layer) -> torch.Tensor:
    """The layer's weight, of GEGLU its value half."""
    weight = model.get_submodule(layer.path).weight.detach()
    return weight[: len(weight) // 2] if layer.is_half else weight


def measure_room(weight: torch.Tensor, *, is_half=False, moved=0) -> tuple[int, int]:
    """(lowest, highest) power of two that a float32 weight can be multiplied by.

    Lowest: so that at most 1 % of the tensor becomes float16-subnormal that was not, before any
    rebalance. Highest: so that nothing overflows in float16. Biases do not count: what is added to
    a stream of thousands may lose its last bits.

    Args:
        weight: float32.
        is_half: Whether it is half of a tensor.
        moved: Power of two that it has been multiplied by already.
    """
    magnitudes = weight.abs()
    largest = float(magnitudes.max())
    if not largest:
        return -UNBOUNDED, UNBOUNDED
    limit = SUBNORMAL_SHARE * weight.numel() * (2 if is_half else 1)
    first = SMALLEST_NORMAL * 2.0 ** min(moved, 0)  # what was subnormal is less than this now
    before = int((magnitudes < first).count_nonzero())

    def count_subnormal(bits):
        return int((magnitudes < SMALLEST_NORMAL * 2.0**bits).count_nonzero()) - before

    most = max(0, math.floor(math.log2(largest / SMALLEST_NORMAL))) + 1  # then all are subnormal
    lowest = bisect_right(range(1, most + 1), limit, key=count_subnormal)
    highest = math.floor(math.log2(FLOAT16_MAX / largest))
    return -lowest if lowest < most else -UNBOUNDED, max(highest, 0)
