"""Training examples: where they come from, in which order, and as batches made ahead of the model.

A source is a task family's ``train`` split, asked as the evaluation asks and answered by the reference in the model's
own format, or a folder of pictures and conversations in LLaVA's form::

    folder/mix.json    [{"id": "1", "image": "coco/1.jpg", "conversations": [
                           {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}]

The order depends on the seed and the epoch alone, and any place in it is reached without reading what comes before.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bitquake.noise import ImageError, load_rgb, pixel_hash

from ..calibration.encoding import Encoder
from ..calibration.families import FamilySource, evaluated_pictures, is_family, with_split
from ..calibration.overlap import PIXELS
from ..calibration.sample import CalibrationError, SampleError, place, shuffled
from ..loading import ONLY_WITH_IMAGE
from .batch import TrainingBatch
from .config import LoraConfig, QatConfig

if TYPE_CHECKING:
    from PIL.Image import Image

IGNORED = -100
_IMAGE = "<image>"
_HELD_OUT = 10
"""Of a small source at most one tenth is kept out of the training."""
_TRIED = 200
"""Examples after which a training ends if most of them cannot be used."""
_SHOWN = 3


class ExampleError(CalibrationError):
    """Training data that does not exist or cannot be used; the message says what to write instead."""


@dataclass(frozen=True)
class Example:
    """What a model is shown and taught.

    Attributes:
        images: RGB pictures, which stand before the first text.
        said: the user's and the model's turns by turns; the model's are learned.
        image_ids: names of the pictures, as of a ``CalibrationSample``.
    """

    images: tuple[Image, ...]
    said: tuple[str, ...]
    image_ids: tuple[str, ...] = ()


class ExampleSource(Protocol):
    """Examples in a fixed order that a seed decides; each is made when it is asked for.

    ``identity`` is JSON of everything that decides them.
    """

    title: str

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...

    def pictures(self) -> list[str]:
        """What tells each example's picture from others; "" for an example without one."""

    def example(self, index: int) -> Example:
        """The example at a place.

        Raises:
            SampleError: this one cannot be used, others may be.
            CalibrationError: something that the user has to mend.
        """


class FamilyExamples:
    """The ``train`` split of a task family; arguments as of :class:`FamilySource`."""

    def __init__(
        self, name: str, *, model_type: str, seed: int, processed: Callable[[Image], tuple[int, int] | None]
    ) -> None:
        self._source = FamilySource(name, model_type=model_type, seed=seed, role="train", processed=processed)
        self.title = self._source.title

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._source.identity

    def __len__(self) -> int:
        return len(self._source)

    def pictures(self) -> list[str]:
        return self._source.pictures()

    def example(self, index: int) -> Example:
        sample = self._source.sample(index)
        if sample.answer is None:
            raise SampleError(f"an example of {self.title} has no answer to learn")
        return Example(sample.images, (sample.prompt, sample.answer), sample.image_ids)


class _Entry(NamedTuple):
    """One conversation of a file; ``said`` is empty where it cannot be learned."""

    name: str
    image: str
    said: tuple[str, ...]


class Conversations:
    """Pictures and conversations in LLaVA's form.

    Args:
        path: the JSON file, whose pictures lie relative to its folder; or a folder with one such file.
        seed: of the order.

    Raises:
        ExampleError: no such file, or not of that form.
    """

    def __init__(self, path: Path, *, seed: int) -> None:
        self._file = _conversations_file(path)
        self.title = str(self._file)
        entries = list(_read_conversations(self._file))
        self._entries = shuffled(entries, [one.name for one in entries], seed)

    @property
    def identity(self) -> Mapping[str, Any]:
        stat = self._file.stat()
        return {"conversations": self._file.name, "bytes": stat.st_size, "n": len(self)}

    def __len__(self) -> int:
        return len(self._entries)

    def pictures(self) -> list[str]:
        return [one.image for one in self._entries]

    def example(self, index: int) -> Example:
        from PIL import Image

        entry = self._entries[index]
        where = f"{entry.name} of {self.title}"
        if not entry.said:
            raise SampleError(f"{where}: no question of a human with an answer of gpt, turn by turn")
        if not entry.image:
            return Example((), entry.said)
        try:
            pixels = load_rgb((self._file.parent / entry.image).read_bytes())
        except (OSError, ImageError) as error:
            raise SampleError(f"{where}: {entry.image}: {getattr(error, 'strerror', None) or error}") from error
        return Example((Image.fromarray(pixels),), entry.said, (PIXELS + pixel_hash(pixels),))


