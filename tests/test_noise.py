"""The noise contract: exact values, independence of tiling, statistics, rounding.

Statistical tests have fixed seeds, so they are deterministic; ``Z_BOUND`` and ``P_BOUND`` say how
unlikely a correct generator would have been to fail them at the time they were written: 4.5
standard deviations is 7e-6 two-sided, and a p-value bound is itself the probability. Normals are
bounded by 5.77, where a true normal has probability 8e-9 left: no moment or KS distance below can
see that.
"""

from __future__ import annotations

import itertools
import math
import pathlib

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zokernels import noise

Z_BOUND = 4.5
P_BOUND = 1e-4

# The first pair of names of this shape whose SHA-256 starts with the same four bytes.
COLLIDING = (
    "model.layers.2239.experts.7.self_attn.v_proj.weight",
    "model.layers.2387.experts.1.self_attn.v_proj.weight",
)

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor(noise.signed_seed(value))


def known_answers() -> list[tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    text = (pathlib.Path(__file__).parent / "kat_vectors.txt").read_text()
    rows = []
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        rounds, *words = line.split()
        w = [int(x, 16) for x in words]
        rows.append((int(rounds), tuple(w[:4]), tuple(w[4:6]), tuple(w[6:])))
    return rows


# --- one element at a time, in Python integers: the contract's prose without any vectorisation ----


def one_block(word0: int, row: int, pid: int, stream: int, seed: int) -> tuple[int, ...]:
    return noise.philox4x32((word0, row, pid, stream), (seed & 0xFFFFFFFF, seed >> 32))


def one_gaussian(row: int, col: int, seed: int, pid: int) -> float:
    w = one_block((col // 256) * 64 + col % 64, row, pid, 0, seed)
    j = (col % 256) // 64
    a, b = (w[0], w[1]) if j < 2 else (w[2], w[3])
    ua, ub = (((x >> 9) + 0.5) * 2.0**-23 for x in (a, b))
    r, phi = math.sqrt(-2 * math.log(ua)), math.pi / 2 * (ub - 0.5)
    p, q = math.cos(phi), math.sin(phi)
    if b & 1:
        p, q = q, p
    if b & 2:
        p, q = -p, -q
    return r * (p if j % 2 == 0 else q)


def one_rademacher(row: int, col: int, seed: int, pid: int) -> float:
    w = one_block(col // 128, row, pid, 0, seed)
    return 1.0 - 2.0 * (w[(col % 128) // 32] >> (col % 32) & 1)


def one_rounding(row: int, col: int, seed: int, pid: int, stream: int) -> int:
    w = one_block((col // 512) * 64 + col % 64, row, pid, stream, seed)[(col % 256) // 64]
    return w >> 16 if (col // 256) % 2 else w & 0xFFFF


# --- Philox ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), known_answers())
def test_known_answers(rounds, counter, key, expected):
    assert noise.philox4x32(counter, key, rounds) == expected
    if rounds == 10:
        seed = seed_of(key[0] | key[1] << 32)
        words = noise.philox_words(
            torch.tensor([counter[0]]),
            torch.tensor([counter[1]]),
            counter[2],
            counter[3],
            seed,
        )
        assert tuple(int(w) for w in words) == expected


def test_known_answer_file_is_complete():
    assert [row[0] for row in known_answers()] == [7] * 3 + [10] * 3


@given(
    counters=st.lists(st.tuples(U32, U32), min_size=1, max_size=8),
    pid=U32,
    stream=U32,
    seed=U64,
)
def test_vectorised_philox_is_the_integer_one(counters, pid, stream, seed):
    word0 = torch.tensor([c[0] for c in counters])
    row = torch.tensor([c[1] for c in counters])
    got = torch.stack(noise.philox_words(word0, row, pid, stream, seed_of(seed)), dim=1)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    assert got.tolist() == [
        list(noise.philox4x32((c0, c1, pid, stream), key)) for c0, c1 in counters
    ]


# --- values against the prose ---------------------------------------------------------------------

EDGE_COLUMNS = [
    0,
    1,
    31,
    32,
    63,
    64,
    127,
    128,
    191,
    192,
    255,
    256,
    319,
    511,
    512,
    767,
    768,
    1023,
]


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF])
def test_values_are_those_of_the_prose(seed):
    pid, row = 0xFEDCBA98, 5
    z = noise.gaussian(7, 1024, seed_of(seed), pid)
    s = noise.rademacher(7, 1024, seed_of(seed), pid)
    bits = {k: noise.rounding_bits(7, 1024, seed_of(seed), pid, k) for k in (1, 2)}
    for col in EDGE_COLUMNS:
        assert float(z[row, col]) == pytest.approx(one_gaussian(row, col, seed, pid), abs=4e-7)
        assert float(s[row, col]) == one_rademacher(row, col, seed, pid)
        for stream, b in bits.items():
            assert int(b[row, col]) == one_rounding(row, col, seed, pid, stream)


def test_a_row_of_signs_is_a_little_endian_bit_string():
    s = noise.rademacher(1, 256, seed_of(9), 3)[0]
    packed = np.packbits((s.numpy() < 0).astype(np.uint8), bitorder="little")
    words = [w for block in range(2) for w in one_block(block, 0, 3, 0, 9)]
    assert packed.tobytes() == b"".join(w.to_bytes(4, "little") for w in words)


@given(word=U32)
@example(word=0)
@example(word=2**32 - 1)
def test_uniform_is_exact_in_float32_and_has_the_cheap_form(word):
    u = float(noise.uniform(torch.tensor(word)))
    assert 2.0**-24 <= u <= 1 - 2.0**-24
    assert float(np.float32(u)) == u
    cheap = np.array(0x3F800000 | word >> 9, dtype=np.uint32).view(np.float32)
    assert np.float32(cheap - np.float32(1 - 2.0**-24)) == np.float32(u)


def test_gaussian_bound_is_reached_by_the_smallest_uniform_and_never_passed():
    assert pytest.approx(math.sqrt(-2 * math.log(2.0**-24)), rel=1e-15) == noise.GAUSSIAN_BOUND
    z = noise.gaussian(256, 2048, seed_of(11), 1)
    assert 4.5 < float(z.abs().max()) <= noise.GAUSSIAN_BOUND


def test_direction_picks_the_distribution():
    args = (3, 70, seed_of(4), 17, 2, 9)
    assert torch.equal(noise.direction(*args), noise.gaussian(*args))
    assert torch.equal(noise.direction(*args, "gaussian"), noise.gaussian(*args))
    assert torch.equal(noise.direction(*args, "rademacher"), noise.rademacher(*args))


# --- position only: tiles, order, offsets ---------------------------------------------------------


def draw(kind: str, rows: int, cols: int, seed: int, pid: int, r0: int, c0: int) -> torch.Tensor:
    if kind == "rounding":
        return noise.rounding_bits(rows, cols, seed_of(seed), pid, 1, r0, c0)
    return noise.direction(rows, cols, seed_of(seed), pid, r0, c0, kind)


KIND = st.sampled_from(["gaussian", "rademacher", "rounding"])


@given(
    kind=KIND,
    data=st.data(),
    rows=st.integers(1, 6),
    cols=st.integers(1, 1100),
    seed=U64,
    pid=U32,
)
@settings(max_examples=60)
def test_any_region_is_the_slice_of_the_whole(kind, data, rows, cols, seed, pid):
    base_row = data.draw(st.sampled_from([0, 1, 12345, 2**32 - 6]))
    base_col = data.draw(st.sampled_from([0, 3, 255, 1000, 2**34 - 1100]))
    whole = draw(kind, rows, cols, seed, pid, base_row, base_col)
    assert whole.shape == (rows, cols)
    r0 = data.draw(st.integers(0, rows - 1))
    r1 = data.draw(st.integers(r0, rows))
    c0 = data.draw(st.integers(0, cols - 1))
    c1 = data.draw(st.integers(c0, cols))
    part = draw(kind, r1 - r0, c1 - c0, seed, pid, base_row + r0, base_col + c0)
    assert torch.equal(part, whole[r0:r1, c0:c1])


@given(
    kind=KIND,
    cuts=st.lists(st.integers(1, 699), max_size=5),
    seed=U64,
    order=st.randoms(),
)
@settings(max_examples=30)
def test_tiles_in_any_order_make_the_whole(kind, cuts, seed, order):
    whole = draw(kind, 3, 700, seed, 8, 0, 0)
    edges = [0, *sorted(set(cuts)), 700]
    tiles = list(itertools.product([(0, 1), (1, 3)], itertools.pairwise(edges)))
    order.shuffle(tiles)
    built = torch.full_like(whole, 99)
    for (r0, r1), (c0, c1) in tiles:
        built[r0:r1, c0:c1] = draw(kind, r1 - r0, c1 - c0, seed, 8, r0, c0)
    assert torch.equal(built, whole)


def test_global_random_state_dtype_and_threads_do_not_matter():
    def all_of_it():
        return [draw(k, 5, 300, 21, 4, 0, 0) for k in ("gaussian", "rademacher", "rounding")]

    before = all_of_it()
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        torch.rand(7)
        moved = torch.get_rng_state()
        after = all_of_it()
        assert torch.equal(torch.get_rng_state(), moved)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, after, strict=True))


def test_empty_regions():
    for kind in ("gaussian", "rademacher", "rounding"):
        assert draw(kind, 0, 5, 1, 1, 0, 0).shape == (0, 5)
        assert draw(kind, 5, 0, 1, 1, 0, 300).shape == (5, 0)


# --- identity: seeds, names, shapes ---------------------------------------------------------------


@given(seed=U64)
@example(seed=2**63)
@example(seed=2**64 - 1)
def test_signed_seed_keeps_the_bits(seed):
    signed = noise.signed_seed(seed)
    assert -(2**63) <= signed < 2**63
    assert signed & (2**64 - 1) == seed
    assert noise.signed_seed(signed) == signed


@pytest.mark.parametrize("bad", [2**64, -(2**63) - 1, 10**30])
def test_signed_seed_out_of_range(bad):
    with pytest.raises(ValueError, match=rf"seed must fit in 64 bits.*got {bad}"):
        noise.signed_seed(bad)


@given(root=U64, a=U64, b=U32)
@example(root=0, a=2**64 - 1, b=2**32 - 1)
def test_derive_seed_is_two_words_of_its_own_stream(root, a, b):
    words = one_block(a & 0xFFFFFFFF, a >> 32, b, 3, root)
    got = noise.derive_seed(root, a, b)
    assert got & (2**64 - 1) == words[0] | words[1] << 32
    assert got == noise.derive_seed(noise.signed_seed(root), a, b)


def test_derived_seeds_differ():
    # 2**15 seeds of 64 bits collide by chance with probability 3e-11.
    seeds = {noise.derive_seed(r, a, b) for r in (0, 1) for a in range(2**10) for b in range(2**4)}
    assert len(seeds) == 2**15


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((1, -1), r"a must be in \[0, 2\*\*64\); got -1"),
        ((1, 2**64), r"a must be in \[0, 2\*\*64\); got 18446744073709551616"),
        ((1, 0, -1), r"b must be in \[0, 2\*\*32\); got -1"),
        ((1, 0, 2**32), r"b must be in \[0, 2\*\*32\); got 4294967296"),
        ((2**64, 0), "seed must fit in 64 bits"),
    ],
)
def test_derive_seed_errors(args, message):
    with pytest.raises(ValueError, match=message):
        noise.derive_seed(*args)


def test_parameter_id_is_the_start_of_sha256():
    # sha256("") = e3b0c442..., sha256("abc") = ba7816bf... (FIPS 180-4 examples)
    assert noise.parameter_id("") == 0x42C4B0E3
    assert noise.parameter_id("abc") == 0xBF1678BA
    assert noise.parameter_id("é") == noise.parameter_id(b"\xc3\xa9".decode())


def test_a_real_collision_is_refused():
    a, b = COLLIDING
    assert a != b
    assert noise.parameter_id(a) == noise.parameter_id(b) == 2121863620
    with pytest.raises(ValueError, match=r"layers\.2239.*layers\.2387.*0x7e7911c4.*same noise"):
        noise.parameter_ids(COLLIDING)


def test_parameter_ids():
    names = ["a.weight", "a.bias", "b.weight"]
    assert noise.parameter_ids(names) == {n: noise.parameter_id(n) for n in names}
    assert noise.parameter_ids(["a", "a"]) == {"a": noise.parameter_id("a")}
    assert noise.parameter_ids([]) == {}


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((), (1, 1)),
        ((7,), (1, 7)),
        ((3, 4), (3, 4)),
        ((2, 3, 4), (6, 4)),
        ((0, 5), (0, 5)),
    ],
)
def test_matrix_shape(shape, matrix):
    assert noise.matrix_shape(shape) == matrix
    assert noise.matrix_shape(torch.Size(shape)) == matrix


# --- statistics -----------------------------------------------------------------------------------

ROWS, COLS = 256, 4096
N = ROWS * COLS


@pytest.fixture(scope="module")
def normals() -> torch.Tensor:
    return noise.gaussian(ROWS, COLS, seed_of(20240607), 77)


def z_score(x: torch.Tensor, y: torch.Tensor) -> float:
    """sqrt(n) times the correlation of two equal-sized samples: standard normal if independent."""
    x, y = x.double().flatten(), y.double().flatten()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).mean() / (x.std() * y.std()) * math.sqrt(x.numel()))


