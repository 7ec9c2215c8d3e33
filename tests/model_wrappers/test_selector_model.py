"""The Selector's file and its prediction."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy.special import expit
from scipy.special import logit as scipy_logit

from bitquake.model_wrappers.calibration.overlap import OverlapError, ids_hash
from bitquake.model_wrappers.selector.features import Features
from bitquake.model_wrappers.selector.model import (
    Member,
    Selector,
    SelectorCard,
    SelectorError,
    TrainedOn,
    Validation,
    answer_scalars,
    image_names,
    input_width,
    logit,
    sigmoid,
)
from bitquake.quant_card import QuantCard

D, HIDDEN = 5, 7
IMAGES = frozenset({"pixels:aa", "world:1"})


def make(*, members: int = 2, projection: int | None = None, name: str = "selector", seed: int = 0) -> Selector:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32).astype(np.float64)

    width = input_width(D, projection)
    networks = tuple(
        Member(
            (normal(HIDDEN, width), normal(HIDDEN, HIDDEN), normal(1, HIDDEN)),
            (normal(HIDDEN), normal(HIDDEN), normal(1)), normal(1), normal(1),
        )
        for _ in range(members)
    )  # fmt: skip
    card = SelectorCard(
        name=name, subject="tiny", hidden_size=D, joint="joint", projection=projection,
        trained_on=[TrainedOn(quant="rtn-int4", model_hash="m", weights_hash="w4", tasks=["block_vqav2_dev"], n=9)],
        datasets_hash="d", image_ids_hash=ids_hash(IMAGES),
        validation=Validation(n=9, n_images=3, aurc=0.1, aurc_maxprob=0.2, ece=0.1, ece_maxprob=0.2),
        options={"seed": 0}, bitquake="0",
    )  # fmt: skip
    matrix = None if projection is None else rng.normal(size=(3 * D, projection)).astype(np.float32)
    return Selector(card, networks, matrix, IMAGES)


def samples(n: int = 20, seed: int = 1) -> tuple[Features, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    states = (rng.normal(scale=30, size=(n, D)).astype(np.float32) for _ in range(3))
    joint = rng.uniform(0.1, 1, size=n)
    return Features(*states, rng.uniform(size=n) < 0.5), joint, np.log(joint) / 3


@pytest.mark.parametrize("projection", [None, 4])
def test_prediction_is_that_of_the_same_network_in_torch(projection: int | None) -> None:
    """Written out with torch's own LayerNorm and Linear, on states as the shards hold them."""
    selector = make(projection=projection)
    features, joint, mean = samples()
    halves = [torch.from_numpy(states.astype(np.float16).astype(np.float64)) for states in features[:3]]
    inputs = torch.cat([torch.nn.functional.layer_norm(states, (D,), eps=1e-5) for states in halves], dim=1)
    if selector.projection is not None:
        inputs = inputs @ torch.from_numpy(selector.projection).double()
    clipped = np.clip(joint, 1e-6, 1 - 1e-6)
    scalars = np.stack([scipy_logit(clipped), mean, features.has_image], axis=1)
    inputs = torch.cat([inputs, torch.from_numpy(scalars)], dim=1)
    logits = []
    for member in selector.members:
        hidden = inputs
        for i in range(3):
            hidden = torch.nn.functional.linear(
                hidden, torch.from_numpy(member.weights[i]), torch.from_numpy(member.biases[i])
            )
            hidden = torch.relu(hidden) if i < 2 else hidden
        logits.append(hidden[:, 0].numpy() + member.scale * scalars[:, 0] + member.offset)
    np.testing.assert_allclose(selector.predict(features, joint, mean), expit(np.mean(logits, axis=0)), atol=1e-5)


