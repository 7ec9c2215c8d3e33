"""The batch size must not change answers or confidences; stated tolerances per dtype.

float32: every answer equal, confidences within 1e-5. bfloat16 (8 significant bits) and float16 (11 bits) round
differently when a matrix product is cut differently: at least 98% of answers equal, and the confidences of these within
0.05 and 0.02. Measured on 200 random questions at batch 1 against 8: 1.6e-6, 0.021 and 0.004.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bitquake.envelope import Envelope, decode

Load = Callable[..., Any]
OURS = {"bitquake": {"envelope": True}}


def answers(task: Any, model: Any, **gen_kwargs: object) -> list[Envelope]:
    return [decode(response) for response in task.run(model, **gen_kwargs)]


def largest_difference(one: list[Envelope], other: list[Envelope]) -> float:
    """Over the confidences of equal answers."""
    return max(
        abs(value - b.confidence[name])
        for a, b in zip(one, other, strict=True)
        if a.text == b.text
        for name, value in a.confidence.items()
        if value is not None
    )


@pytest.mark.parametrize(
    ("dtype", "equal", "tolerance"), [("float32", 1.0, 1e-5), ("bfloat16", 0.98, 0.05), ("float16", 0.98, 0.02)]
)
@pytest.mark.parametrize("quant", ["none", "rtn-int4-g64"])
def test_batch_1_and_batch_8_agree(
    load: Load, chat_task: Any, random_docs: Any, dtype: str, equal: float, tolerance: float, quant: str
) -> None:
    docs = random_docs(60, text_only_every=9)
    one = answers(chat_task(docs, OURS), load(dtype=dtype, quant=quant, batch_size=1))
    eight = answers(chat_task(docs, OURS), load(dtype=dtype, quant=quant, batch_size=8))
    assert sum(a.text == b.text for a, b in zip(one, eight, strict=True)) >= equal * len(docs)
    assert largest_difference(one, eight) <= tolerance
    for a, b in zip(one, eight, strict=True):
        assert (a.pixel_hash, a.prompt_hash, a.processed_sizes) == (b.pixel_hash, b.prompt_hash, b.processed_sizes)


def test_padding_on_the_right_would_be_noticed(load: Load, chat_task: Any, random_docs: Any) -> None:
    """The control of the test above: short prompts padded on the right are continued after their padding."""
    docs = random_docs(30)
    model = load(batch_size=8, workers=1)
    left = answers(chat_task(docs, OURS), model)
    model.tokenizer.padding_side = "right"
    try:
        right = answers(chat_task(docs, OURS), model)
    finally:
        model.tokenizer.padding_side = "left"
    assert any(a.text != b.text for a, b in zip(left, right, strict=True))


def test_threads_change_nothing(load: Load, chat_task: Any, random_docs: Any) -> None:
    docs = random_docs(40, text_only_every=5)
    runs = [chat_task(docs, OURS).run(load(batch_size=4, workers=n)) for n in (0, 1, 4)]
    assert runs[0] == runs[1] == runs[2]


def test_without_key_value_cache(load: Load, chat_task: Any, random_docs: Any) -> None:
    docs = random_docs(12)
    with_cache = answers(chat_task(docs, OURS), load(batch_size=4))
    without = answers(chat_task(docs, OURS), load(batch_size=4, use_cache=False))
    assert [a.text for a in with_cache] == [b.text for b in without]
    assert largest_difference(with_cache, without) <= 1e-5