@pytest.mark.parametrize(
    ("power", "mean", "variance"),
    # E z^p and Var z^p = E z^2p - (E z^p)^2 of a standard normal.
    [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)],
)
def test_moments(normals, power, mean, variance):
    got = float((normals.double() ** power).mean())
    assert abs(got - mean) < Z_BOUND * math.sqrt(variance / N)


def test_kolmogorov_smirnov(normals):
    assert scipy.stats.kstest(normals.double().flatten().numpy(), "norm").pvalue > P_BOUND


@pytest.mark.parametrize("j", range(4))
def test_each_output_of_a_call_is_normal(normals, j):
    part = normals.reshape(ROWS, COLS // 256, 4, 64)[:, :, j].double().flatten().numpy()
    assert scipy.stats.kstest(part, "norm").pvalue > P_BOUND


def test_tails(normals):
    # Two-sided tail counts are Poisson with the normal's mass (N is large, p small).
    for bound in (3.0, 4.0, 4.75):
        expected = N * math.erfc(bound / math.sqrt(2))
        count = int((normals.abs() > bound).sum())
        two_sided = 2 * min(
            scipy.stats.poisson.cdf(count, expected),
            scipy.stats.poisson.sf(count - 1, expected),
        )
        assert two_sided > P_BOUND, (bound, count, expected)


@pytest.mark.parametrize(("i", "j"), list(itertools.combinations(range(4), 2)))
def test_outputs_of_one_call_are_independent(normals, i, j):
    calls = normals.reshape(ROWS, COLS // 256, 4, 64)
    x, y = calls[:, :, i], calls[:, :, j]
    # Squares too: a pair of Box-Muller normals shares its radius.
    for f in (lambda v: v, torch.square, torch.abs, torch.sign):
        assert abs(z_score(f(x), f(y))) < Z_BOUND


@pytest.mark.parametrize("pair", [0, 1])
def test_angle_and_radius_of_a_pair(normals, pair):
    calls = normals.reshape(ROWS, COLS // 256, 4, 64).double()
    x, y = calls[:, :, 2 * pair].flatten(), calls[:, :, 2 * pair + 1].flatten()
    angle = torch.atan2(y, x) / (2 * math.pi) + 0.5
    assert scipy.stats.kstest(angle.numpy(), "uniform").pvalue > P_BOUND
    assert scipy.stats.kstest(((x**2 + y**2) / 2).numpy(), "expon").pvalue > P_BOUND
    assert abs(z_score(angle, x**2 + y**2)) < Z_BOUND


LAGS = [(0, 1), (0, 2), (0, 63), (0, 64), (0, 128), (0, 192), (0, 256), (0, 512)] + [
    (1, d) for d in (0, 1, 64, 256)
] + [(2, 0), (128, 0)]  # fmt: skip


@pytest.mark.parametrize("lag", LAGS)
def test_no_correlation_across_rows_and_columns(normals, lag):
    dr, dc = lag
    x, y = normals[: ROWS - dr, : COLS - dc], normals[dr:, dc:]
    assert abs(z_score(x, y)) < Z_BOUND
    assert abs(z_score(x**2, y**2)) < Z_BOUND


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("seed", "pid"),
    [
        (1, 77),
        (2, 77),
        (1 << 32, 77),
        (1 << 63, 77),
        (2**64 - 1, 77),
        (0, 76),
        (0, 0),
        (0, 77 << 16),
    ],
)
def test_neighbouring_seeds_and_parameters_are_independent(distribution, seed, pid):
    shape = (64, 1024)
    x = noise.direction(*shape, seed_of(0), 77, distribution=distribution)
    y = noise.direction(*shape, seed_of(seed), pid, distribution=distribution)
    assert abs(z_score(x, y)) < Z_BOUND
    # Nor is one a shifted or transposed copy of the other.
    assert abs(z_score(x[1:], y[:-1])) < Z_BOUND
    assert abs(z_score(x[:, 1:], y[:, :-1])) < Z_BOUND
    assert abs(z_score(x[:, :64], y[:, :64].T)) < Z_BOUND


def test_row_and_parameter_words_do_not_trade_places():
    # Counter words 1 and 2: (row 3, parameter 4) is not (row 4, parameter 3).
    x = noise.gaussian(1, 4096, seed_of(5), 4, row_offset=3)
    y = noise.gaussian(1, 4096, seed_of(5), 3, row_offset=4)
    assert abs(z_score(x, y)) < Z_BOUND


def test_seeds_of_consecutive_steps_give_independent_directions():
    seeds = [noise.derive_seed(42, step) for step in range(24)]
    z = torch.stack([noise.gaussian(4, 1024, seed_of(s), 1).flatten() for s in seeds]).double()
    gram = z @ z.T / z.shape[1] - torch.eye(24, dtype=torch.float64)
    off = gram[~torch.eye(24, dtype=torch.bool)] * math.sqrt(z.shape[1])
    assert float(off.abs().max()) < Z_BOUND  # 276 pairs: family-wise 2e-3, fixed seeds


@pytest.fixture(scope="module")
def signs() -> torch.Tensor:
    return noise.rademacher(ROWS, COLS, seed_of(31337), 5)


def test_signs_are_balanced(signs):
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.sum())) < Z_BOUND * math.sqrt(N)
    # Each of the 128 bits of a call.
    by_bit = signs.reshape(-1, 128).sum(0) / math.sqrt(N / 128)
    assert float(by_bit.abs().max()) < Z_BOUND


