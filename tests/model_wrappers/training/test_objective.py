"""The whole loss on real architectures: against plain computations, its switches, its state, and its refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bitquake.model_wrappers.components import component_map
from bitquake.model_wrappers.quantizers.plan import QuantizationError, resolve
from bitquake.model_wrappers.training import objective
from bitquake.model_wrappers.training.batch import TrainingBatch
from bitquake.model_wrappers.training.config import QatConfig, load_training
from bitquake.model_wrappers.training.distillation import confidence_gate, decoupled_divergence, relational_loss
from bitquake.model_wrappers.training.lsq import lsq_layers
from bitquake.model_wrappers.training.objective import (
    QatObjective,
    TeacherError,
    check_teacher,
    install,
    trained_spec,
)

NAMES = (
    "blip-2", "idefics3", "llava", "llava_onevision", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm",
)  # fmt: skip


def configuration(**changes: Any) -> QatConfig:
    values = {"method": "qat", "pretrained": "a/model", "data": "some_data", "steps": 1, "bits": 3, "group_size": 64}
    found = load_training({**values, **changes})
    assert isinstance(found, QatConfig)
    return found


def without_teacher(**changes: Any) -> QatConfig:
    return configuration(distillation=False, relational=False, **changes)


@pytest.fixture
def batch(tiny_architectures: Any) -> Callable[..., TrainingBatch]:
    def made(name: str, seed: int = 0) -> TrainingBatch:
        one = tiny_architectures.example(name, seed=seed)
        labels = torch.where(one.answer[None], one.inputs["input_ids"], -100)
        return TrainingBatch(one.inputs, labels, one.image[None])

    return made


def logits_and_states(model: Any, batch: TrainingBatch, layer: int = -2) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and labels where something is learned, and hidden states, the plain way."""
    result = model(**batch.inputs, output_hidden_states=True)
    states = (result.get("hidden_states") or result.language_model_outputs.hidden_states)[layer]
    learned = batch.labels[:, 1:] != -100
    return result.logits[:, :-1][learned], batch.labels[:, 1:][learned], states


# the loss


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_its_parts_on_every_architecture(
    tiny_architectures: Any, batch: Callable[..., TrainingBatch], name: str
) -> None:
    config = configuration(beta0=0.7, omega=3.0)
    student, teacher = tiny_architectures.make(name), tiny_architectures.make(name, text_blocks=4, seed=7)
    groups = install(student, config)
    one = batch(name)
    loss, parts = QatObjective(student, teacher, config)(one)
    loss.backward()
    ours, labels, our_states = logits_and_states(student, one)
    with torch.no_grad():
        theirs, _, their_states = logits_and_states(teacher, one)
    gate = confidence_gate(theirs)
    target, others = decoupled_divergence(ours, theirs, labels, 2.0)
    distilled = (gate * 4 * (target + 4 * others)).sum() / gate.sum()
    relations, n = relational_loss(our_states, their_states, one.visual)
    entropy = functional.cross_entropy(ours, labels)
    expected = {
        "ce": entropy, "gdkd": distilled, "tckd": 4 * target.mean(), "nckd": 4 * others.mean(), "gate": gate.mean(),
        "rcka": relations, "beta": torch.tensor(0.7), "omega": torch.tensor(3.0), "pictures": torch.tensor(float(n)),
        "loss": entropy + 0.7 * distilled + 3.0 * relations,
    }  # fmt: skip
    assert n >= 1
    assert parts == pytest.approx({key: value.item() for key, value in expected.items()}, rel=1e-4)
    assert loss.item() == pytest.approx(parts["loss"])
    learning = [p for group in groups for p in group["params"]]
    gradients = [p.grad for p in learning]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    # the same gradient as of the plain computation
    plain = torch.autograd.grad(expected["loss"], learning)
    for mine, theirs in zip(gradients, plain, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in teacher.parameters())


def test_logits_are_made_where_something_is_learned_alone(
    tiny_architectures: Any, batch: Callable[..., TrainingBatch]
) -> None:
    config = configuration()
    student, teacher = tiny_architectures.make("qwen2_vl"), tiny_architectures.make("qwen2_vl", seed=1)
    install(student, config)
    shapes = []
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda _, __, result: shapes.append(tuple(result.shape)))
    one = batch("qwen2_vl")
    QatObjective(student, teacher, config)(one)
    vocabulary = student.lm_head.out_features
    assert shapes == [(5, vocabulary), (5, vocabulary)]
    assert one.labels.shape[1] > 10


