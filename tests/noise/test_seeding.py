"""The random stream against an independent, pure Python PCG64, and the key's digest against its definition."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquake.noise import NoiseError, SampleKey
from bitquake.noise.seeding import RandomStream, sample_digest

MASK = (1 << 128) - 1
MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645


def pcg64_integers(entropy: list[int], count: int) -> list[int]:
    """O'Neill's PCG XSL RR 128/64, seeded as NumPy documents it, written from the definition."""
    words = [int(word) for word in np.random.SeedSequence(entropy).generate_state(4, np.uint64)]
    increment = (((words[2] << 64 | words[3]) << 1) | 1) & MASK
    state = increment  # one step from 0
    state = (state + (words[0] << 64 | words[1])) & MASK
    state = (state * MULTIPLIER + increment) & MASK
    out = []
    for _ in range(count):
        state = (state * MULTIPLIER + increment) & MASK
        mixed, turn = (state >> 64) ^ (state & (2**64 - 1)), state >> 122
        out.append((mixed >> turn | mixed << (64 - turn)) & (2**64 - 1))
    return out


def test_stream_is_pcg64_split_into_16_bit_words_low_word_first() -> None:
    key = SampleKey("vqav2", "validation", "42")
    raw = pcg64_integers([7, sample_digest(key), 3], 6)
    expected = [word >> shift & 0xFFFF for word in raw for shift in (0, 16, 32, 48)]
    stream = RandomStream(7, key, 3)
    first, second = stream.uint16(10), stream.uint16(9)
    assert first.dtype == np.uint16
    assert first.tolist() == expected[:10]
    assert second.tolist() == expected[12:21]  # a call starts at a fresh 64-bit integer
    assert stream.uint16(0).shape == (0,)


def test_digest_is_blake2b_of_the_length_prefixed_parts() -> None:
    text = b"".join(len(part).to_bytes(8, "little") + part for part in (b"d", b"test", "ü".encode()))
    expected = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    assert sample_digest(SampleKey("d", "test", "ü")) == expected


keys = st.tuples(st.text(max_size=5), st.text(max_size=5), st.text(max_size=5)).map(lambda parts: SampleKey(*parts))


@given(keys, keys)
def test_distinct_keys_have_distinct_digests(one: SampleKey, two: SampleKey) -> None:
    assert (sample_digest(one) == sample_digest(two)) == (one == two)


def test_parts_do_not_run_together() -> None:
    assert (
        len({sample_digest(SampleKey(*parts)) for parts in (("ab", "c", "d"), ("a", "bc", "d"), ("a", "b", "cd"))}) == 3
    )


def test_seed_key_and_noise_id_each_change_the_stream() -> None:
    key = SampleKey("d", "s", "1")
    streams = [RandomStream(0, key, 1), RandomStream(1, key, 1), RandomStream(0, key, 2)]
    streams += [RandomStream(0, SampleKey("d", "s", str(i)), 1) for i in range(2, 50)]
    assert len({stream.uint16(8).tobytes() for stream in streams}) == len(streams)


@pytest.mark.parametrize("key", [None, "42", ("a", "b"), ("a", "b", 42), SampleKey("a", "b", 42), ["a", "b", "c"]])
def test_bad_keys_are_refused(key: object) -> None:
    with pytest.raises(NoiseError, match="three strings"):
        sample_digest(key)  # type: ignore[arg-type]


def test_uniform_and_independent_across_samples() -> None:
    from scipy import stats

    fields = np.stack([RandomStream(0, SampleKey("d", "s", str(i)), 1).uint16(20_000) for i in range(4)])
    assert stats.kstest((fields.ravel() + 0.5) / 65536, "uniform").pvalue > 1e-3
    correlation = np.corrcoef(fields.astype(float))
    assert np.abs(correlation - np.eye(4)).max() < 4 / np.sqrt(20_000)