def _conversations_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("*.json"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) or "none"
        raise ExampleError(
            f"training: {path} must hold one JSON file with conversations, and holds {names}; name the file itself"
        )
    return found[0]


def _read_conversations(file: Path) -> Iterator[_Entry]:
    form = 'expected a list of {"image": "…", "conversations": [{"from": "human", "value": "…"}, {"from": "gpt", …}]}'
    try:
        entries = json.loads(file.read_bytes())
    except OSError as error:
        raise ExampleError(f"training: {file} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ExampleError(f"training: {file} is not JSON ({error}); {form}") from error
    if not isinstance(entries, list) or not entries:
        raise ExampleError(f"training: {file}: {form}, got {type(entries).__name__}")
    for number, entry in enumerate(entries):
        where = f"training: {file}: entry {number}"
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
            for turn in turns
        ):
            raise ExampleError(f"{where}: {form}, got {str(entry)[:80]!r}")
        image = entry.get("image") or ""
        if isinstance(image, list):
            if len(image) > 1:
                raise ExampleError(f"{where}: one picture in each conversation is read, got {len(image)}")
            image = image[0] if image else ""
        if not isinstance(image, str) or image.startswith("/") or ".." in Path(image).parts:
            raise ExampleError(f"{where}: image must be a path inside {file.parent}, got {image!r}")
        yield _Entry(f"entry {number}", image, _alternating(turns))