def test_pieces_of_many_logits_are_the_whole(
    tiny_architectures: Any, batch: Callable[..., TrainingBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration()
    found = []
    for chunk in (objective._CHUNK, 2 * 60):  # two rows of the tiny vocabulary
        monkeypatch.setattr(objective, "_CHUNK", chunk)
        student, teacher = (tiny_architectures.make("llava", seed=seed) for seed in (5, 6))
        install(student, config)
        loss, parts = QatObjective(student, teacher, config)(batch("llava"))
        loss.backward()
        found.append((parts, [p.grad for p in student.parameters() if p.grad is not None]))
    (whole, gradients), (pieces, others) = found
    assert pieces == pytest.approx(whole)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, others, strict=True))


SWITCHES: dict[str, dict[str, Any]] = {
    "grace": {},
    "plain": {"decoupled": False},
    "no gate": {"gate": False},
    "no relations": {"relational": False},
    "relations alone": {"distillation": False},
    "none": {"distillation": False, "relational": False},
}


def test_each_part_can_be_switched_off(tiny_architectures: Any, batch: Callable[..., TrainingBatch]) -> None:
    one, told = batch("smolvlm"), {}
    teacher = tiny_architectures.make("smolvlm", seed=8)
    for name, changes in SWITCHES.items():
        config = configuration(**changes)
        student = tiny_architectures.make("smolvlm")
        install(student, config)
        loss, told[name] = QatObjective(student, teacher if config.uses_teacher else None, config)(one)
        parts = told[name]
        assert loss.item() == pytest.approx(
            parts["ce"] + parts.get("beta", 0) * parts.get("gdkd", 0) + parts.get("omega", 0) * parts.get("rcka", 0)
        )
    answers, relations = {"gdkd", "beta"}, {"rcka", "omega", "pictures"}
    assert {name: set(parts) - {"loss", "ce"} for name, parts in told.items()} == {
        "grace": answers | relations | {"gate", "tckd", "nckd"},
        "plain": answers | relations | {"gate"},
        "no gate": answers | relations | {"tckd", "nckd"},
        "no relations": answers | {"gate", "tckd", "nckd"},
        "relations alone": relations,
        "none": set(),
    }
    student = tiny_architectures.make("smolvlm")
    install(student, configuration())
    with torch.no_grad():
        ours, labels, _ = logits_and_states(student, one)
        theirs = logits_and_states(teacher, one)[0]
    gate = confidence_gate(theirs)
    both = [functional.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="none", log_target=True).sum(-1)
            for a, b in ((ours / 2, theirs / 2),)]  # fmt: skip
    assert told["plain"]["gdkd"] == pytest.approx(((gate * 4 * both[0]).sum() / gate.sum()).item(), rel=1e-4)
    target, others = decoupled_divergence(ours, theirs, labels, 2.0)
    assert told["no gate"]["gdkd"] == pytest.approx((4 * (target + 4 * others)).mean().item(), rel=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 3, -1, -2, -4])
def test_relations_of_any_layer(tiny_architectures: Any, batch: Callable[..., TrainingBatch], layer: int) -> None:
    config = configuration(relational_layer=layer, distillation=False)
    student, teacher = tiny_architectures.make("qwen2_vl"), tiny_architectures.make("qwen2_vl", seed=9)
    one = batch("qwen2_vl")
    with torch.no_grad():
        expected = relational_loss(
            logits_and_states(student, one, layer)[2], logits_and_states(teacher, one, layer)[2], one.visual
        )[0]
        assert QatObjective(student, teacher, config)(one)[1]["rcka"] == pytest.approx(expected.item(), abs=1e-6)
    with pytest.raises(ValueError, match=r"relational_layer=5: .* has 3 blocks, so layers -4 to 3"):
        QatObjective(student, teacher, configuration(relational_layer=5))(one)