def test_sign_bytes_are_uniform(signs):
    packed = np.packbits((signs.numpy() < 0).astype(np.uint8), bitorder="little")
    counts = np.bincount(packed, minlength=256)
    assert scipy.stats.chisquare(counts).pvalue > P_BOUND


@pytest.mark.parametrize(
    "lag", [(0, 1), (0, 31), (0, 32), (0, 128), (0, 129), (1, 0), (1, 1), (2, 128)]
)
def test_signs_are_uncorrelated(signs, lag):
    dr, dc = lag
    assert abs(z_score(signs[: ROWS - dr, : COLS - dc], signs[dr:, dc:])) < Z_BOUND


@pytest.mark.parametrize("stream", [noise.STREAM_UPDATE_ROUNDING, noise.STREAM_PROBE_ROUNDING])
def test_rounding_bits_are_uniform_and_independent(stream):
    r = noise.rounding_bits(128, 2048, seed_of(7), 5, stream)
    assert r.dtype == torch.int64
    assert int(r.min()) >= 0 and int(r.max()) <= 0xFFFF
    flat = r.flatten().numpy()
    for byte in (flat & 0xFF, flat >> 8):
        assert scipy.stats.chisquare(np.bincount(byte, minlength=256)).pvalue > P_BOUND
    each_bit = (r.flatten()[:, None] >> torch.arange(16)) & 1
    bias = (each_bit.double().mean(0) - 0.5) * 2 * math.sqrt(r.numel())
    assert float(bias.abs().max()) < Z_BOUND
    low, high = r[:, :256], r[:, 256:512]  # the halves of the same words
    assert abs(z_score(low, high)) < Z_BOUND
    assert abs(z_score(r[:, 1:], r[:, :-1])) < Z_BOUND
    assert abs(z_score(r[1:], r[:-1])) < Z_BOUND