@pytest.mark.parametrize("projection", [None, 4])
def test_a_file_gives_back_the_same_selector_and_the_same_bytes(tmp_path: Path, projection: int | None) -> None:
    selector = make(projection=projection)
    first = selector.save(tmp_path / "one.safetensors")
    loaded = Selector.load(first)
    assert loaded.card == selector.card
    assert loaded.image_ids == IMAGES
    np.testing.assert_array_equal(loaded.predict(*samples()), selector.predict(*samples()))
    assert loaded.save(tmp_path / "two.safetensors").read_bytes() == first.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_neighbours_and_order_do_not_change_a_confidence() -> None:
    selector = make()
    features, joint, mean = samples(50)
    whole = selector.predict(features, joint, mean)
    order = np.random.default_rng(3).permutation(50)
    np.testing.assert_allclose(
        selector.predict(features.rows(order), joint[order], mean[order]), whole[order], atol=1e-12
    )
    alone = [selector.predict(features.rows(slice(i, i + 1)), joint[i : i + 1], mean[i : i + 1])[0] for i in range(50)]
    np.testing.assert_allclose(alone, whole, atol=1e-12)


def test_states_are_rounded_as_they_are_stored_and_clamped() -> None:
    selector = make()
    features, joint, mean = samples()
    stored = Features(*(s.astype(np.float16).astype(np.float32) for s in features[:3]), features.has_image)
    np.testing.assert_array_equal(selector.predict(features, joint, mean), selector.predict(stored, joint, mean))
    huge = features._replace(first=np.full_like(features.first, 1e30))
    assert np.isfinite(selector.predict(huge, joint, mean)).all()


def test_what_is_missing_has_no_confidence_and_costs_no_other() -> None:
    selector = make()
    features, joint, mean = samples()
    whole = selector.predict(features, joint, mean)
    joint[3], mean[5] = np.nan, -np.inf
    features.question[7, 0] = np.nan
    told = selector.predict(features, joint, mean)
    assert np.flatnonzero(np.isnan(told)).tolist() == [3, 5, 7]
    left = ~np.isnan(told)
    np.testing.assert_allclose(told[left], whole[left], atol=1e-12)
    none = Features(*(np.zeros((0, D), np.float32),) * 3, np.zeros(0, np.bool_))
    assert selector.predict(none, [], []).shape == (0,)


@given(st.floats(-800, 800), st.floats(0, 1))
def test_logit_and_sigmoid_are_scipys(x: float, p: float) -> None:
    assert sigmoid(np.array([x]))[0] == pytest.approx(expit(x), abs=1e-15, rel=1e-12)
    assert logit(np.array([p]))[0] == pytest.approx(scipy_logit(min(max(p, 1e-6), 1 - 1e-6)), abs=1e-9)


def test_scalars_of_an_answer() -> None:
    assert answer_scalars({"joint": 0.25, "geometric_mean": 0.5}, "joint") == (0.25, pytest.approx(np.log(0.5)))
    assert answer_scalars({"joint": 0.25, "geometric_mean": None}, "joint") == (0.25, pytest.approx(np.log(0.25)))
    assert answer_scalars({"joint": 0.2, "options": 0.9, "geometric_mean": 0.3}, "options")[0] == 0.9
    assert np.isnan(answer_scalars({"joint": None}, "joint")).all()
    assert np.isfinite(answer_scalars({"joint": 0.0, "geometric_mean": 0.0}, "joint")).all()


def card(**changes: Any) -> QuantCard:
    fields: dict[str, Any] = {
        "pretrained": "tiny", "architecture": "X", "dtype": "bfloat16", "spec_name": "rtn-int4", "method": "rtn",
        "execution": "simulated", "kernel": "", "components": {}, "nominal_bpw": 4, "effective_bpw": 4,
        "weights_hash": "w4",
    }  # fmt: skip
    return QuantCard(**{**fields, **changes})


