"""``bitquake_hf``: any Hugging Face image-text-to-text model in lmms-eval, quantized, with confidences.

    lmms-eval --model bitquake_hf --model_args pretrained=Qwen/Qwen2-VL-7B-Instruct,quant=hqq-int4-g64 --tasks ...

The way of a request: worker threads read the document, corrupt its image and template its prompt (``samples``), one
thread runs the processor over whole batches, and the caller's thread keeps the device busy. Answers are greedy from raw
logits (``generation``), their confidences are gathered step by step (``confidence``), and both go into one envelope
where the task's metadata asks for it (``task_contract``); any other task gets plain text. The samples of a retrieval
task come with candidate captions, which are scored instead (``retrieval``).
"""

from __future__ import annotations

import copy
import inspect
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import simple_parse_args_string
from loguru import logger as eval_logger
from tqdm import tqdm

from bitquake import __version__
from bitquake.envelope import ENVELOPE_VERSION, Envelope, decode
from bitquake.noise import NoiseCache
from bitquake.quant_card import CARD_FILE, Adapter, Calibration, QuantCard

from .arguments import as_bool, as_dtype, as_execution, as_int, as_positive, as_text, refuse_unknown
from .calibration import CalibratedOn, build_calibration, load_image_ids
from .confidence import (
    Answer,
    Floats,
    GreedyRecorder,
    GreedySteps,
    answer_confidences,
    box_confidences,
    chosen_letter,
    letter_forms,
    option_probabilities,
    read_answer,
)
from .generation import GenerationRequest, StopOnText, eos_ids, greedy_config
from .journal import Journal, JournalAnswer, digest
from .loading import (
    LoadedModel,
    commit,
    load_processor,
    load_quantized,
    matches_captions,
    processed_sizes,
    put_adapter_on,
    resolve_pretrained,
)
from .prefetch import prefetch
from .quant_cards import artifacts_dir, build_card, calibration_entry, store_card
from .quantizers import QuantSpec, load_spec
from .quantizers.linear import forget_codes, use_kernels
from .quantizers.published.grid import grid_name, on_grid
from .quantizers.replace import quantize_model
from .retrieval import (
    CACHED,
    AssistantTurn,
    CaptionError,
    MatchingPicture,
    assistant_turn,
    caption_tokens,
    encode_prompt,
    matching_tokens,
)
from .samples import Sample, from_noise_cache, prepare, prompt_hash
from .selector.capture import Positions, PrefillStates, Tokens, question_mask
from .selector.features import FEATURES_VERSION, Features, FeatureStore, feature_key, rounded
from .selector.live import emitted, fitting, load_selectors
from .task_contract import RETRIEVAL, TaskContract
from .training.seen import load_seen

_WINDOW = 4
"""Batches whose samples are sorted by size together, once their images are known."""
_MIN_PROBE = 4
"""Samples that must all fail alike in the model before the run is given up."""
_OF_STATES = ("versions", "model", "attention", "processor", "tokenizer")
"""The settings that hidden states of a prompt depend on, but for rounding."""


@dataclass
class _Encoded:
    """A batch after the processor: its inputs (or what the processor raised) and the processed image sizes.

    ``captions``: for retrieval, token ids of the candidates of the batch's one sample.
    ``key``: the batch's in the journal, "" when it does not belong there; ``known``: its answers, found there.
    ``positions``: of the image's and the question's tokens, where hidden states are wanted.
    """

    samples: list[Sample]
    inputs: Any = None
    processed: list[list[tuple[int, int]]] = field(default_factory=list)
    exception: Exception | None = None
    captions: list[list[int]] = field(default_factory=list)
    key: str = ""
    known: list[JournalAnswer] | None = None
    positions: Positions | None = None


@dataclass
class _Response:
    """What goes back to lmms-eval for one sample."""

    sample: Sample
    text: str
    input_tokens: int = 0
    output_tokens: int = 0