def test_streams_are_independent():
    seed, pid, shape = seed_of(7), 5, (64, 2048)
    streams = [noise.gaussian(*shape, seed, pid), noise.rademacher(*shape, seed, pid)]
    streams += [noise.rounding_bits(*shape, seed, pid, k) for k in (1, 2)]
    for x, y in itertools.combinations(streams[:1] + streams[2:], 2):
        assert abs(z_score(x, y)) < Z_BOUND
        assert abs(z_score(x.abs(), y)) < Z_BOUND
    for y in streams[2:]:
        assert abs(z_score(streams[1], y)) < Z_BOUND


# --- rounding -------------------------------------------------------------------------------------

LOW = [torch.bfloat16, torch.float16]


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """Representable values around a finite x, infinity counting as the one above the largest."""
    bits16 = torch.tensor(abs(x), dtype=torch.float32).to(dtype)
    raw = int(bits16.view(torch.int16))
    if float(bits16) > abs(x):
        raw -= 1
    exact = float(bits16) == abs(x)
    pair = torch.tensor([raw, raw if exact else raw + 1], dtype=torch.int16).view(dtype)
    lower, upper = pair.double().tolist()
    return (lower, upper) if math.copysign(1, x) > 0 else (-lower, -upper)


def finite32(limit: float) -> st.SearchStrategy[float]:
    return st.floats(-limit, limit, width=32)