def test_a_larger_teacher_and_rows_for_no_token(tiny_architectures: Any, batch: Callable[..., TrainingBatch]) -> None:
    """Another hidden size and a vocabulary padded at the end change nothing about how losses are computed."""
    config, one = configuration(), batch("llava")
    student, narrow = tiny_architectures.make("llava"), tiny_architectures.make("llava", seed=6)
    install(student, config)
    expected = QatObjective(student, narrow, config)(one)[1]
    padded = copy.deepcopy(narrow)
    padded.resize_token_embeddings(narrow.lm_head.out_features + 24, mean_resizing=False)
    with torch.no_grad():
        padded.lm_head.weight[-24:] = 3.0
    assert QatObjective(student, padded, config)(one)[1] == pytest.approx(expected, rel=1e-5)

    wide = tiny_architectures.config("llava")
    wide.text_config.hidden_size, wide.text_config.head_dim = 48, 12
    torch.manual_seed(0)
    parts = QatObjective(student, type(student)(wide), config)(one)[1]
    assert parts["pictures"] == 1.0
    assert all(math.isfinite(value) for value in parts.values())


def test_gradient_checkpointing_changes_no_gradient(
    tiny_architectures: Any, batch: Callable[..., TrainingBatch]
) -> None:
    config, gradients = configuration(), []
    teacher = tiny_architectures.make("qwen2_vl", seed=6)
    for kept in (False, True):
        student = tiny_architectures.make("qwen2_vl")
        install(student, config)
        student.train()
        if kept:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        QatObjective(student, teacher, config)(batch("qwen2_vl"))[0].backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[1][name], g, atol=1e-6) for name, g in gradients[0].items())


# what learns


def test_install_quantizes_and_frees_what_the_configuration_names(tiny_architectures: Any) -> None:
    config = configuration(
        components="connector+language", trained="connector+language", rate=1e-4, scale_rate=3e-3, weight_decay=0.05
    )
    student = tiny_architectures.make("llava")
    targets = resolve(student, trained_spec(config))
    groups = {group["name"]: group for group in install(student, config)}
    assert list(lsq_layers(student)) == list(targets)
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "weights": (1e-4, 0.05), "vectors": (1e-4, 0.0), "scales": (3e-3, 0.0),
    }  # fmt: skip
    assert {id(p) for p in groups["scales"]["params"]} == {id(m.log_scale) for m in lsq_layers(student).values()}
    parts = component_map(student)
    learning = {id(p) for group in groups.values() for p in group["params"]}
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (id(parameter) in learning)
        assert parameter.requires_grad == (parts.component(name) != "vision")  # the head learns with the language model
    assert all(p.ndim == 1 for p in groups["vectors"]["params"])
    assert sum(len(group["params"]) for group in groups.values()) == len(learning)


def test_the_twin_keeps_its_linears(tiny_architectures: Any) -> None:
    student = tiny_architectures.make("idefics3")
    groups = install(student, configuration(bits=16))
    assert [group["name"] for group in groups] == ["weights", "vectors"]
    assert not lsq_layers(student)
    assert trained_spec(configuration(bits=16)).is_full_precision


def test_what_cannot_be_installed_is_named(tiny_architectures: Any) -> None:
    student = tiny_architectures.make("llava")
    with torch.no_grad():
        student.model.language_model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.up_proj \(shape \(48, 32\)\): 1 weights are NaN"):
        install(student, configuration())


def test_specs_say_which_losses_were_on() -> None:
    names = {
        "grace-int3-g64": {}, "qat-kd-int3-g64": {"gate": False}, "qat-int3-g64": {},
        "grace-int2-channel-asym": {"bits": 2, "group_size": "channel", "symmetric": False},
    }  # fmt: skip
    for name, changes in names.items():
        config = without_teacher(**changes) if name.startswith("qat-int") else configuration(**changes)
        assert trained_spec(config).name == name
    assert trained_spec(configuration(distillation=False)).name == "qat-kd-int3-g64"


# state


def test_the_controller_runs_once_for_each_step_and_goes_on(
    tiny_architectures: Any, batch: Callable[..., TrainingBatch]
) -> None:
    config = configuration(tau=1.0, eta=0.1, beta0=0.5, omega=2.0, omega_warmup=4)
    student, teacher = tiny_architectures.make("llava"), tiny_architectures.make("llava", seed=6)
    first = QatObjective(student, teacher, config)
    one = batch("llava")
    assert [first(one)[1][key] for key in ("beta", "omega")] == [0.5, 0.0]
    assert [first(one)[1][key] for key in ("beta", "omega")] == [0.5, 0.0]  # another pass of the same step
    first.after_step({"gdkd": 3.0})
    assert [first(one)[1][key] for key in ("beta", "omega")] == pytest.approx([0.7, 0.5])
    second = QatObjective(student, teacher, config)
    second.load_state_dict(first.state_dict())
    for each in (first, second):
        for _ in range(6):
            each.after_step({"gdkd": 1.0})
    assert second.state_dict() == first.state_dict()
    assert second.omega == 2.0
    assert second(one)[1] == first(one)[1]
    fixed = QatObjective(student, teacher, configuration(controller=False, beta0=0.5))
    fixed.after_step({"gdkd": 100.0})
    assert fixed(one)[1]["beta"] == 0.5