class BitquakeHF(lmms):  # type: ignore[misc]
    """A quantized Hugging Face image-text-to-text model for lmms-eval.

    ``Blip2ForImageTextRetrieval`` checkpoints run too: they rank the captions of retrieval tasks by their image-text
    matching head, and answer no other task.

    Args:
        pretrained: hub name, folder, or a shipped reference checkpoint (``bitquake/...``).
        quant: named quantization (``bitquake quants list``), possibly with overrides; ``none`` for full precision, and
            for a checkpoint that came quantized (``bitquake quantize``, AutoAWQ, GPTQ, compressed-tensors, GRACE).
        execution: ``simulated`` or ``packed``, for a checkpoint that came quantized; default its own.
        base: the full-precision model that such a checkpoint was made from, where it does not say so itself: reports
            pair the two.
        artifacts: folder of the quant cards and of the names of calibration pictures; default the user cache.
        journal: folder in which answers are kept batch by batch as they come (default: nowhere). The same command, run
            again after a kill, answers from there and gives bit for bit what an undisturbed run gives on that machine:
            batches are formed as ever, and one that is there complete never reaches the device. One that is not is
            computed again as a whole, so a kill costs the batches in work and each batch with a failed sample is
            tried again. Nothing is reused where anything differs that an answer could depend on: model, quantization,
            library versions, device, batch size, the neighbours in the batch (another ``--limit`` or number of
            processes). Only after an out-of-memory error can a resumed run form batches that the undisturbed one
            would not; its answers are then equal within the tolerance of ``batch_size``.
        features: keep hidden states of every generated answer that comes in an envelope, for a Selector to be fitted
            on or applied to: ``features/<model hash>`` in the artifacts folder, 6 bytes per hidden dimension and sample
            (``selector.features``). They are read off the forward that encodes the prompt. An answer reaches the
            journal after its features have reached the disk, so a kill costs up to 1,024 samples or two minutes.
        selector: Selectors of ``bitquake selector fit``: a file, a folder of them, or several joined with ``+``. Each
            gives one more confidence under its own name to the tasks whose primary confidence it was fitted for, the
            same that ``bitquake selector apply`` gives afterwards. One that was fitted on another model, or on a
            picture that is evaluated, is refused; of a folder's, other quantizations' own are left out. With or without
            ``features``.
        noise_cache: folder in which pictures with the noise of our tasks are kept (default: nowhere), for the next
            model or quantization that is evaluated on them; any number of runs may share it. Pixels and answers are the
            same with and without it. What it saves is the decoding and the noise of a picture, not the model's work on
            it; the log says how many pictures came from it.
        noise_cache_gb: bound on its size in units of 10^9 bytes, 20 unless given; see ``bitquake.noise.cache`` for what
            stays when it is full.
        dtype: ``bfloat16`` (default), ``float16`` or ``float32``, of everything that is not quantized.
        device: ``cuda``, ``cuda:1``, ``cpu``; default CUDA where there is one; ``accelerate launch`` sets it.
        device_map: spreads one model over devices (``auto``); not together with ``accelerate launch``.
        batch_size: samples per batch; in retrieval, candidate captions per chunk of one sample, each of which holds a
            copy of the prompt's key-value cache. Answers do not depend on it beyond rounding (see the tests for the
            tolerance).
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``; default the model's own.
        max_pixels, min_pixels: bounds on the processed image, for processors that have them.
        adapter: peft adapter (LoRA), put on top after quantization.
        trust_remote_code: run code that comes with the checkpoint; off unless asked for, and logged.
        revision: branch, tag or commit of ``pretrained``; config, processor and weights all come from it.
        max_new_tokens: goes before the task's own limit.
        workers: threads that load and corrupt images ahead of the device; 0 loads in the main thread.
        use_cache: key-value cache in generation; in retrieval, one encoding of picture and prompt for all candidates.
        max_batch_size: accepted because lmms-eval passes it; has no effect.

    A calibrated quantization, and a model or an adapter that ``bitquake train`` has made, is not evaluated on a picture
    that it has seen: the run ends with the picture's name.

    Raises:
        TypeError: an unknown argument.
        ValueError: an argument that cannot be honoured; the message says what to write instead.
    """

    is_simple = False
    progress: Callable[[str, int], None] | None = None
    """Called with a task and how many more of its samples have their answer, failed ones included."""
    out_of_memory_samples: int = 0
    """Samples that failed for want of memory so far, whatever their task makes of that."""

    def __init__(
        self,
        pretrained: str,
        quant: Any = "none",
        execution: Any = None,
        base: Any = None,
        artifacts: str | None = None,
        journal: str | None = None,
        features: Any = False,
        selector: Any = None,
        noise_cache: str | None = None,
        noise_cache_gb: Any = 20,
        dtype: Any = "bfloat16",
        device: str | None = None,
        device_map: str | None = None,
        batch_size: Any = 1,
        attn_implementation: str | None = None,
        max_pixels: Any = None,
        min_pixels: Any = None,
        adapter: str | None = None,
        trust_remote_code: Any = False,
        revision: Any = None,
        max_new_tokens: Any = None,
        workers: Any = None,
        use_cache: Any = True,
        max_batch_size: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(unknown, [n for n in inspect.signature(BitquakeHF).parameters if n != "unknown"])
        self.batch_size_per_gpu = as_int("batch_size", batch_size, minimum=1)
        self._batch_limit = self.batch_size_per_gpu
        self._workers = min(4, os.cpu_count() or 1) if workers is None else as_int("workers", workers, minimum=0)
        self._max_new_tokens = None if max_new_tokens is None else as_int("max_new_tokens", max_new_tokens, minimum=1)
        self._use_cache = as_bool("use_cache", use_cache)
        self._keep_features = as_bool("features", features)
        self._noise_cache = _open_noise_cache(as_text("noise_cache", noise_cache), noise_cache_gb)
        self.dtype = as_dtype(dtype)
        name, revision, adapter = (
            as_text("pretrained", pretrained),
            as_text("revision", revision),
            as_text("adapter", adapter),
        )
        if name is None:
            raise ValueError(
                "bitquake_hf: pretrained is empty. Give a hub name or a folder: pretrained=Qwen/Qwen2-VL-7B-Instruct"
            )
        remote = as_bool("trust_remote_code", trust_remote_code)
        if remote:
            eval_logger.warning(f"bitquake_hf: trust_remote_code=True: code that comes with {name} will be run")
        bounds = {
            key: None if value is None else as_int(key, value, minimum=1)
            for key, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels))
        }
        chosen = as_text("selector", selector)
        self._emitters = load_selectors(chosen) if chosen is not None else []
        spec = load_spec(quant)  # before the weights: an unknown name must not cost a download
        device_map = as_text("device_map", device_map)
        self._start_distributed(as_text("device", device), device_map)

        source = resolve_pretrained(name)
        self.processor = load_processor(source, revision=revision, trust_remote_code=remote, **bounds)
        # the encoder thread and this one must not share a tokenizer: padding and decoding change and read its state
        self._decoder = copy.deepcopy(self.processor.tokenizer)
        loaded = load_quantized(
            source,
            spec,
            revision=revision,
            dtype=self.dtype,
            device=self._device,
            device_map=device_map,
            attn_implementation=as_text("attn_implementation", attn_implementation),
            trust_remote_code=remote,
            execution=as_execution(execution),
        )
        folder = artifacts_dir(as_text("artifacts", artifacts))
        model = loaded.model
        before, self._calibrated, calibration = self._quantize(loaded, name, source, folder)
        notes = [load_seen(Path(one), folder) for one in (source, adapter) if one is not None]
        self._trained = tuple(one for one in notes if one is not None)
        kernels = use_kernels(model)
        grids = on_grid(model) if loaded.spec.is_full_precision else {}
        if grids:
            spec = QuantSpec(name=grid_name(grids), method="checkpoint")
            eval_logger.warning(f"bitquake_hf: {len(grids)} weights of {name} lie on a low-bit grid: {spec.name}")
            loaded = replace(loaded, spec=spec, checkpoint_format="dense on a grid")
            before = dict.fromkeys(grids, "")
        told_base = as_text("base", base)
        if told_base and not loaded.checkpoint_format:
            raise ValueError(f"bitquake_hf: base={told_base!r} is for checkpoints that came quantized; {name} did not.")
        self.card = build_card(
            model,
            loaded.spec,
            pretrained=name,
            base=told_base or loaded.base,
            # of the model that was quantized: the pair has it in common; a published checkpoint does not say
            revision=loaded.base_revision if loaded.checkpoint_format else commit(model, revision),
            before=before,
            calibration=calibration,
            checkpoint_format=loaded.checkpoint_format,
            image_processor=type(self.processor.image_processor).__name__,
            grids=grids,
        )
        _refuse_changed(source, self.card)
        if adapter is not None:
            model, adapter_hash = put_adapter_on(model, adapter)
            self.card = self.card.model_copy(update={"adapter": Adapter(source=adapter, hash=adapter_hash)})
        forget_codes(model)  # after the adapter: peft asks the whole model for its state dict
        self._model = model
        self._config = model.config
        self._matching = matches_captions(model)
        self._turn = AssistantTurn("", None)
        if not self._matching:
            self._generation_config = greedy_config(model, self._decoder)
            model.generation_config = self._generation_config  # or generate() would fill our gaps from the shipped one
            self._eos = eos_ids(self._generation_config)
            self._turn = assistant_turn(self.processor, self._eos)
        self._input_device = model.device if device_map is None else model.get_input_embeddings().weight.device
        self.model_hash, self.card_hash = self.card.model_hash, self.card.content_hash
        self._journal = _open_journal_folder(as_text("journal", journal), self.model_hash)
        self._artifacts = folder
        wants_states = self._keep_features or bool(self._emitters)
        self._states = PrefillStates(model) if wants_states and not self._matching else None
        if self._states is not None and self._emitters:
            self._emitters, others = fitting(self._emitters, self.card, self._states.hidden_size)
            for one in others:
                eval_logger.info(f"bitquake_hf: {one.file} is another quantization's own Selector, and is left out")
        self._store: FeatureStore | None = None
        # before any call of the processor, which leaves traces in the tokenizer's own description
        settings = self._settings() if self._journal is not None or self._states is not None else {}
        self._settings_hash = digest(settings)
        self._states_hash = digest({name: settings.get(name) for name in _OF_STATES})
        self._encode_lock = threading.Lock()
        self._reported: set[str] = set()
        if self.rank == 0:
            store_card(self.card, folder)
            eval_logger.info(self._summary(str(folder)))
            for one in self._emitters:
                eval_logger.info(f"bitquake_hf: confidence {one.selector.name!r}: {one.file}, hash {one.file_hash}")
            for reason, n in kernels.items():
                eval_logger.info(f"bitquake_hf: {n} packed modules are de-quantized at every call: {reason}")

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> BitquakeHF:
        """As lmms-eval's, but ``batch_size`` may also stand in ``model_args``.

        lmms-eval always passes its own ``--batch_size`` (1 unless given), and Python would refuse the second one.

        Raises:
            ValueError: given twice, with different values.
        """
        arguments = simple_parse_args_string(arg_string)
        for name, value in (additional_config or {}).items():
            if value is None:
                continue
            if (
                name in arguments
                and str(arguments[name]) != str(value)
                and not (name == "batch_size" and str(value) == "1")
            ):
                raise ValueError(
                    f"bitquake_hf: {name} is {arguments[name]!r} in model_args and {value!r} on the command line."
                )
            arguments.setdefault(name, value)
        return cls(**arguments)

    def _quantize(
        self, loaded: LoadedModel, name: str, source: str, artifacts: Path
    ) -> tuple[dict[str, str], CalibratedOn | None, Calibration | None]:
        """Carry out what could not be done while loading.

        Returns:
            Hashes of the weights before, and what the model was calibrated on, if on anything.
        """
        spec = loaded.spec
        if loaded.before is None and spec.calibration is not None:
            data = build_calibration(spec.calibration, loaded.model, self.processor, pretrained=name)
            before = quantize_model(loaded.model, spec, calibration=data, progress=self.rank == 0)
            if self.rank == 0:
                data.store_image_ids(artifacts)
            return before, CalibratedOn(spec.name, data.image_ids), calibration_entry(data)
        if loaded.before is None:
            return quantize_model(loaded.model, spec, progress=self.rank == 0), None, None
        if loaded.calibration is None:
            return loaded.before, None, None
        told = Calibration.model_validate(loaded.calibration)
        ids = load_image_ids(told.ids_hash, Path(source), artifacts) if told.ids_hash else frozenset()
        return loaded.before, CalibratedOn(spec.name, ids), told

    def _start_distributed(self, device: str | None, device_map: str | None) -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        # lmms-eval's ranks wait for one another while the first loads the data and after the last answer: that can take
        # hours, and torch would end the run after 10 minutes (NCCL)
        patient = InitProcessGroupKwargs(timeout=timedelta(weeks=52))
        self.accelerator = Accelerator(cpu=launched > 1 and not torch.cuda.is_available(), kwargs_handlers=[patient])
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size != launched:  # each process would answer everything, and lmms-eval wait for the others
            raise ValueError(
                f"bitquake_hf: {launched} processes were launched, but accelerate counts {self._world_size}. "
                "Without GPUs: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N -m lmms_eval ..."
            )
        if self._world_size > 1:
            if device_map is not None:
                raise ValueError(
                    "bitquake_hf: device_map spreads one model, accelerate launch copies it; use one of them."
                )
            self._device = self.accelerator.device
            if device is not None and torch.device(device).type != self._device.type:
                raise ValueError(
                    f"bitquake_hf: device={device!r}, but accelerate launch runs on {self._device.type!r}. "
                    "Leave device out, and choose with `accelerate launch --cpu`."
                )
        else:
            self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _summary(self, folder: str) -> str:
        card = self.card
        parts = ", ".join(
            f"{name} {entry.n_quantized / entry.n_parameters:.0%} of {entry.n_parameters:,} weights"
            for name, entry in card.components.items()
            if entry.n_quantized
        )
        return (
            f"bitquake_hf: {card.pretrained} ({card.architecture}), quant {card.spec_name}: "
            f"{parts or 'nothing quantized'}; {card.execution}, {card.effective_bpw:.2f} effective bits per weight, "
            f"rest in {card.dtype}, on {self._device}; model {self.model_hash}, card {self.card_hash} in {folder}"
        )

    def _settings(self) -> dict[str, Any]:
        """Everything that decides the answer to a batch and does not come with its samples."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        settings = {
            "versions": [__version__, ENVELOPE_VERSION],
            # the card has library versions, execution and device; the model hash the weights, the spec and the adapter
            "model": [self.model_hash, self.card_hash, str(self.dtype), self._input_device.type],
            "attention": self._config._attn_implementation,
            "batch size": self.batch_size,
            "use_cache": self._use_cache,
            "generation": None if self._matching else self._generation_config.to_json_string(),
            "turn": [self._turn.before, self._turn.end],
            "processor": self.processor.to_json_string(),
            "tokenizer": backend.to_str() if backend is not None else self.tokenizer.get_vocab(),
        }
        # an entry more, and none less without: journals of before features still hold
        settings |= {"features": FEATURES_VERSION} if self._keep_features else {}
        return settings | ({"selectors": [one.file_hash for one in self._emitters]} if self._emitters else {})

    # what lmms-eval reads

    @property
    def model(self) -> Any:
        return self._model

    @property
    def config(self) -> Any:
        return self._config

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def eot_token_id(self) -> int:
        return cast(int, self.tokenizer.eos_token_id)

    @property
    def batch_size(self) -> int:
        return self.batch_size_per_gpu

    @property
    def device(self) -> torch.device:
        device: torch.device = self._device
        return device

    @property
    def noise_cache_counts(self) -> dict[str, int] | None:
        """Pictures that came from the noise cache (``hits``) and that were made (``misses``); None without one."""
        return None if self._noise_cache is None else self._noise_cache.counts

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        """Not offered: its sign and normalisation differ between lmms-eval's models, no confidence can rest on it."""
        raise NotImplementedError(
            "bitquake_hf answers generate_until tasks only. Multiple choice: use a task of protocol 'choice', whose "
            "envelope holds the softmax over the option letters."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        """Not offered: an answer over several rounds has no single confidence."""
        raise NotImplementedError(
            "bitquake_hf answers single-round generate_until tasks only; use another model class."
        )

    # the way of the requests

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request, in the order given; a failed sample never costs another one.

        Raises:
            ValueError: a task asks for sampling, its metadata is malformed, or it is no retrieval task and the model
                can only rank captions.
            RuntimeError: the first samples all fail alike in the model: something is wrong with the run, not with them.
        """
        groups = self._groups(requests)
        pictures = Counter(self.noise_cache_counts)
        results: list[GenerationResult | None] = [None] * len(requests)
        failures: list[Sample] = []
        start, device_time, tokens, answered, known = time.perf_counter(), 0.0, 0, 0, 0
        probe = min(max(_MIN_PROBE, self.batch_size), len(requests))

        with ExitStack() as stack:
            journal = None if self._journal is None else stack.enter_context(Journal(self._journal))
            held: list[tuple[str, list[JournalAnswer]]] = []  # batches whose features wait for their shard
            if self._keep_features and self._states is not None:
                self._store = FeatureStore(self._artifacts, self.model_hash)
                stack.callback(self._settle, journal, held, always=True)
            bar = stack.enter_context(
                tqdm(total=len(requests), disable=self.rank != 0, desc="bitquake_hf", unit="sample")
            )
            loaders = self._executor(stack, self._workers)
            encoder = self._executor(stack, min(1, self._workers))
            prepared = prefetch(
                lambda sample: prepare(
                    sample,
                    requests[sample.index].args,
                    self.task_dict,
                    self.processor,
                    self.config.model_type,
                    self._calibrated,
                    trained=self._trained,
                    find_question=self._states is not None and sample.contract.envelope,
                    emitters=self._emitters,
                ),
                (sample for group in groups for sample in group),
                loaders,
                depth=max(2 * self._workers, (_WINDOW + 1) * self.batch_size),
            )
            batches = self._batches(groups, prepared)
            for encoded in prefetch(
                lambda samples: self._recall_or_encode(samples, requests, journal), batches, encoder, depth=3
            ):
                began = time.perf_counter()
                responses = self._respond(encoded)
                if encoded.known is not None:
                    known += len(responses)
                else:
                    device_time += time.perf_counter() - began
                    tokens += sum(response.output_tokens for response in responses)
                    if journal is not None and all(response.sample.error is None for response in responses):
                        held.append(
                            (encoded.key, [JournalAnswer(r.text, r.input_tokens, r.output_tokens) for r in responses])
                        )
                    self._settle(journal, held)
                for response in responses:
                    sample = response.sample
                    results[sample.index] = GenerationResult(
                        text=response.text,
                        token_counts=TokenCounts(
                            input_tokens=response.input_tokens, output_tokens=response.output_tokens
                        ),
                    )
                    if sample.error is None:
                        answered += 1
                        gen_kwargs = requests[sample.index].args[2]
                        self.cache_hook.add_partial("generate_until", (sample.prompt, gen_kwargs), response.text)
                    else:
                        failures.append(sample)
                        self._report(sample)
                    sample.release()
                bar.update(len(responses))
                self._tell_progress(responses)
                if answered == 0:
                    _refuse_hopeless_run(failures, probe)

        self._log_features()
        if journal is not None:
            self._log_journal(journal, known, len(requests))
        pictures = Counter(self.noise_cache_counts) - pictures
        self._log_noise_cache(pictures)
        self._log_failures(failures, len(requests))
        wall = time.perf_counter() - start
        log_metrics(
            total_elapsed_time=device_time,
            total_gen_tokens=tokens,
            avg_speed=tokens / device_time if device_time else 0.0,
            additional_metrics={
                "total_requests": len(requests),
                "wall_time": wall,
                "failed_samples": len(failures),
                "journaled_samples": known,
            }
            | {f"noise_cache_{name}": pictures[name] for name in self.noise_cache_counts or ()},
        )
        return cast("list[GenerationResult]", results)

    def _tell_progress(self, responses: Sequence[_Response]) -> None:
        if self.progress is not None:
            for task, n in Counter(response.sample.task for response in responses).items():
                self.progress(task, n)

    def _settle(
        self, journal: Journal | None, held: list[tuple[str, list[JournalAnswer]]], *, always: bool = False
    ) -> None:
        """Write what is due: features first, then the journal lines of the answers that they belong to."""
        if self._store is not None and not self._store.write(always=always):
            return
        for key, answers in held:
            if journal is not None:
                journal.add(key, answers)
        held.clear()

    def _groups(self, requests: list[Instance]) -> list[list[Sample]]:
        """Requests that may share a batch: same task, same limits; longest text first.

        Tasks do not mix, so that the batches of a task do not depend on which other tasks run.
        """
        groups: dict[Any, list[Sample]] = {}
        contracts: dict[Any, TaskContract] = {}
        messages: dict[Any, Callable[..., Any]] = {}
        for index, request in enumerate(requests):
            _, doc_to_messages, gen_kwargs, _, task, split = request.args
            if (task, split) not in contracts:
                contracts[task, split] = self._checked(TaskContract.of(doc_to_messages, task), task)
                if self._states is not None and not contracts[task, split].envelope:
                    self._warn_once(f"task {task!r} asks for no envelope: no features and no Selector's confidence")
                if unknown := GenerationRequest.unknown_keys(gen_kwargs):
                    self._warn_once(f"task {task!r}: generation_kwargs without meaning here are left out: {unknown}")
                if self._noise_cache is not None:
                    messages[task, split] = from_noise_cache(doc_to_messages, self._noise_cache)
            limits = GenerationRequest.from_task(gen_kwargs, task, self._max_new_tokens)
            sample = Sample(index, task, contracts[task, split], limits, messages.get((task, split)))
            groups.setdefault((task, split, limits), []).append(sample)
        for group in groups.values():
            group.sort(key=lambda sample: (-len(requests[sample.index].args[0] or ""), sample.index))
        return list(groups.values())

    def _checked(self, contract: TaskContract, task: str) -> TaskContract:
        """The contract, if this model can keep it."""
        if self._matching and contract.protocol != RETRIEVAL:
            raise ValueError(
                f"task {task!r}: {self.card.pretrained} ({type(self._model).__name__}) only ranks captions by its "
                "image-text matching head, so it runs tasks of protocol 'retrieval'; this one's is "
                f"{contract.protocol!r}. Give a generating model (Salesforce/blip2-opt-2.7b, say) for it."
            )
        scores_text = contract.protocol == RETRIEVAL and not self._matching
        if scores_text and self._use_cache and self.config.model_type not in CACHED:
            self._warn_once(
                f"retrieval with {self.config.model_type!r}: its key-value cache is not proved to give the scores of "
                "full passes, so every candidate is scored in a full pass"
            )
        return contract

    def _batches(self, groups: list[list[Sample]], prepared: Iterator[Sample]) -> Iterator[list[Sample]]:
        """Cut groups into batches of like samples; failed ones come along as a batch of their own."""
        for group in groups:
            # a sample with its candidates is a batch of its own
            size = 1 if group[0].contract.protocol == RETRIEVAL else self.batch_size
            window = size * _WINDOW if size > 1 else 1
            for at in range(0, len(group), window):
                ready = list(islice(prepared, min(window, len(group) - at)))
                # all cut before the first is yielded: an answered sample has no images any more
                failed = [sample for sample in ready if sample.error is not None]
                good = sorted((s for s in ready if s.error is None), key=lambda s: (s.size, -s.index), reverse=True)
                # a processor call takes images for all of its texts, or none
                kinds = [s for s in good if s.images], [s for s in good if not s.images]
                batches = [like[begin : begin + size] for like in kinds for begin in range(0, len(like), size)]
                yield from [failed, *batches] if failed else batches

    def _recall_or_encode(self, samples: list[Sample], requests: list[Instance], journal: Journal | None) -> _Encoded:
        """A batch with its answers, where the journal has them, or else ready for the device."""
        if journal is None or samples[0].error is not None:
            return self._encode(samples)
        identities = [_identity(sample, requests[sample.index].args) for sample in samples]
        if self._emitters:
            identities.append([[sample.contract.confidence, sample.question] for sample in samples])
        key = digest([self._settings_hash, identities])
        known = journal.get(key)
        if known is not None and len(known) == len(samples) and self._have_features(known):
            return _Encoded(samples, known=known)
        encoded = self._encode(samples)
        encoded.key = key
        return encoded

    def _have_features(self, answers: list[JournalAnswer]) -> bool:
        """False where the features of an answer are no longer where they were: it is computed again."""
        if self._store is None:
            return True
        keys = (decode(answer.text).features for answer in answers)
        return all(key in self._store for key in keys if key)

    def _encode(self, samples: list[Sample]) -> _Encoded:
        """The processor's inputs of a batch; runs ahead, in a thread of its own."""
        if samples[0].error is not None:
            return _Encoded(samples)
        prompts = [sample.prompt for sample in samples]
        # by sample: SmolVLM takes a flat list for one sample's, LLaVA-OneVision for samples of one image each
        images = [sample.images for sample in samples] if samples[0].images else None
        bos = self.processor.tokenizer.bos_token
        # as apply_chat_template(tokenize=True) does: a template that writes the start token must not get a second one
        special = {"add_special_tokens": False} if bos is not None and prompts[0].startswith(bos) else {}
        try:
            with self._encode_lock:
                inputs = self.processor(text=prompts, images=images, padding=True, return_tensors="pt", **special)
                captions = self._caption_tokens(samples[0]) if samples[0].candidates else []
                positions = self._positions(samples, inputs)
            sizes = processed_sizes(self.processor, inputs, [sample.image_sizes for sample in samples])
        except Exception as error:  # kept for the main thread, which finds out which sample it is
            return _Encoded(samples, exception=error)
        return _Encoded(samples, inputs, sizes, captions=captions, positions=positions)

    def _positions(self, samples: list[Sample], inputs: Any) -> Positions | None:
        """Where the image's and the question's tokens are, in a batch whose hidden states are wanted."""
        if self._states is None or not samples[0].contract.envelope or samples[0].candidates:
            return None
        ids = inputs["input_ids"]
        image = self._states.image_positions(ids)
        special = torch.isin(ids, torch.tensor(sorted(self.tokenizer.all_special_ids)))
        text = inputs["attention_mask"].bool() & ~image & ~special
        prompts: list[Tokens | None] = [None] * len(samples)
        if self.tokenizer.is_fast:
            written = self.tokenizer(
                [sample.prompt for sample in samples], add_special_tokens=False, return_offsets_mapping=True
            )
            prompts = [Tokens(*pair) for pair in zip(written["input_ids"], written["offset_mapping"], strict=True)]
        rows = [
            question_mask(row, prompt, sample.question, other)
            for row, prompt, sample, other in zip(ids.tolist(), prompts, samples, text.tolist(), strict=True)
        ]
        return Positions(image, torch.tensor(rows))

    def _caption_tokens(self, sample: Sample) -> list[list[int]]:
        if self._matching:
            return matching_tokens(self.tokenizer, sample.candidates)
        return caption_tokens(self.tokenizer, sample.prompt, sample.candidates, self._turn)

    def _respond(self, encoded: _Encoded) -> list[_Response]:
        """Answer a batch; when it fails, halve it until the failing samples stand alone."""
        samples = encoded.samples
        if samples[0].error is not None:
            return [_Response(sample, self._failed(sample)) for sample in samples]
        if encoded.known is not None:
            return [_Response(sample, *answer) for sample, answer in zip(samples, encoded.known, strict=True)]
        if len(samples) > self._batch_limit:
            return self._in_parts(samples, self._batch_limit)
        try:
            if encoded.exception is not None:
                raise encoded.exception
            return self._rank_captions(encoded) if samples[0].candidates else self._generate(encoded)
        except Exception as error:
            out_of_memory = _is_out_of_memory(error)
            if _device_is_lost(error) and not out_of_memory:
                raise
            if len(samples) == 1:
                samples[0].fail("question" if isinstance(error, CaptionError) else "model", error)
                samples[0].out_of_memory = out_of_memory
                self.out_of_memory_samples += out_of_memory
                return [_Response(samples[0], self._failed(samples[0]))]
            if not out_of_memory:
                self._warn_once(f"a batch of {len(samples)} failed ({error!r}); halving it to find the sample")
        # outside the except clause, where the error would keep the batch's tensors alive
        encoded.inputs = encoded.exception = None
        half = (len(samples) + 1) // 2
        if out_of_memory:
            self._limit_batches(len(samples), half)
        return self._in_parts(samples, half)

    def _limit_batches(self, tried: int, limit: int) -> None:
        torch.cuda.empty_cache()
        self._batch_limit = limit
        eval_logger.warning(f"bitquake_hf: out of memory with a batch of {tried}; going on with at most {limit}")

    def _in_parts(self, samples: list[Sample], size: int) -> list[_Response]:
        parts = (samples[at : at + size] for at in range(0, len(samples), size))
        return [response for part in parts for response in self._respond(self._encode(part))]

    @torch.inference_mode()
    def _generate(self, encoded: _Encoded) -> list[_Response]:
        samples, contract, request = encoded.samples, encoded.samples[0].contract, encoded.samples[0].request
        inputs = encoded.inputs.to(self._input_device, self.dtype)
        forms = self._letter_forms(contract)
        tracked = sorted({token for ids in forms.values() for token in ids})
        recorder = GreedyRecorder(tracked)
        length = inputs["input_ids"].shape[1]
        stopping = [StopOnText(self._decoder, request.until, length)] if request.until else None
        config = copy.copy(self._generation_config)
        config.max_new_tokens, config.use_cache = request.max_new_tokens, self._use_cache
        with ExitStack() as stack:
            found: list[Features] = []
            if self._states is not None and encoded.positions is not None:
                found = stack.enter_context(self._states.watching(encoded.positions))
            output = self._model.generate(
                **inputs,
                generation_config=config,
                logits_processor=[recorder] if contract.envelope else None,
                stopping_criteria=stopping,
            )
        rows = output[:, length:].tolist()
        input_tokens = inputs["attention_mask"].sum(dim=1).tolist()
        steps = recorder.steps() if contract.envelope else None
        boxes = contract.protocol == "grounding"
        keys, whole, states = self._keep(samples, found[0]) if found else ([""] * len(samples), [], None)
        envelopes: dict[int, Envelope] = {}
        responses = []
        for row, (sample, tokens) in enumerate(zip(samples, rows, strict=True)):
            answer = read_answer(self._decoder, tokens, self._eos, request.until, with_ends=boxes)
            n_tokens = answer.n_answer + answer.n_end
            if steps is None:
                text = answer.text.strip()
            elif not steps.finite[row, :n_tokens].all():
                step = int(steps.finite[row, :n_tokens].argmin())
                sample.fail(
                    "model",
                    FloatingPointError(
                        f"the logits of step {step + 1} are not finite ({self.dtype}, quant {self.card.spec_name})"
                    ),
                )
                text = self._failed(sample)
            else:
                text = ""
                envelopes[row] = self._envelope(
                    sample,
                    answer,
                    steps,
                    row,
                    dict(zip(tracked, steps.tracked_log_prob[row], strict=True)),
                    encoded.processed[row],
                    keys[row],
                )
            responses.append(_Response(sample, text, int(input_tokens[row]), n_tokens))
        if states is not None and self._emitters:
            self._emit(envelopes, whole, states, contract.confidence)
        for row, envelope in envelopes.items():
            responses[row].text = envelope.encode()
        return responses

    def _emit(self, envelopes: dict[int, Envelope], whole: list[int], states: Features, primary: str) -> None:
        """Add the Selectors' confidences to a batch's envelopes; None where a sample has no finite features.

        Args:
            envelopes: by their row in the batch.
            whole, states: rows with finite features, and these.
            primary: the confidence that the task declares.
        """
        place = [at for at, row in enumerate(whole) if row in envelopes]
        answered = [envelopes[whole[at]] for at in place]
        confidences = [envelope.confidence for envelope in answered]
        found = emitted(self._emitters, states.rows(place), confidences, primary)
        for envelope in envelopes.values():
            envelope.confidence.update(dict.fromkeys(found))
        for name, values in found.items():
            for confidence, value in zip(confidences, values, strict=True):
                confidence[name] = value

    def _keep(self, samples: list[Sample], features: Features) -> tuple[list[str], list[int], Features]:
        """Hand a batch's features to the store, where they are to be kept.

        Returns:
            Key of each sample's, "" where they are not kept; rows with finite features; these, rounded as in a store.
        """
        whole = [row for row in range(len(samples)) if not any(np.isnan(one[row]).any() for one in features[:3])]
        if self._store is None:
            return [""] * len(samples), whole, rounded(features.rows(whole))
        keys = [
            feature_key(self.model_hash, self._states_hash, prompt_hash(s.prompt), s.question, s.pixel_hashes)
            for s in samples
        ]
        states = self._store.put([keys[row] for row in whole], features.rows(whole))
        return [key if row in whole else "" for row, key in enumerate(keys)], whole, states

    def _envelope(
        self,
        sample: Sample,
        answer: Answer,
        steps: GreedySteps,
        row: int,
        tracked: dict[int, float],
        processed: list[tuple[int, int]],
        features: str,
    ) -> Envelope:
        log_prob: Floats = steps.log_prob[row]
        confidence = answer_confidences(log_prob, answer.n_answer, answer.n_end, float(steps.margin_first[row]))
        options = None
        if sample.letters:
            forms = self._letter_forms(sample.contract)
            options = option_probabilities(tracked, {letter: forms[letter] for letter in sample.letters})
            chosen = chosen_letter(answer.text, sample.letters)
            confidence["options"] = options[chosen] if options is not None and chosen is not None else None
        elif sample.contract.protocol == "grounding":
            confidence.update(box_confidences(answer.text, answer.ends, log_prob))
        return Envelope(
            text=answer.text.strip(),
            confidence=confidence,
            option_probabilities=options,
            entropy_first=float(steps.entropy_first[row]),
            n_tokens=answer.n_answer + answer.n_end,
            truncated=answer.truncated,
            features=features,
            **self._seen(sample, processed),
        )

    def _seen(self, sample: Sample, processed: Sequence[tuple[int, int]] = ()) -> dict[str, Any]:
        """What every envelope says of the model and of what it was shown."""
        return {
            "pixel_hash": sample.pixel_hashes,
            "image_sizes": sample.image_sizes,
            "processed_sizes": list(processed),
            "prompt_hash": prompt_hash(sample.prompt) if sample.prompt else "",
            "model_hash": self.model_hash,
            "card": self.card_hash,
            "model_type": self.config.model_type,
        }

    def _failed(self, sample: Sample) -> str:
        """The response of a sample that has no answer: an envelope that says why, or nothing."""
        if not sample.contract.envelope:
            return ""
        return Envelope(text="", error=sample.error, **self._seen(sample)).encode()

    @torch.inference_mode()
    def _rank_captions(self, encoded: _Encoded) -> list[_Response]:
        """Score the candidate captions of one sample."""
        (sample,) = encoded.samples
        inputs = encoded.inputs.to(self._input_device, self.dtype)
        entropy, log_probs = None, None
        if self._matching:
            picture = MatchingPicture(self._model, inputs["pixel_values"])
            scores = self._in_chunks(picture.log_odds, encoded.captions)
        else:
            prompt = encode_prompt(self._model, inputs, use_cache=self._use_cache)
            log_probs = self._in_chunks(prompt.log_probs, encoded.captions)
            scores, entropy = [row.sum() for row in log_probs], prompt.entropy
        values: Floats = np.array(scores, dtype=np.float64)
        if not np.isfinite(values).all():
            bad = int(np.isfinite(values).argmin())
            raise FloatingPointError(
                f"the score of candidate {bad} is not finite ({self.dtype}, quant {self.card.spec_name})"
            )
        best = int(values.argmax())  # of equal scores, the first
        confidence: dict[str, float | None] = {}
        n_tokens = 0
        if log_probs is not None:
            n_tokens, n_end = len(log_probs[best]), int(self._turn.end is not None)
            confidence = answer_confidences(log_probs[best], n_tokens - n_end, n_end, margin_first=0.0)
            confidence["margin"] = None  # the caption's first token is not the likeliest one
        confidence["candidates"] = float(1 / np.exp(values - values[best]).sum())
        text = Envelope(
            text=sample.candidates[best],
            confidence=confidence,
            candidate_scores=values.tolist(),
            candidate_kind="matching" if self._matching else "log_probability",
            entropy_first=entropy,
            n_tokens=n_tokens,
            **self._seen(sample, encoded.processed[0]),
        ).encode()
        n_input = 0 if self._matching else int(inputs["attention_mask"].sum())
        return [_Response(sample, text, n_input, n_tokens)]

    def _in_chunks(
        self, score: Callable[[Sequence[Sequence[int]]], Iterable[Any]], captions: list[list[int]]
    ) -> list[Any]:
        """Scores of captions, at most ``batch_size`` at a time, like lengths together; fewer once memory runs out."""
        waiting = sorted(range(len(captions)), key=lambda i: (-len(captions[i]), i))
        found: dict[int, Any] = {}
        while waiting:
            chunk = waiting[: self._batch_limit]
            scores = None
            try:
                scores = score([captions[i] for i in chunk])
            except Exception as error:
                if len(chunk) == 1 or not _is_out_of_memory(error):
                    raise
            # outside the except clause, where the error would keep the chunk's tensors alive
            if scores is None:
                self._limit_batches(len(chunk), (len(chunk) + 1) // 2)
                continue
            found.update(zip(chunk, scores, strict=True))
            waiting = waiting[len(chunk) :]
        return [found[i] for i in range(len(captions))]

    def _letter_forms(self, contract: TaskContract) -> dict[str, tuple[int, ...]]:
        if not contract.letters:
            return {}
        cache: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = self.__dict__.setdefault("_letters", {})
        if contract.letters not in cache:
            cache[contract.letters] = letter_forms(self._decoder, contract.letters)
            if lacking := [letter for letter, ids in cache[contract.letters].items() if not ids]:
                self._warn_once(f"option letters {lacking} are no single tokens of this model: no option probabilities")
        return cache[contract.letters]

    # reporting

    def _executor(self, stack: ExitStack, threads: int) -> ThreadPoolExecutor | None:
        if threads == 0:
            return None
        executor = ThreadPoolExecutor(threads, thread_name_prefix="bitquake_hf")
        stack.callback(executor.shutdown, wait=True, cancel_futures=True)
        return executor

    def _warn_once(self, message: str) -> None:
        if message not in self._reported:
            self._reported.add(message)
            eval_logger.warning(f"bitquake_hf: {message}")

    def _report(self, sample: Sample) -> None:
        """Show the traceback of each kind of unexpected failure once."""
        if (sample.error or "").startswith("model: ") and sample.origin not in self._reported:
            self._reported.add(sample.origin)
            eval_logger.opt(exception=sample.exception).error(
                f"bitquake_hf: task {sample.task!r}: a sample failed: {sample.error}"
            )

    def _log_features(self) -> None:
        if self._store is not None and self._store.unreadable:
            names = ", ".join(str(path) for path in self._store.unreadable)
            eval_logger.warning(f"bitquake_hf: damaged features are left out, and computed again: {names}")
        if self._store is not None and self._store.clamped:
            eval_logger.warning(
                f"bitquake_hf: {self._store.clamped} numbers of the features are beyond float16 and kept as ±65504"
            )

    def _log_journal(self, journal: Journal, known: int, total: int) -> None:
        if known or journal.unreadable:
            cut = f"; {journal.unreadable} lines were cut short and left out" if journal.unreadable else ""
            eval_logger.info(f"bitquake_hf: {known} of {total} answers came from the journal {self._journal}{cut}")

    def _log_noise_cache(self, pictures: Counter[str]) -> None:
        if self._noise_cache is None:
            return
        if self._noise_cache.problem:
            self._warn_once(f"the noise cache is only read, it cannot be written: {self._noise_cache.problem}")
        if n := pictures.total():
            share = f"{pictures['hits']} of {n} noisy pictures ({pictures['hits'] / n:.0%})"
            eval_logger.info(f"bitquake_hf: {share} came from the noise cache")

    def _log_failures(self, failures: list[Sample], total: int) -> None:
        if failures:
            kinds = Counter((sample.error or "").split(":", 1)[0] for sample in failures)
            counts = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
            eval_logger.warning(
                f"bitquake_hf: {len(failures)} of {total} samples failed ({counts}); the first, of task "
                f"{failures[0].task!r}: {failures[0].error}"
            )


def _refuse_hopeless_run(failures: list[Sample], probe: int) -> None:
    """Raise when ``probe`` samples, at least two, failed in the same way in the model, and not for want of memory."""
    failed = [sample for sample in failures if (sample.error or "").startswith("model: ")]
    if len(failed) < max(2, probe) or len({sample.origin for sample in failed}) > 1 or failed[0].out_of_memory:
        return
    raise RuntimeError(
        f"bitquake_hf: the first {len(failed)} samples of task {failed[0].task!r} all failed in the same way: "
        f"{failed[0].error} ({failed[0].origin}; its traceback is in the log)"
    )


def _refuse_changed(source: str, card: QuantCard) -> None:
    """Raise for a checkpoint whose weights are not those that its own quant card was made from."""
    file = Path(source) / CARD_FILE
    if not card.checkpoint_format or not file.is_file():
        return
    told = QuantCard.model_validate_json(file.read_bytes())
    if told.dtype == card.dtype and told.weights_hash != card.weights_hash:
        raise ValueError(
            f"bitquake_hf: the weights in {source} are not those that its {CARD_FILE} was made from (hash "
            f"{card.weights_hash[:12]}, the card says {told.weights_hash[:12]}). `bitquake card {source}` shows where "
            f"they differ; quantize again, or remove {CARD_FILE} to run what is there."
        )


def _open_journal_folder(journal: str | None, model_hash: str) -> Path | None:
    """The model's folder inside the journal, made now: a run must not find out after hours that it cannot write."""
    if journal is None:
        return None
    folder = Path(journal).expanduser() / model_hash
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"bitquake_hf: journal={journal!r} cannot be made: {error}. Give a folder that can be written."
        ) from error
    return folder


def _open_noise_cache(folder: str | None, gigabytes: Any) -> NoiseCache | None:
    size = int(as_positive("noise_cache_gb", gigabytes) * 1e9)
    if folder is None:
        return None
    try:
        return NoiseCache(Path(folder).expanduser(), max(1, size))
    except OSError as error:
        raise ValueError(
            f"bitquake_hf: noise_cache={folder!r} cannot be made: {error}. Give a folder that can be written."
        ) from error


def _identity(sample: Sample, arguments: tuple[Any, ...]) -> list[Any]:
    """What decides a sample's answer, apart from model and neighbours."""
    _, _, _, doc_id, task, split = arguments
    contract = [sample.contract.envelope, sample.contract.protocol, sample.contract.letters, sample.letters]
    seen = [prompt_hash(sample.prompt), sample.pixel_hashes, sample.candidates]
    return [task, str(split), str(doc_id), asdict(sample.request), contract, seen]


def _is_out_of_memory(error: BaseException) -> bool:
    # the CPU's words, CUDA's own, and cuBLAS's when there is no room left for its workspace
    words = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in words)


def _device_is_lost(error: BaseException) -> bool:
    """A CUDA error after which no call succeeds any more: going on would fail every sample that is left."""
    lost = getattr(torch, "AcceleratorError", None)
    return (lost is not None and isinstance(error, lost)) or "device-side assert" in str(error)