ALL_BITS = torch.arange(65536)


@pytest.mark.parametrize("dtype", LOW)
@given(x=finite32(6.0e4))
@example(x=0.0)
@example(x=-0.0)
@example(x=2.0**-24)
@example(x=1023 * 2.0**-24)
@example(x=-(2.0**-14))
@example(x=float(np.float32(2.0**-14 - 2.0**-38)))
@example(x=2.0**-25)
@example(x=1e-30)
@example(x=float(np.float32(1e-40)))
@example(x=float(np.float32(1023.7 * 2.0**-24)))
@example(x=float(np.float32(0.1)))
@settings(max_examples=60)
def test_stochastic_rounding_goes_to_neighbours_without_bias(dtype, x):
    got = noise.round_to(torch.full((65536,), x), dtype, ALL_BITS).double()
    lower, upper = neighbours(x, dtype)
    assert set(got.unique().tolist()) <= {lower, upper}
    assert bool((torch.signbit(got) == (math.copysign(1, x) < 0)).all())
    if lower == upper:
        return
    chance = float((got == upper).double().mean())
    wanted = (x - lower) / (upper - lower)
    # 16 bits for bfloat16 are all there is below its last place: exact. Float16 drops 13 and the
    # subnormal grid may have more below it, so the chance is quantised to 2**-13.
    allowed = 2.0**-16 if dtype == torch.bfloat16 else 2.0**-13
    if abs(x) < torch.finfo(dtype).smallest_normal and dtype == torch.bfloat16:
        allowed = 2.0**-15
    assert abs(chance - wanted) <= allowed