# refusals


def test_a_batch_that_teaches_nothing(tiny_architectures: Any, batch: Callable[..., TrainingBatch]) -> None:
    one = batch("llava")
    nothing = TrainingBatch(one.inputs, torch.full_like(one.labels, -100), one.visual)
    with pytest.raises(ValueError, match="batch of 1 examples: every label is -100"):
        QatObjective(tiny_architectures.make("llava"), None, without_teacher())(nothing)


def test_a_teacher_is_there_when_it_is_asked_and_only_then(tiny_architectures: Any) -> None:
    model = tiny_architectures.make("llava")
    with pytest.raises(TeacherError, match="a teacher where there is none"):
        QatObjective(model, None, configuration())
    with pytest.raises(TeacherError, match="asked nothing"):
        QatObjective(model, model, without_teacher())


def test_a_teacher_with_other_visual_tokens(tiny_architectures: Any, batch: Callable[..., TrainingBatch]) -> None:
    student = tiny_architectures.make("llava")
    config = tiny_architectures.config("llava")
    config.vision_config.patch_size = 16  # a fourth of the visual tokens
    teacher = type(student)(config)
    with pytest.raises(TeacherError, match=r"does not take what the student's processor makes \(.*student's family"):
        QatObjective(student, teacher, configuration())(batch("llava"))


def test_a_teacher_of_another_family_with_the_same_words(
    tiny_architectures: Any, batch: Callable[..., TrainingBatch]
) -> None:
    student, teacher = tiny_architectures.make("llava"), tiny_architectures.make("qwen2_vl")
    with pytest.raises(TeacherError, match="does not take what the student's processor makes"):
        QatObjective(student, teacher, configuration())(batch("llava"))


def test_tokenizers_are_compared_before_training(tiny_architectures: Any) -> None:
    processor = tiny_architectures.processor("llava")
    student, teacher = tiny_architectures.make("llava"), tiny_architectures.make("llava", seed=6)
    check_teacher(student, teacher, processor, processor)
    # a size of the model whose vocabulary is padded
    teacher.resize_token_embeddings(student.lm_head.out_features + 8, mean_resizing=False)
    check_teacher(student, teacher, processor, processor)

    def other(change: Callable[[Any], Any]) -> Any:
        tokenizer = copy.deepcopy(processor.tokenizer)
        change(tokenizer)
        return SimpleNamespace(tokenizer=tokenizer)

    more = other(lambda tokenizer: tokenizer.add_tokens(["zebra"]))
    with pytest.raises(
        TeacherError, match=r"tokenizers: 1 of \d+ tokens differ, the first is 'zebra' \(none of the st"
    ):
        check_teacher(student, teacher, processor, more)

    def exchanged(tokenizer: Any) -> None:
        import json

        from tokenizers import Tokenizer

        told = json.loads(tokenizer.backend_tokenizer.to_str())
        words = told["model"]["vocab"]
        words["red"], words["green"] = words["green"], words["red"]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(told))

    with pytest.raises(TeacherError, match=r"2 of \d+ tokens differ, the first is 'green' \(number \d+ of the student"):
        check_teacher(student, teacher, processor, other(exchanged))

    def cut_otherwise(tokenizer: Any) -> None:
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    with pytest.raises(TeacherError, match="other rules that cut a text"):
        check_teacher(student, teacher, processor, other(cut_otherwise))

    teacher.config.image_token_id = 9
    with pytest.raises(TeacherError, match="image token 4 of the student's, 9 of the teacher's"):
        check_teacher(student, teacher, processor, processor)
    teacher.config.image_token_id = 4
    student.resize_token_embeddings(20, mean_resizing=False)
    with pytest.raises(TeacherError, match="has no logit in a model of 20"):
        check_teacher(student, teacher, processor, processor)