def _alternating(turns: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """The texts, human first; nothing where the two do not take turns or the last word is not the model's."""
    if turns and turns[0]["from"] != "human":
        turns = turns[1:]  # what the model says before anybody asked
    said = [turn["value"].replace(_IMAGE, "").strip() for turn in turns]
    speakers = [turn["from"] for turn in turns]
    if not said or len(said) % 2 or speakers != ["human", "gpt"] * (len(said) // 2) or not all(said):
        return ()
    return tuple(said)


class BatchEncoder(Encoder):
    """Encodes examples of one model as batches, padded on the right; arguments as of :class:`Encoder`."""

    def batch(self, examples: Sequence[Example], max_length: int) -> tuple[TrainingBatch | None, list[int], list[str]]:
        """Encode examples that all have pictures, or none.

        Returns:
            The batch of those that can be used (None: none can), their places, and why the others cannot.

        Raises:
            CalibrationError: the model takes no text without a picture, or its processor gives pictures no tokens.
        """
        if not examples[0].images and self.model_type in ONLY_WITH_IMAGE:
            raise ExampleError(
                f"training: a {self.model_type} model takes no text without a picture; leave such examples out"
            )
        places = list(range(len(examples)))
        problems: list[str] = []
        answers: dict[int, list[tuple[list[int], bool]]] = {}
        for at in places:
            try:
                answers[at] = self._pieces(examples[at])
            except SampleError as error:
                problems.append(str(error))
        places = [at for at in places if at in answers]
        while places:
            prompts = [self._templated(len(examples[at].images), examples[at].said[:1]) for at in places]
            inputs = self._processed(prompts, [examples[at].images for at in places])
            lengths = inputs["attention_mask"].sum(1).tolist()
            total = {
                at: int(n) + sum(len(piece) for piece, _ in answers[at]) for at, n in zip(places, lengths, strict=True)
            }
            fit = [at for at in places if total[at] <= max_length]
            if fit == places:
                return self._joined(inputs, [answers[at] for at in places], bool(examples[0].images)), places, problems
            problems += [f"{total[at]} tokens are more than max_length={max_length}" for at in places if at not in fit]
            places = fit  # once more without them: their pictures lie among the others'
        return None, [], problems

    def _pieces(self, example: Example) -> list[tuple[list[int], bool]]:
        """Tokens that follow the first prompt, piece by piece, and whether a piece is learned."""
        pieces: list[tuple[list[int], bool]] = []
        before = self._templated(len(example.images), example.said[:1])
        for turn in range(1, len(example.said), 2):
            answer = example.said[turn]
            pieces.append((self._answer_tokens(before, answer), True))
            if turn + 1 == len(example.said):
                break
            after = self._templated(len(example.images), example.said[: turn + 2])
            written = f"{before}{self._turn.before}{answer.strip()}"
            if not after.startswith(written):
                raise ExampleError(
                    "training: this model's chat template writes an earlier turn otherwise once the conversation goes "
                    "on, so that conversations of several turns cannot be learned; give examples of one turn"
                )
            tokens = self._processor.tokenizer(after[len(written) :], add_special_tokens=False)["input_ids"]
            ended = self._turn.end is not None and tokens[:1] == [self._turn.end]  # the answer has it already
            pieces.append((tokens[1:] if ended else tokens, False))
            before = after
        return pieces

    def _joined(
        self, inputs: dict[str, Any], pieces: Sequence[Sequence[tuple[list[int], bool]]], pictures: bool
    ) -> TrainingBatch:
        """Prompts and what follows them, padded on the right."""
        real = inputs["attention_mask"].bool()
        rows = []
        for row, following in enumerate(pieces):
            prompt: list[int] = inputs["input_ids"][row][real[row]].tolist()
            ids, taught = list(prompt), [IGNORED] * len(prompt)
            for tokens, learned in following:
                ids += tokens
                taught += tokens if learned else [IGNORED] * len(tokens)
            rows.append((ids, taught, len(prompt)))
        longest = max(len(ids) for ids, *_ in rows)
        pad = self._processor.tokenizer.pad_token_id
        joined = {
            **inputs,
            "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, *_ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, *_ in rows]),
        }
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name not in inputs:
                continue
            types = inputs[name].new_zeros(len(rows), longest)  # 0 is text
            for row, (ids, _, n) in enumerate(rows):
                prompt_types = inputs[name][row][real[row]]
                types[row, :n] = prompt_types
                if name == "token_type_ids":
                    # in the suffix of PaliGemma (type 1) attention is causal; elsewhere text goes on as text
                    types[row, n : len(ids)] = 1 if self.model_type == "paligemma" else prompt_types[-1]
            joined[name] = types
        labels = torch.tensor([taught + [IGNORED] * (longest - len(taught)) for _, taught, _ in rows])
        visual = self._vision(joined["input_ids"]) & joined["attention_mask"].bool()
        if pictures and not bool(visual.any()):
            raise CalibrationError(self._no_image_tokens())
        return TrainingBatch(joined, labels, visual)


class Place(NamedTuple):
    """A place in the order: the epoch, and how many of its batches this process has had."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Loaded:
    """A batch and what was learned while it was made.

    Attributes:
        image_ids: names of its pictures.
        skipped: reason -> how many examples could not be used; examples: how many could.
        following: the place after it.
    """

    batch: TrainingBatch
    image_ids: frozenset[str]
    skipped: Counter[str]
    examples: int
    following: Place


@dataclass
class _Pool:
    """A source's examples that are trained on, their places in it, and its share of an epoch."""

    source: ExampleSource
    train: list[int]
    held_out: list[int]
    has_picture: list[bool]
    share: int = 0
    _shuffles: dict[int, Any] = field(default_factory=dict)

    def drawn(self, number: int, seed: Sequence[int]) -> int:
        """The number-th example of a training that never ends: all of them in a new order each time."""
        turn, at = divmod(number, len(self.train))
        if turn not in self._shuffles:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([*seed, turn])))
            self._shuffles = {turn: generator.permutation(len(self.train))} | {
                t: order for t, order in self._shuffles.items() if t == turn - 1
            }
        return self.train[int(self._shuffles[turn][at])]