def test_a_selector_knows_its_model() -> None:
    own, moved = make(), make(name="selector_transfer")
    own.check_model(card(), D)
    own.check_model(card(execution="packed", spec={"execution": "packed"}), D)
    with pytest.raises(SelectorError, match=r"fitted on tiny; this run is of other"):
        moved.check_model(card(pretrained="other"), D)
    with pytest.raises(SelectorError, match="states of 5 numbers, those of tiny have 96"):
        moved.check_model(card(), 96)
    with pytest.raises(SelectorError, match=r"fitted on rtn-int4, and this run is of rtn-int3"):
        own.check_model(card(weights_hash="w3", spec_name="rtn-int3"), D)
    moved.check_model(card(weights_hash="w3"), D)
    features, joint, mean = samples()
    wide = Features(*(np.ones((20, 96), np.float32),) * 3, features.has_image)
    with pytest.raises(SelectorError, match="fitted on states of 5 numbers"):
        own.predict(wide, joint, mean)
    assert own.renamed("selector_transfer").card == moved.card
    with pytest.raises(SelectorError, match="expected one of selector, selector_transfer, selector_mixture"):
        own.renamed("mine")


def test_pictures_that_it_saw_are_refused() -> None:
    selector = make()
    selector.refuse_overlap(image_names("world", "2", ["bb"]), "task t, document 0")
    for seen in (image_names("world", "1", ["bb"]), image_names("world", "2", ["aa"])):
        with pytest.raises(OverlapError, match=r"task t, document 0: its picture .*\(block_vqav2_dev\)"):
            selector.refuse_overlap(seen, "task t, document 0")


def change_meta(file: Path, **changes: Any) -> None:
    from safetensors import safe_open

    with safe_open(str(file), framework="numpy") as opened:
        said = json.loads(opened.metadata()["bitquake"])
    save_file(load_file(str(file)), str(file), metadata={"bitquake": json.dumps(said | changes)})


def drop(file: Path, name: str, **new: Any) -> None:
    from safetensors import safe_open

    with safe_open(str(file), framework="numpy") as opened:
        meta = opened.metadata()
    tensors = {key: value for key, value in load_file(str(file)).items() if key != name}
    save_file(tensors | new, str(file), metadata=meta)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.unlink(), "is not there"),
        (lambda f: f.write_bytes(f.read_bytes()[:-40]), "cannot be read"),
        (lambda f: f.write_bytes(b"{}"), "cannot be read"),
        (lambda f: change_meta(f, version=99), "a selector of version 99"),
        (lambda f: change_meta(f, kind="features"), "is no selector"),
        (lambda f: change_meta(f, hidden_size=-1), "damaged"),
        (lambda f: change_meta(f, hidden_size=6), "do not fit"),
        (lambda f: change_meta(f, projection=4), "do not fit"),
        (lambda f: change_meta(f, surprise=1), "damaged"),
        (lambda f: change_meta(f, image_ids_hash="0" * 32), "pictures' names"),
        (lambda f: save_file({"x": np.zeros(1)}, str(f)), "no selector"),
        (lambda f: drop(f, "member.1.layer.2.bias"), "do not fit"),
        (lambda f: drop(f, "member.0.layer.1.weight", **{"member.0.layer.1.weight": np.zeros((3, 3))}), "do not fit"),
        (lambda f: drop(f, "member.0.offset", **{"member.0.offset": np.array([np.nan])}), "do not fit"),
        (lambda f: drop(f, "image_ids"), "do not fit"),
    ],
)
def test_a_file_that_is_damaged_or_something_else_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    file = make().save(tmp_path / "one.safetensors")
    damage(file)
    with pytest.raises(SelectorError, match=message) as caught:
        Selector.load(file)
    assert str(file) in str(caught.value)


def test_reading_a_selector_loads_no_torch(tmp_path: Path) -> None:
    file = make().save(tmp_path / "one.safetensors")
    code = (
        "import sys; from pathlib import Path; from bitquake.model_wrappers.selector.model import Selector; "
        f"Selector.load(Path({str(file)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
