"""Calibration samples as inputs of the nine architectures: what each position of the language model's sequence is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bitquake.model_wrappers.calibration import CalibrationError, CalibrationInputs, CalibrationSample
from bitquake.model_wrappers.calibration.captioning import Captioner
from bitquake.model_wrappers.calibration.encoding import DOCUMENT_TOKENS, Encoder
from bitquake.model_wrappers.calibration.sample import SampleError
from bitquake.model_wrappers.components import ARCHITECTURES
from bitquake.model_wrappers.loading import ONLY_WITH_IMAGE, load_processor
from bitquake.model_wrappers.retrieval import CACHED, encode_prompt

NAMES = sorted(CACHED)
ANSWER = "a man runs with dog"


def picture(seed: int, size: tuple[int, int] = (50, 70)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def built(tiny_architectures: Any) -> Any:
    """``built(name)``: model, processor as our loader gives it, and encoder of an architecture."""
    made: dict[str, Any] = {}

    def built(name: str) -> Any:
        if name not in made:
            path = str(tiny_architectures.checkpoint(name))
            model, processor = tiny_architectures.make(name), None
            processor = load_processor(path, revision=None, trust_remote_code=False)
            made[name] = model, processor, Encoder(model, processor)
        return made[name]

    return built


def first_inputs(model: Any, inputs: CalibrationInputs) -> torch.Tensor:
    """What the language model's first block gets, (T, width): embeddings of text and image features."""
    language = next(part for part in ARCHITECTURES[model.config.model_type] if part.component == "language")
    stacks = [stack.path for stack in language.stacks]
    blocks = next(m for path in stacks for name, m in model.named_modules() if name == path)
    caught: list[torch.Tensor] = []
    hook = blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs.inputs)
    hook.remove()
    return caught[0][0]


@pytest.mark.parametrize("name", NAMES)
def test_image_features_stand_where_the_mask_says(built: Any, name: str) -> None:
    model, _, encoder = built(name)
    one, other = (encoder.encode(CalibrationSample((picture(seed),), "what is there", ANSWER)) for seed in (1, 2))
    assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
    a, b = first_inputs(model, one), first_inputs(model, other)
    assert a.shape[0] == len(one.vision) == len(one.answer)
    changed = (a != b).any(dim=1)
    if name == "llava_onevision":  # the end of a row of patches is the same learned vector in every picture
        newline = (a == model.model.image_newline).all(dim=1)
        assert newline.any() and not (newline & changed).any()
        changed |= newline
    assert torch.equal(changed, one.vision)  # another picture changes these positions, and no others
    assert one.vision.any() and not (one.vision & one.answer).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_scores_what_retrieval_gives_it(built: Any, tiny_architectures: Any, name: str) -> None:
    """Retrieval encodes prompt and caption in other ways (a cache), which its own tests check."""
    model, processor, encoder = built(name)
    sample = CalibrationSample((picture(3),), "what is there", ANSWER)
    encoded = encoder.encode(sample)
    tokens = encoded.inputs["input_ids"][0][encoded.answer].tolist()
    assert processor.tokenizer.decode(tokens[:-1]).split() == ANSWER.split()
    assert tokens[-1] == tiny_architectures.end
    asked = encoder.encode(CalibrationSample(sample.images, sample.prompt, None))
    assert not asked.answer.any()
    with torch.no_grad():
        logits = model(**encoded.inputs).logits[0].log_softmax(dim=-1)
        at = encoded.answer.nonzero()[:, 0]
        got = logits[at - 1, encoded.inputs["input_ids"][0][at]]
        (wanted,) = encode_prompt(model, asked.inputs, use_cache=True).log_probs([tokens])
    assert got.numpy() == pytest.approx(wanted, abs=2e-4)
    assert np.ptp(wanted) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_text_without_pictures(built: Any, name: str) -> None:
    model, processor, encoder = built(name)
    talk = CalibrationSample((), "what is there", ANSWER)
    document = CalibrationSample((), "a big dog sits " * 200, None)
    if name in ONLY_WITH_IMAGE:
        for sample in (talk, document):
            with pytest.raises(CalibrationError, match="takes no text without a picture"):
                encoder.encode(sample)
        return
    got, long = encoder.encode(talk), encoder.encode(document)
    assert not got.vision.any() and got.answer.sum() == len(ANSWER.split()) + 1
    assert "assistant" in processor.tokenizer.decode(got.inputs["input_ids"][0])
    assert len(long.vision) == DOCUMENT_TOKENS and not long.vision.any() and not long.answer.any()
    words = processor.tokenizer.decode(long.inputs["input_ids"][0]).split()
    assert words[-4:] == ["a", "big", "dog", "sits"] and "assistant" not in words
    with torch.no_grad():
        assert model(**long.inputs).logits.shape[1] == DOCUMENT_TOKENS