class Examples:
    """The examples of a training, as batches for one of its processes.

    Args:
        config: of the training.
        model, processor: of the model, see :class:`Encoder`.
        rank, processes: this process and how many there are; they take turns at batches.

    Raises:
        CalibrationError: a source does not exist, has no split ``train``, is not prepared on this machine, or is empty.
    """

    def __init__(
        self, config: QatConfig | LoraConfig, model: Any, processor: Any, *, rank: int = 0, processes: int = 1
    ) -> None:
        self._config, self._rank, self._processes = config, rank, processes
        self._encoders = [BatchEncoder(model, processor) for _ in range(max(1, config.loader_threads))]
        encoder = self._encoders[0]
        sources = [_find_source(one.data, config.seed, encoder) for one in config.data]
        self._pools = [_pool(source, config) for source in sources]
        shares = [one.share for one in config.data]
        total = config.samples or sum(len(pool.train) for pool in self._pools)
        for pool, share in zip(self._pools, _dealt(total, shares), strict=True):
            pool.share = share
            if config.samples is not None:
                pool.train = pool.train[: max(1, share)]
        self._excluded = _excluded(config)
        self._plan: tuple[int, list[list[tuple[int, int]]]] | None = None
        self.batches_per_epoch = len(self._batches_of(0)) // processes
        if not self.batches_per_epoch:
            raise ExampleError(
                f"training: {total} examples make fewer batches of {config.batch_size} than the {processes} processes "
                "need; give more data, or a smaller batch_size"
            )

    @property
    def identity(self) -> Mapping[str, Any]:
        """JSON of everything that decides what is trained on, beside the configuration."""
        return {
            "sources": [json.loads(json.dumps(pool.source.identity, default=str)) for pool in self._pools],
            "encoder": self._encoders[0].identity,
            "processes": self._processes,
        }

    def batches(self, place: Place) -> Iterator[Loaded]:
        """Batches without end, from a place on; made by threads ahead of their use.

        Raises:
            CalibrationError: see :class:`ExampleSource`; or most of the first examples cannot be used.
        """
        threads = self._config.loader_threads
        places = self._places(place)
        tried: Counter[str] = Counter()
        if not threads:
            for at in places:
                yield self._watched(self._load(at, self._batches_of(at.epoch), self._encoders[0]), tried)
            return
        # an encoder is one thread's at a time: calls leave traces in its tokenizer
        free = deque(self._encoders)
        executor = ThreadPoolExecutor(threads, thread_name_prefix="bitquake_train")
        waiting: deque[Future[Loaded]] = deque()

        def load(at: Place, batches: list[list[tuple[int, int]]]) -> Loaded:
            encoder = free.popleft()
            try:
                return self._load(at, batches, encoder)
            finally:
                free.append(encoder)

        try:
            while True:
                while len(waiting) < 2 * threads:
                    at = next(places)
                    waiting.append(executor.submit(load, at, self._batches_of(at.epoch)))
                yield self._watched(waiting.popleft().result(), tried)
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def held_out(self) -> Iterator[TrainingBatch]:
        """Batches of this process's part of the examples that are not trained on."""
        size = self._config.batch_size
        chunks: list[list[tuple[int, int]]] = []
        for number, pool in enumerate(self._pools):
            for shown in (True, False):
                kind = [(number, index) for index in pool.held_out if pool.has_picture[index] == shown]
                chunks += [kind[i : i + size] for i in range(0, len(kind), size)]
        for chunk in chunks[self._rank :: self._processes]:
            batch, *_ = self._made(chunk, self._encoders[0], Counter())
            if batch is not None:
                yield batch

    def _places(self, place: Place) -> Iterator[Place]:
        epoch, batch = place
        while True:
            if batch >= self.batches_per_epoch:
                epoch, batch = epoch + 1, 0
            yield Place(epoch, batch)
            batch += 1

    def _batches_of(self, epoch: int) -> list[list[tuple[int, int]]]:
        """(source, place in it) of the examples of each batch of an epoch."""
        if self._plan is None or self._plan[0] != epoch:
            seed = self._config.seed
            drawn = [
                (number, pool.drawn(epoch * pool.share + i, (seed, number)))
                for number, pool in enumerate(self._pools)
                for i in range(pool.share)
            ]
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, len(self._pools), epoch])))
            mixed = [drawn[i] for i in generator.permutation(len(drawn))]
            batches = []
            for shown in (True, False):  # a batch has pictures, or none
                kind = [one for one in mixed if self._pools[one[0]].has_picture[one[1]] == shown]
                size = min(self._config.batch_size, max(1, len(kind)))
                batches += [kind[i : i + size] for i in range(0, len(kind) - size + 1, size)]
            self._plan = epoch, [batches[i] for i in generator.permutation(len(batches))]
        return self._plan[1]

    def _load(self, at: Place, batches: list[list[tuple[int, int]]], encoder: BatchEncoder) -> Loaded:
        skipped: Counter[str] = Counter()
        for further in range(len(batches)):  # where none of a batch can be used, the next one stands in
            chosen = batches[(at.batch * self._processes + self._rank + further) % len(batches)]
            batch, ids, examples = self._made(chosen, encoder, skipped)
            if batch is not None:
                return Loaded(batch, ids, skipped, examples, Place(at.epoch, at.batch + 1))
        raise ExampleError(f"training: none of the examples can be used: {_listed(skipped)}")

    def _made(
        self, chosen: Sequence[tuple[int, int]], encoder: BatchEncoder, skipped: Counter[str]
    ) -> tuple[TrainingBatch | None, frozenset[str], int]:
        examples = []
        for number, index in chosen:
            try:
                example = self._pools[number].source.example(index)
            except SampleError as error:
                skipped[str(error)] += 1
                continue
            if not self._excluded.isdisjoint(example.image_ids):
                skipped["its picture is one that tasks evaluate"] += 1
                continue
            examples.append(example)
        if not examples:
            return None, frozenset(), 0
        batch, places, problems = encoder.batch(examples, self._config.max_length)
        skipped.update(problems)
        return batch, frozenset(name for at in places for name in examples[at].image_ids), len(places)

    def _watched(self, loaded: Loaded, tried: Counter[str]) -> Loaded:
        """Raise once most of the first examples turn out to be of no use."""
        if tried.total() < _TRIED:
            tried.update(loaded.skipped)
            tried[""] += loaded.examples
            lost = tried.total() - tried[""]
            if tried.total() >= _TRIED and lost > tried[""]:
                del tried[""]
                raise ExampleError(
                    f"training: {lost} of the first examples cannot be used, more than half: {_listed(tried)}"
                )
        return loaded