@pytest.mark.parametrize("dtype", LOW)
def test_values_of_the_target_dtype_never_move(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)]
    for bits in (0, 1, 7, 8, 32767, 65528, 65534, 65535):
        got = noise.round_to(every.float(), dtype, torch.full((every.numel(),), bits))
        assert torch.equal(got.view(torch.int16), every.view(torch.int16)), bits


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("bits", [0, 1, 65535])
def test_infinities_and_nan_stay(dtype, bits):
    x = torch.tensor([math.inf, -math.inf, math.nan, -math.nan])
    got = noise.round_to(x, dtype, torch.full((4,), bits))
    assert got[:2].tolist() == [math.inf, -math.inf]
    assert bool(got[2:].isnan().all())
    # NaNs whose payload sits in the dropped low half, or that would carry into an infinity or zero.
    raw = torch.tensor([0x7F800001, 0x7FFFFFFF, 0xFF800001 - 2**32, -1], dtype=torch.int32)
    assert bool(
        noise.round_to(raw.view(torch.float32), dtype, torch.full((4,), bits)).isnan().all()
    )


@pytest.mark.parametrize("dtype", LOW)
def test_beyond_the_largest_finite_value(dtype):
    top = torch.finfo(dtype).max
    for sign in (1.0, -1.0):
        at = noise.round_to(torch.full((65536,), sign * top), dtype, ALL_BITS)
        assert bool((at.double() == sign * top).all())
        # Half-way to where the next value would be: the largest or infinity, half each.
        half = np.float32(top * (1 + torch.finfo(dtype).eps / 4 / (1 - torch.finfo(dtype).eps / 2)))
        got = noise.round_to(torch.full((65536,), float(sign * half)), dtype, ALL_BITS).double()
        assert set(got.unique().tolist()) == {sign * top, sign * math.inf}
        assert float((got.abs() == math.inf).double().mean()) == pytest.approx(0.5, abs=2.0**-12)
    if dtype == torch.float16:
        far = torch.tensor([65536.0, 1e6, -1e30, 3.4028234e38])
        got = noise.round_to(far, dtype, torch.zeros(4, dtype=torch.int64))
        assert got.tolist() == [math.inf, math.inf, -math.inf, math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_nearest_is_torchs_own(dtype):
    x = torch.randn(4096) * torch.logspace(-30, 4, 4096)
    assert torch.equal(noise.round_to(x, dtype), x.to(dtype))
    if dtype == torch.float32:
        assert torch.equal(noise.round_to(x, dtype, torch.full(x.shape, 65535)), x)


def test_round_to_takes_any_layout_and_broadcasting_bits():
    x = torch.randn(6, 40).T
    bits = torch.randint(0, 65536, (40, 6))
    for dtype in LOW:
        got = noise.round_to(x, dtype, bits)
        assert torch.equal(got, noise.round_to(x.contiguous(), dtype, bits))
        stacked = noise.round_to(torch.stack([x, -x]), dtype, bits)
        assert torch.equal(stacked[0], got)
        assert torch.equal(stacked[1], -got)


def test_round_to_other_dtype_is_an_error():
    with pytest.raises(
        ValueError, match=r"dtype must be float32, bfloat16 or float16; got torch\.f"
    ):
        noise.round_to(torch.zeros(1), torch.float8_e5m2, torch.zeros(1, dtype=torch.int64))


def test_contract_version():
    assert noise.CONTRACT_VERSION == 1
