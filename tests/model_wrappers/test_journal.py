"""A killed run, resumed, against an undisturbed one; and what must never come out of a journal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitquake.envelope import decode
from bitquake.model_wrappers.bitquake_hf import BitquakeHF
from bitquake.model_wrappers.journal import Journal, JournalAnswer, digest
from bitquake.noise import ImageError

OURS = {"bitquake": {"envelope": True, "protocol": "vqa"}}
KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import ChatTask, random_docs
from bitquake.model_wrappers.bitquake_hf import BitquakeHF

model = BitquakeHF(
    pretrained=sys.argv[2], artifacts=sys.argv[3], journal=sys.argv[4], dtype="float32", device="cpu", batch_size=4
)
ChatTask(random_docs(600, text_only_every=7), {"bitquake": {"envelope": True, "protocol": "vqa"}}).run(model)
"""


class Device:
    """Counts the batches, and their samples, that reach the model."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        generate = model._model.generate

        def counted(**arguments: Any) -> Any:
            self.batches.append(len(arguments["input_ids"]))
            return generate(**arguments)

        monkeypatch.setattr(model._model, "generate", counted)


@pytest.fixture
def new(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Device]]:
    """``new(**arguments)``: another wrapper, as another process would load it, with a journal, and its device."""

    def new(**arguments: Any) -> tuple[Any, Device]:
        defaults = {"pretrained": str(tiny_checkpoint), "dtype": "float32", "device": "cpu", "batch_size": 4}
        places = {"artifacts": str(tmp_path / "artifacts"), "journal": str(tmp_path / "journal")}
        model = BitquakeHF(**{**defaults, **places, **arguments})
        return model, Device(model, monkeypatch)

    return new


def test_a_killed_run_resumes_to_the_bits_of_an_undisturbed_one(
    new: Any, tiny_checkpoint: Path, chat_task: Any, random_docs: Any, tmp_path: Path, log: list[str], capsys: Any
) -> None:
    arguments = [Path(__file__).parent, tiny_checkpoint, tmp_path / "artifacts", tmp_path / "journal"]
    # threads cut matrix products differently, and change their last bits
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, arguments)], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    shards: list[Path] = []
    while process.poll() is None and time.monotonic() < deadline:
        shards = list((tmp_path / "journal").glob("*/*.jsonl"))
        if shards and shards[0].read_bytes().count(b"\n") >= 20:
            break
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (shard,) = shards
    shard.write_bytes(shard.read_bytes().rstrip()[:-7])  # the last line torn, wherever the kill fell
    kept = shard.read_bytes().count(b"\n")

    task = chat_task(random_docs(600, text_only_every=7), OURS)
    plain, device = new(journal=None)
    undisturbed = task.run(plain)
    batches = len(device.batches)
    assert 19 <= kept < batches - 10, f"{kept} of {batches} batches: the kill must fall in the middle"

    resumed, device = new()
    capsys.readouterr()
    assert task.run(resumed) == undisturbed
    assert len(device.batches) == batches - kept
    assert "600/600 [" in capsys.readouterr().err
    assert any(f"{600 - sum(device.batches)} of 600 answers" in line and "1 lines were cut" in line for line in log)

    again, device = new()
    assert (task.run(again), device.batches) == (undisturbed, [])


def test_token_counts_and_plain_text_are_kept_too(new: Any, chat_task: Any, random_docs: Any) -> None:
    task = chat_task(random_docs(10, text_only_every=3))
    results = []
    for expected in ([4, 2, 4], []):
        model, device = new()
        model.task_dict["task"] = {"test": task.docs}
        results.append([(r.text, r.token_counts) for r in model.generate_until(task.requests())])
        assert device.batches == expected
    assert results[0] == results[1]
    assert any(text for text, _ in results[1]) and all(counts.output_tokens for _, counts in results[1])


def test_failures_are_tried_again(
    new: Any, chat_task: Any, random_docs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    docs = random_docs(16)
    broken = [{**doc, "image": ImageError("image: gone")} if i == 5 else doc for i, doc in enumerate(docs)]
    undisturbed = chat_task(docs, OURS).run(new(journal=None)[0])
    model, _ = new()
    encode, victim = model._encode, docs[9]["question"]

    def fails_once(samples: list[Any]) -> Any:
        if any(victim in sample.prompt for sample in samples):
            encoded = encode(samples)
            encoded.exception = RuntimeError("a bad kernel")
            return encoded
        return encode(samples)

    monkeypatch.setattr(model, "_encode", fails_once)
    first = [decode(text).error for text in chat_task(broken, OURS).run(model)]
    assert first[5] == "image: gone" and first[9] == "model: a bad kernel" and first.count(None) == 14
    journal = b"".join(path.read_bytes() for path in (tmp_path / "journal").glob("*/*.jsonl"))
    assert journal and b"a bad kernel" not in journal and b"image: gone" not in journal

    assert chat_task(docs, OURS).run(new()[0]) == undisturbed


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 3},
        {"attn_implementation": "eager"},
        {"use_cache": False},
        {"dtype": "bfloat16"},
        {"quant": "rtn-int8-g64:group_size=16"},
        {"max_new_tokens": 3},
    ],
    ids=str,
)
def test_another_setting_takes_nothing(
    new: Any, chat_task: Any, random_docs: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    task = chat_task(random_docs(6), OURS)
    task.run(new()[0])
    model, device = new(**arguments)
    assert task.run(model) == task.run(new(**arguments, journal=None)[0])
    assert sum(device.batches) == 6


def test_only_the_batch_of_a_changed_sample_is_computed_again(
    new: Any, chat_task: Any, random_docs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = random_docs(48)
    chat_task(docs, OURS).run(new()[0])
    picture = docs[20]["image"].copy()
    picture.putpixel((0, 0), tuple(255 - value for value in picture.getpixel((0, 0))))
    changed = [{**doc, "image": picture} if i == 20 else doc for i, doc in enumerate(docs)]
    for task, gen_kwargs, expected in (
        (chat_task(docs, OURS), {}, []),
        (chat_task(changed, OURS), {}, [4]),
        (chat_task(docs, OURS, name="another"), {}, [4] * 12),
        (chat_task(docs), {}, [4] * 12),  # no envelope
        (chat_task(docs, OURS), {"until": ["red"]}, [4] * 12),
        (chat_task(docs[:47], OURS), {"max_new_tokens": 7}, [4] * 11 + [3]),
    ):
        model, device = new()
        task.run(model, **gen_kwargs)
        assert device.batches == expected, (task.name, gen_kwargs)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("image processor", lambda files: files["preprocessor_config.json"].update(image_mean=[0.4, 0.5, 0.5])),
        ("generation config", lambda files: files["generation_config.json"].update(eos_token_id=[3])),
        ("tokenizer", lambda files: files["tokenizer.json"]["pre_tokenizer"].update(type="WhitespaceSplit")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_beside_the_weights_count(
    new: Any, chat_task: Any, random_docs: Any, tiny_checkpoint: Path, tmp_path: Path, name: str, change: Any
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    task = chat_task(random_docs(6), OURS)
    task.run(new(pretrained=str(folder))[0])
    files = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    if "preprocessor_config.json" not in files:  # newer transformers: inside the processor's own file
        files["preprocessor_config.json"] = files["processor_config.json"]["image_processor"]
    change(files)
    for path in folder.glob("*.json"):
        path.write_text(json.dumps(files[path.name]))
    model, device = new(pretrained=str(folder))
    task.run(model)
    assert sum(device.batches) == 6


def test_a_folder_that_cannot_be_made_is_refused(new: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"journal=.*cannot be made"):
        new(journal=str(tmp_path / "file"))


def test_files_of_several_processes_are_read_together(tmp_path: Path) -> None:
    answers = [[JournalAnswer(f"Grüße {i}\n", i, 2 * i), JournalAnswer("", 1, 0)] for i in range(3)]
    with Journal(tmp_path) as one, Journal(tmp_path) as two:
        one.add("a", answers[0])
        two.add("b", answers[1])
        one.add("c", answers[2])
        assert one.get("b") is None  # read once, when opened
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    both = Journal(tmp_path)
    assert [both.get(key) for key in "abcd"] == [*answers, None]
    assert both.unreadable == 0


def test_a_line_cut_anywhere_is_left_out_and_the_journal_goes_on(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.add("whole", [JournalAnswer("ä", 1, 1)])
        journal.add("torn", [JournalAnswer('"quoted" \\ ü {}', 2, 2)])
    (shard,) = tmp_path.glob("*.jsonl")
    data = shard.read_bytes()
    start = data.index(b"\n") + 1
    for end in range(start + 1, len(data) - 1):
        shard.write_bytes(data[:end])
        read = Journal(tmp_path)
        assert (read.get("whole"), read.get("torn"), read.unreadable) == ([("ä", 1, 1)], None, 1)
    with Journal(tmp_path) as journal:
        journal.add("torn", [JournalAnswer("again", 3, 3)])
    assert Journal(tmp_path).get("torn") == [("again", 3, 3)]


def test_it_syncs_at_most_once_a_second_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[float] = []
    now = 100.0
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(now))
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Journal(tmp_path) as journal:
        for step in range(50):
            now = 100.0 + step / 20
            journal.add(str(step), [JournalAnswer("x", 1, 1)])
            # flushed each time: what a kill leaves behind holds every line
            assert sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("*.jsonl")) == step + 1
    assert synced == [100.0, 101.0, 102.0, 102.45]


def test_the_key_depends_on_order_and_grouping() -> None:
    keys = [digest(value) for value in (["a", ["b", "c"]], ["a", ["c", "b"]], ["a", ["b"], ["c"]], ["a", ["bc"]])]
    assert len(set(keys)) == 4
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