@pytest.mark.parametrize("name", ["qwen2_vl", "blip-2", "idefics3"])
def test_a_model_s_own_captions(built: Any, name: str) -> None:
    model, processor, encoder = built(name)
    own, inner = model.generation_config, getattr(model, "model", None)
    captioner = Captioner(model, processor.tokenizer, encoder, 6)
    sample = CalibrationSample((picture(4),), "what is there", None)
    said = captioner.caption(sample)
    assert said == captioner.caption(sample) and said.answer
    assert model.generation_config is own and getattr(inner, "rope_deltas", None) is None
    # each of its words is the likeliest one after those before it
    encoded = encoder.encode(said)
    with torch.no_grad():
        best = model(**encoded.inputs).logits[0].argmax(dim=-1)
    at = encoded.answer.nonzero()[:-1, 0]
    assert torch.equal(best[at - 1], encoded.inputs["input_ids"][0][at])
    other = Captioner(model, processor.tokenizer, encoder, 7)
    assert other.identity != captioner.identity
    with torch.no_grad():
        model.get_input_embeddings().weight[20] += 1
        changed = Captioner(model, processor.tokenizer, encoder, 6).identity
        model.get_input_embeddings().weight[20] -= 1
    assert changed["weights"] != captioner.identity["weights"]


def test_what_cannot_be_encoded(built: Any) -> None:
    model, processor, encoder = built("llava")
    for answer in ("<image>", " "):
        with pytest.raises(SampleError, match=r"the answer .* cannot be encoded"):
            encoder.encode(CalibrationSample((picture(1),), "what", answer))
    blind = SimpleNamespace(
        config=SimpleNamespace(model_type="llava", image_token_id=77), generation_config=model.generation_config
    )
    with pytest.raises(CalibrationError, match="gives pictures no tokens"):
        Encoder(blind, processor).encode(CalibrationSample((picture(1),), "what", ANSWER))


@pytest.mark.parametrize(("name", "size"), [("qwen2_vl", (48, 24)), ("llava", (32, 32)), ("blip-2", (32, 32))])
def test_the_size_that_boxes_may_count_from(built: Any, name: str, size: tuple[int, int]) -> None:
    encoder = built(name)[2]
    assert encoder.processed_size(picture(1, (24, 48))) == size
    grid = encoder.encode(CalibrationSample((picture(1, (24, 48)),), "what", None)).inputs.get("image_grid_thw")
    assert grid is None or [4 * int(side) for side in (grid[0, 2], grid[0, 1])] == list(size)  # patches of 4 pixels


def test_identity_does_not_change_with_use(built: Any, tiny_architectures: Any) -> None:
    path = str(tiny_architectures.checkpoint("idefics3"))
    fresh = Encoder(built("idefics3")[0], load_processor(path, revision=None, trust_remote_code=False))
    before = fresh.identity
    fresh.encode(CalibrationSample((picture(1),), "what", ANSWER))
    again = Encoder(built("idefics3")[0], fresh._processor)
    assert again.identity == before == built("idefics3")[2].identity
    assert fresh.processed_size(picture(1, (32, 64))) == (64, 32)