def _listed(problems: Counter[str]) -> str:
    return "; ".join(f"{reason} ({n} times)" for reason, n in problems.most_common(_SHOWN))


def _find_source(data: str, seed: int, encoder: BatchEncoder) -> ExampleSource:
    path = Path(data).expanduser()
    if not is_family(data) and path.exists():
        return Conversations(path, seed=seed)
    if not is_family(data) and ("/" in data or path.suffix == ".json"):
        raise ExampleError(
            f"training: there is no {data}; give a folder or a JSON file with conversations, or a task family with a "
            f"train split ({', '.join(with_split('train'))})"
        )
    return FamilyExamples(data, model_type=encoder.model_type, seed=seed, processed=encoder.processed_size)


def _pool(source: ExampleSource, config: QatConfig | LoraConfig) -> _Pool:
    """Hold whole pictures out, so that none is trained on by another question."""
    names = source.pictures()
    if not names:
        raise ExampleError(f"training: {source.title} holds no examples")
    wanted = min(-(-config.validation_samples // len(config.data)), len(names) // _HELD_OUT)
    sizes = Counter(name or f"\0{index}" for index, name in enumerate(names))
    kept: set[str] = set()
    n = 0
    for name in sorted(sizes, key=lambda one: place(config.seed, one)):
        if n >= wanted:
            break
        kept.add(name)
        n += sizes[name]
    out = [index for index, name in enumerate(names) if (name or f"\0{index}") in kept]
    inside = sorted(set(range(len(names))).difference(out))
    return _Pool(source, inside, out[:wanted], [bool(name) for name in names])


def _dealt(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers of that sum in proportion to the shares, by largest remainders."""
    exact = [total * share / sum(shares) for share in shares]
    dealt = [int(one) for one in exact]
    for i in sorted(range(len(exact)), key=lambda i: dealt[i] - exact[i])[: total - sum(dealt)]:
        dealt[i] += 1
    return dealt


def _excluded(config: QatConfig | LoraConfig) -> frozenset[str]:
    """Names of pictures that must not be trained on.

    Families whose pictures come again in several of their splits are looked through; where a dataset numbers its
    pictures, their splits differ by construction.
    """
    from bitquake.tasks.expand import builtin_index
    from bitquake.tasks.families import load_family

    families = set(config.without)
    for one in config.data:
        if is_family(one.data):
            family = load_family(builtin_index().families[one.data]).family
            if family.columns.image_id is None or family.world == "block":
                families.add(one.data)
    found: set[str] = set()
    for name in sorted(families):
        found |= evaluated_pictures(name)
    return frozenset(found)


def learned(batch: TrainingBatch) -> Tensor:
    """Number of tokens that a batch teaches."""
    return (batch.labels[:, 1:] != IGNORED).sum()
