"""Library layers through the lmms-eval model: answers, the quant card's figures, and the same answers again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bitquake.envelope import decode

Load = Callable[..., Any]
OURS = {"bitquake": {"envelope": True}}
CARDS = {  # format, bits, activation bits, bytes of a matrix of 32 x 32
    "bnb-nf4": ("bitsandbytes nf4", 4, None, 512 + 16 * 4),
    "bnb-nf4:bitsandbytes.double_quant=true": ("bitsandbytes nf4 double-quant", 4, None, 512 + 16 + 4 + 4),
    "bnb-fp4": ("bitsandbytes fp4", 4, None, 512 + 16 * 4),
    "bnb-int8": ("bitsandbytes int8", 8, 8, 1024 + 32 * 4),
    "torchao-int8": ("torchao int8", 8, None, 1024 + 32 * 5),
    "torchao-int8-dynamic": ("torchao int8-dynamic", 8, 8, 1024 + 32 * 5),
    "torchao-fp8": ("torchao fp8", 8, None, 1024 + 32 * 4),
}


@pytest.mark.parametrize("quant", CARDS)
def test_answers_and_card(load: Load, chat_task: Any, random_docs: Any, quant: str) -> None:
    pytest.importorskip("bitsandbytes" if quant.startswith("bnb") else "torchao")
    model, docs = load(quant=quant), random_docs(8)
    answers = [decode(text) for text in chat_task(docs, OURS).run(model)]
    assert [answer.error for answer in answers] == [None] * len(docs)
    plain = [decode(text) for text in chat_task(docs, OURS).run(load(quant="none"))]
    joint = [answer.confidence["joint"] for answer in answers]
    assert joint != [answer.confidence["joint"] for answer in plain]
    card = model.card
    assert (card.execution, len(card.modules)) == ("packed", 2 * 7)
    assert all(module.changed and module.component == "language" for module in card.modules)
    query = next(module for module in card.modules if module.name.endswith("layers.0.self_attn.q_proj"))
    assert (query.format, query.bits, query.activation_bits, query.n_bytes) == CARDS[quant]
    assert card.libraries.keys() >= {"bitsandbytes" if quant.startswith("bnb") else "torchao"}
    stored = sum(module.n_bytes for module in card.modules)
    rest = sum(part.n_bytes for part in card.components.values()) - stored
    n_rest = sum(part.n_parameters - part.n_quantized for part in card.components.values())
    assert rest == 4 * n_rest  # float32
    weights = sum(module.n_weights for module in card.modules)
    assert card.effective_bpw == pytest.approx((8 * stored + 32 * n_rest) / (weights + n_rest))


@pytest.mark.parametrize("quant", ["bnb-nf4", "torchao-fp8"])
def test_the_same_again(load: Load, chat_task: Any, random_docs: Any, quant: str) -> None:
    """Loaded and quantized anew: the same hash, and the same answers at another batch size."""
    docs = random_docs(8)
    one, other = load(quant=quant), load(quant=quant, batch_size=4)
    assert one is not other and one.model_hash == other.model_hash
    for a, b in zip(chat_task(docs, OURS).run(one), chat_task(docs, OURS).run(other), strict=True):
        assert decode(a).text == decode(b).text
        assert decode(a).confidence == pytest.approx(decode(b).confidence, abs=1e-4)
