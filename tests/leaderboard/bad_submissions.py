"""The corpus of submissions that must be refused: one edit each of a real one, with the code of the reason expected.

A ``Draft`` is a real submission taken apart. ``write`` puts it together again and signs it (hashes in the manifest), so
that a case is refused for what it is and not because a hash no longer fits; cases about the hashes do not sign.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from bitquake.quant_card import QuantCard

CARD, RECORDS, MANIFEST = "quant_card.json", "records.jsonl.zst", "manifest.json"
ADVQA, NOISE = "block_advqa_clean", "block_vqav2_gaussian_noise_5"


@dataclass
class Draft:
    """A submission taken apart; ``raw`` replaces whole files, ``text`` the decompressed records."""

    name: str
    manifest: Any
    card: dict[str, Any]
    rows: list[Any]
    raw: dict[str, bytes] = field(default_factory=dict)
    text: bytes | None = None
    sign: bool = True
    card_hash: bool = True
    """Whether the manifest's card and model hash are those of the card."""

    @classmethod
    def of(cls, folder: Path) -> Draft:
        text = zstandard.ZstdDecompressor().decompress((folder / RECORDS).read_bytes())
        return cls(
            folder.name,
            json.loads((folder / MANIFEST).read_bytes()),
            json.loads((folder / CARD).read_bytes()),
            [json.loads(line) for line in text.splitlines()],
        )

    def content(self) -> dict[str, bytes]:
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in self.rows)
        text = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")
        card = json.dumps(self.card, sort_keys=True, separators=(",", ":")) + "\n"
        found = {CARD: card.encode(), RECORDS: _compressed(text if self.text is None else self.text)}
        found |= {name: data for name, data in self.raw.items() if name != MANIFEST}
        if isinstance(self.manifest, dict):
            if self.sign:
                for name in (CARD, RECORDS):
                    entry = {"sha256": hashlib.sha256(found[name]).hexdigest(), "bytes": len(found[name])}
                    if isinstance(self.manifest.get("files"), dict) and name in self.manifest["files"]:
                        self.manifest["files"][name] = entry
            if self.card_hash:
                try:
                    read = QuantCard.model_validate(self.card)
                    self.manifest |= {"card_hash": read.content_hash, "model_hash": read.model_hash}
                except ValueError:
                    pass
        found[MANIFEST] = self.raw.get(MANIFEST, json.dumps(self.manifest, indent=1).encode("utf-8", "surrogatepass"))
        return found

    def write(self, root: Path) -> Path:
        folder = root / self.name
        folder.mkdir(parents=True)
        for name, data in self.content().items():
            (folder / name).write_bytes(data)
        return folder

    def of_task(self, task: str) -> list[Any]:
        return [row for row in self.rows if row["task"] == task]


def _compressed(text: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(text)


Edit = Callable[[Draft], None]
After = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One bad submission: ``edit`` changes the draft, ``after`` the folder that was written.

    codes: one of these must be among the findings. where: must stand in that finding's place.
    """

    name: str
    codes: tuple[str, ...]
    edit: Edit = lambda draft: None
    after: After | None = None
    where: str = ""


MARKUP = "<script>alert(1)</script>"
HOSTILE = {
    "text-markup": (MARKUP, '"><img src=x onerror=alert(1)>', "</td></table><h1>won</h1>"),
    "text-direction": ("int4\u202e46tni", "\u2066abc\u2069"),
    "text-script": ("javascript:alert(document.cookie)", "data:text/html;base64,PHN2Zz4="),
    "text-control": ("a\x1b[2Jb", "a\x00b", "zero\u200bwidth"),
}


def cases(base: Draft, twin: Draft, gold: dict[str, dict[str, Any]]) -> Iterator[Case]:
    """All cases; ``gold``: task -> sample id -> gold sample. Seeded: the same cases each time."""
    random_numbers = random.Random(5)
    yield from _files()
    yield from _truncated(base, random_numbers)
    yield from _compression(base)
    yield from _json_forms()
    yield from _fields(base)
    yield from _hostile_texts(base)
    yield from _confidences(gold)
    yield from _samples()
    yield from _edited_hashes()
    yield from _cards(base)
    yield from _twins(twin)


def _set(*path: Any, to: Any) -> Edit:
    """Change one place of the draft: the first part names manifest, card or rows."""

    def edit(draft: Draft) -> None:
        value = getattr(draft, path[0])
        for part in path[1:-1]:
            value = value[part]
        value[path[-1]] = copy.deepcopy(to)

    return edit


def _drop(*path: Any) -> Edit:
    def edit(draft: Draft) -> None:
        value = getattr(draft, path[0])
        for part in path[1:-1]:
            value = value[part]
        del value[path[-1]]

    return edit


def _unsigned(edit: Edit) -> Edit:
    def both(draft: Draft) -> None:
        draft.sign = draft.card_hash = False
        draft.content()  # nothing is signed any more, so what follows is not either
        edit(draft)

    return both


def _raw(file: str, change: Callable[[bytes], bytes], *, sign: bool = True) -> Edit:
    """Replace a file by a change of its own bytes."""

    def edit(draft: Draft) -> None:
        data = draft.content()[file]
        draft.sign = sign
        draft.raw[file] = change(data)

    return edit


def _line(number: int, change: Callable[[str], str | bytes]) -> Edit:
    """Replace one line of the records, as text."""

    def edit(draft: Draft) -> None:
        lines: list[bytes] = [json.dumps(row, ensure_ascii=False).encode() for row in draft.rows]
        changed = change(lines[number].decode())
        lines[number] = changed if isinstance(changed, bytes) else changed.encode("utf-8", "surrogatepass")
        draft.text = b"".join(line + b"\n" for line in lines)

    return edit


def _files() -> Iterator[Case]:
    for file in (MANIFEST, CARD, RECORDS):
        yield Case(f"missing {file}", ("file-missing",), after=lambda f, n=file: (f / n).unlink(), where=file)  # type: ignore[misc]

        def link(folder: Path, name: str = file) -> None:
            target = folder.parent.parent / f"target-of-{name}"
            (folder / name).rename(target)
            (folder / name).symlink_to(target)

        def outside(folder: Path, name: str = file) -> None:
            (folder / name).unlink()
            (folder / name).symlink_to("/etc/hostname")

        def pipe(folder: Path, name: str = file) -> None:
            (folder / name).unlink()
            os.mkfifo(folder / name)

        def directory(folder: Path, name: str = file) -> None:
            (folder / name).unlink()
            (folder / name).mkdir()

        yield Case(f"link {file}", ("file-link",), after=link, where=file)
        yield Case(f"link outside {file}", ("file-link",), after=outside, where=file)
        yield Case(f"pipe {file}", ("file-kind",), after=pipe, where=file)
        yield Case(f"directory {file}", ("file-kind", "unreadable"), after=directory, where=file)
    for name in ("scores.json", ".hidden", "records.jsonl", "run.py", "a b", "<b>.json", "\u202egnp.exe"):
        yield Case(f"extra {name!a}", ("file-unknown",), after=lambda f, n=name: (f / n).write_text("x"))  # type: ignore[misc]
    yield Case("extra folder", ("file-unknown",), after=lambda f: (f / "more").mkdir())
    names = ("acme", "acme__x", "Acme__block__int4", "acme__block idefics__int4", "acme__block__int4__x", "acme__..__x")
    for name in (
        *names,
        f"acme__{MARKUP.replace('/', '')}__x",
        "acme__a\u202eb__x",
        "acme__-x__int4",
        f"a__{'m' * 90}__x",
    ):
        yield Case(f"folder {name!a}", ("folder-name",), after=lambda f, n=name: f.rename(f.parent / n) and None)  # type: ignore[misc]
    yield Case("folder differs", ("name-differs",), after=lambda f: f.rename(f.parent / "acme__other__int4") and None)

    def linked(folder: Path) -> None:
        target = folder.parent.parent / folder.name
        folder.rename(target)
        folder.symlink_to(target)

    yield Case("folder is a link", ("not-a-folder",), after=linked)
    for name in ("../../other.json", "/etc/passwd", "records.jsonl.zst/../x", "C:\\x", "..", "", "./quant_card.json"):
        entry = {"sha256": "0" * 64, "bytes": 1}
        yield Case(f"manifest names {name!a}", ("files-listed",), _set("manifest", "files", name, to=entry))
    for twin in ("../../etc", "/etc", "..", "acme__x__y/../..", "acme__block-idefics3__bf16/", "a__b__c\n"):
        yield Case(f"twin {twin!a}", ("field-form", "text-control"), _set("manifest", "twin", to=twin), where="twin")


def _truncated(base: Draft, numbers: random.Random) -> Iterator[Case]:
    content = base.content()
    for file, code in ((MANIFEST, "json-syntax"), (CARD, "file-hash"), (RECORDS, "file-hash")):
        size = len(content[file])
        for at in sorted({0, 1, size // 2, size - 3, *(numbers.randrange(size) for _ in range(12))}):
            cut = _raw(file, lambda data, at=at: data[:at], sign=False)  # type: ignore[misc]
            yield Case(f"{file} cut at {at}", (code,), cut, where=file)
    size = len(content[RECORDS])
    for at in sorted({1, 5, 17, size - 1, size - 4, *(numbers.randrange(20, size) for _ in range(12))}):
        cut = _raw(RECORDS, lambda data, at=at: data[:at])  # type: ignore[misc]
        yield Case(f"signed records cut at {at}", ("zstd-truncated",), cut, where=RECORDS)
    size = len(content[CARD])
    for at in (1, size // 3, size // 2, size - 2):
        yield Case(f"signed card cut at {at}", ("json-syntax",), _raw(CARD, lambda d, at=at: d[:at]), where=CARD)  # type: ignore[misc]
    text = zstandard.ZstdDecompressor().decompress(content[RECORDS])
    for at in (10, len(text) // 2 + 3, len(text) - 1):
        if text[at - 1 : at] != b"\n":
            yield Case(f"records' text cut at {at}", ("line-unfinished",), _set_text(text[:at]), where=RECORDS)
    boundary = text.rfind(b"\n", 0, len(text) // 3) + 1
    yield Case("records' text cut between lines", ("task-missing", "rows-missing"), _set_text(text[:boundary]))
    yield Case("no record", ("task-missing",), _set_text(b""))


def _set_text(text: bytes) -> Edit:
    def edit(draft: Draft) -> None:
        draft.text = text

    return edit


def _frame(blocks: list[tuple[int, bytes]], window: int = 0x58) -> bytes:
    """A zstd frame of raw (kind 0) and repeating (kind 1, 128 kB each) blocks, without content size (RFC 8878)."""
    out = b"\x28\xb5\x2f\xfd\x00" + bytes([window])
    for i, (kind, data) in enumerate(blocks):
        size = len(data) if kind == 0 else 128 << 10
        out += ((i == len(blocks) - 1) | kind << 1 | size << 3).to_bytes(3, "little") + data
    return out


def _compression(base: Draft) -> Iterator[Case]:
    def records(data: bytes) -> Edit:
        return _raw(RECORDS, lambda _: data)

    row = (json.dumps(base.rows[0]) + "\n").encode()
    yield Case("bomb of one line", ("line-too-long",), records(_frame([(1, b" ")] * 12_000)), where=RECORDS)
    yield Case("bomb of empty lines", ("json-syntax",), records(_frame([(1, b"\n")] * 12_000)), where=f"{RECORDS}:1")
    yield Case("bomb of equal records", ("row-duplicate",), records(zstandard.compress(row * 200_000, 1)))
    yield Case("bomb behind a record", ("line-too-long",), records(_frame([(0, row)] + [(1, b"x")] * 12_000)))
    sized = zstandard.ZstdCompressor(level=1).compressobj(size=2_000_000_000)
    yield Case("declares two gigabytes", ("too-much-text",), records(sized.compress(b" " * 1000) + sized.flush(1)))
    yield Case("window of a gigabyte", ("zstd-window",), records(_frame([(0, row)], window=0xA0)))
    yield Case("window of 16 megabytes", ("zstd-window",), records(_frame([(0, row)], window=0x70)))
    good = base.content()[RECORDS]
    for name, data, codes in (
        ("no zstd", b"{}\n" * 30, ("zstd-format",)),
        ("gzip", b"\x1f\x8b\x08\x00" + bytes(40), ("zstd-format",)),
        ("skippable frame first", b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + good, ("zstd-format",)),
        ("needs a dictionary", b"\x28\xb5\x2f\xfd\x01\x58\x07" + good[6:], ("zstd-format",)),
        ("trailing byte", good + b"\0", ("zstd-trailing",)),
        ("trailing text", good + b"<script>", ("zstd-trailing",)),
        ("two frames", good + good, ("zstd-trailing",)),
        ("empty frame first", zstandard.compress(b"") + good, ("zstd-trailing",)),
        ("block of no kind", good[:6] + b"\xff\xff\xff" + good[9:], ("zstd-damaged", "zstd-truncated", "zstd-format")),
    ):
        yield Case(name, codes, records(data), where=RECORDS)
    for at in range(40, len(good) - 8, max(1, len(good) // 12)):
        damage = _raw(RECORDS, lambda data, at=at: data[:at] + bytes([data[at] ^ 0x5A]) + data[at + 1 :])  # type: ignore[misc]
        # an altered block may still decompress: then the checksum, or the text, is wrong
        codes = ("zstd-damaged", "zstd-truncated", "zstd-trailing", "json-syntax", "json-encoding")
        yield Case(f"byte {at} damaged", (*codes, "field-form", "field-unknown", "row-order", "line-too-long"), damage)
    for file, size in ((MANIFEST, 1_000_001), (CARD, 4_000_001), (RECORDS, 20_000_001)):
        yield Case(f"oversized {file}", ("too-large",), _raw(file, lambda _, n=size: bytes(n), sign=False), where=file)  # type: ignore[misc]

    def grown(folder: Path) -> None:
        with (folder / RECORDS).open("r+b") as file:  # sparse
            file.truncate(1 << 40)

    yield Case("a terabyte, sparse", ("too-large",), after=grown, where=RECORDS)
    long = "y" * 70_000
    yield Case("line of 70 kB", ("line-too-long",), _set("rows", 0, "answer", to=long), where=RECORDS)
    yield Case("answer of 9,000 characters", ("field-too-long",), _set("rows", 0, "answer", to=long[:9000]))
    yield Case("id of 400 characters", ("field-too-long",), _set("rows", 0, "id", to=long[:400]))
    yield Case("settings of a megabyte", ("field-too-long",), _set("manifest", "contact", to=long))


def _json_forms() -> Iterator[Case]:
    replace: dict[str, tuple[tuple[str, ...], Callable[[bytes], bytes]]] = {
        "byte order mark": (("json-encoding",), lambda data: b"\xef\xbb\xbf" + data),
        "UTF-16": (("json-encoding",), lambda data: data.decode().encode("utf-16")),
        "NUL": (("json-encoding",), lambda data: data.replace(b":", b":\0", 1)),
        "invalid UTF-8": (("json-encoding",), lambda data: data.replace(b'"', b'"\xff', 1)),
        "overlong UTF-8": (("json-encoding",), lambda data: data.replace(b'"', b'"\xc0\xaf', 1)),
        "trailing comma": (("json-syntax",), lambda data: data.rstrip()[:-1] + b",}\n"),
        "comment": (("json-syntax",), lambda data: b"// mine\n" + data),
        "two values": (("json-syntax",), lambda data: data.rstrip() + b"{}\n"),
        "single quotes": (("json-syntax",), lambda data: data.replace(b'"', b"'")),
        "a list": (("field-type",), lambda data: b"[" + data.strip() + b"]"),
        "null": (("field-type",), lambda data: b"null"),
        "a text": (("field-type",), lambda data: b'"manifest"'),
        "a number": (("field-type",), lambda data: b"7"),
        "empty object": (("field-missing",), lambda data: b"{}"),
        "deep nesting": (("json-depth",), lambda data: b"[" * 5000 + b"]" * 5000),
        "nested in a field": (
            ("json-depth",),
            lambda data: data.replace(b"{", b'{"x":' + b"[" * 90 + b"]" * 90 + b",", 1),
        ),
        "key twice": (("json-duplicate-key",), lambda data: data.replace(b"{", b'{"version":9,', 1)),
        "NaN": (("json-number",), lambda data: data.replace(b"{", b'{"a":NaN,', 1)),
        "infinity": (("json-number",), lambda data: data.replace(b"{", b'{"a":-Infinity,', 1)),
        "1e999": (("json-number",), lambda data: data.replace(b"{", b'{"a":1e999,', 1)),
        "number of 5,000 digits": (("json-number",), lambda data: data.replace(b"{", b'{"a":' + b"9" * 5000 + b",", 1)),
        "number of 30 digits": (("json-number",), lambda data: data.replace(b"{", b'{"a":' + b"1" * 30 + b",", 1)),
        "unknown field": (("field-unknown",), lambda data: data.replace(b"{", b'{"accuracy":0.99,', 1)),
    }
    for name, (codes, change) in replace.items():
        for file in (MANIFEST, CARD):
            yield Case(f"{file}: {name}", codes, _raw(file, change), where=file)
        if name in ("UTF-16", "single quotes", "comment"):
            continue
        if name == "key twice":
            change = lambda data: data.replace(b"{", b'{"task":"x",', 1)  # noqa: E731
        edit = _line(3, lambda line, change=change: change(line.encode()))  # type: ignore[misc]
        yield Case(f"record: {name}", codes, edit, where=f"{RECORDS}:4")
    # Takes an hour where each key is looked for among all others.
    keys = b"".join(b'"%d":1,' % number for number in range(90_000))
    for file in (MANIFEST, CARD):
        many = _raw(file, lambda data: b"{" + keys + b'"89999":1}')
        yield Case(f"{file}: the last of many keys twice", ("json-duplicate-key",), many, where=file)
    crlf = _line(2, lambda line: f"{line}\r")
    yield Case("record: carriage return", ("line-end",), crlf, where=f"{RECORDS}:3")
    yield Case("record: empty line", ("json-syntax",), _line(2, lambda line: ""), where=f"{RECORDS}:3")
    yield Case("record: confidence twice", ("json-duplicate-key",), _line(5, _twice), where=f"{RECORDS}:6")
    yield Case("record: lone surrogate", ("text-control", "field-value"), _line(5, _surrogate), where=f"{RECORDS}:6")
    yield Case("card: other spacing", ("card-form",), _raw(CARD, lambda d: d.replace(b",", b", ")), where=CARD)
    yield Case("card: no line end", ("card-form",), _raw(CARD, bytes.strip), where=CARD)
    for version in (0, 2, "1", None, 1.5):
        codes = ("manifest-version",)
        yield Case(f"manifest of version {version!r}", codes, _set("manifest", "version", to=version), where="version")


def _twice(line: str) -> str:
    return line.replace('"confidence": {', '"confidence": {"joint": 0.999, ')


def _surrogate(line: str) -> str:
    return json.dumps(json.loads(line) | {"answer": "\ud800"})


def _fields(base: Draft) -> Iterator[Case]:
    """Every field of the manifest, a task's entry and a record: missing, and of every wrong type."""
    wrong: tuple[Any, ...] = (7, -1.5, True, None, [], {}, "x" * 20_001, "")
    optional = {"contact", "link"}
    for name, value in base.manifest.items():
        if name == "version":
            continue
        if name not in optional:
            yield Case(f"manifest without {name}", ("field-missing",), _unsigned(_drop("manifest", name)), where=name)
        fits = _fitting(value)
        for other in wrong:
            if isinstance(other, fits) and not isinstance(other, bool):
                continue
            yield Case(
                f"manifest.{name} = {other!r:.12}", _WRONG, _unsigned(_set("manifest", name, to=other)), where=name
            )
    entry = base.manifest["tasks"][ADVQA]
    for name, value in entry.items():
        yield Case(f"task without {name}", ("field-missing",), _drop("manifest", "tasks", ADVQA, name), where=name)
        fits = _fitting(value) if value is not None else (dict,)
        for other in (7.5, [], "x" * 2000, -1):
            if not isinstance(other, fits) or other in ("x" * 2000, -1):
                edit = _set("manifest", "tasks", ADVQA, name, to=other)
                yield Case(f"task.{name} = {other!r:.12}", _WRONG, edit, where=name)
    for name, value in base.rows[0].items():
        yield Case(f"record without {name}", ("field-missing",), _drop("rows", 4, name), where=name)
        for other in (7, True, [], None, {"x": 1}):
            if (name == "answer" and other is None) or isinstance(other, _fitting(value)):
                continue
            yield Case(f"record.{name} = {other!r:.12}", _WRONG, _set("rows", 4, name, to=other), where=f"{RECORDS}:5")
    for name in ("score", "gold", "target", "image_id", "accuracy", "__proto__"):
        yield Case(f"record with {name}", ("field-unknown",), _set("rows", 4, name, to=1.0), where=name)
    for name, other in (("failure", "cosmic rays"), ("parse_failure", False), ("truncated", 1), ("truncated", "yes")):
        yield Case(f"record.{name} = {other!r}", _WRONG, _set("rows", 4, name, to=other), where=name)
    for link in ("javascript:alert(1)", "ftp://x.org", "//evil.org", "https://", "https://a b", "HTTPS:x", "data:,x"):
        codes = ("field-form", "text-script")
        yield Case(f"link {link}", codes, _set("manifest", "link", to=link), where="link")


_WRONG = ("field-type", "field-form", "field-too-long", "field-too-short", "field-value", "field-range",
          "field-unknown", "field-missing", "files-listed")  # fmt: skip


def _fitting(value: Any) -> tuple[type, ...]:
    return (int,) if isinstance(value, int) else (type(value),)


def _hostile_texts(base: Draft) -> Iterator[Case]:
    """Every text of manifest, card and records, replaced by what acts on a page, a terminal or an eye."""
    manifest = (
        *((name,) for name in ("board", "organisation", "model", "quantization", "twin", "card_hash", "model_hash")),
        *(("contact",), ("link",), ("commands", 0), ("versions", "torch"), ("files", CARD, "sha256")),
        *(("tasks", ADVQA, name) for name in base.manifest["tasks"][ADVQA] if name not in ("n", "settings", "noise")),
        *(("tasks", ADVQA, "settings", "batch size"), ("tasks", NOISE, "noise", "name")),
    )
    card = (
        *((name,) for name in base.card if isinstance(base.card[name], str)),
        *(("libraries", "torch"), ("calibration", "data"), ("spec", "method"), ("kept", next(iter(base.card["kept"])))),
        *(("modules", 0, name) for name in base.card["modules"][0] if isinstance(base.card["modules"][0][name], str)),
    )
    for i, path in enumerate(manifest):
        for code, texts in HOSTILE.items():
            edit = _unsigned(_set("manifest", *path, to=texts[i % len(texts)]))
            yield Case(f"manifest.{'.'.join(map(str, path))}: {code}", (code,), edit, where=MANIFEST)
    for i, path in enumerate(card):
        for code, texts in HOSTILE.items():
            yield Case(
                f"card.{'.'.join(map(str, path))}: {code}", (code,), _set("card", *path, to=texts[i % len(texts)])
            )
    for code, texts in HOSTILE.items():
        for text in texts:
            for place in (("manifest", "versions"), ("manifest", "tasks", ADVQA, "settings"), ("card", "libraries")):
                yield Case(f"{'.'.join(place)} key {text!a}", (code,), _set(*place, text, to="1"))
            yield Case(f"record id {text!a}", (code, "json-encoding"), _last_id(text), where=RECORDS)
            form = ("field-form", "text-control", "json-encoding")
            for name in ("task", "pixels", "question", "prompt"):
                yield Case(
                    f"record {name} {text!a}", (code, *form), _set("rows", 2, name, to=text), where=f"{RECORDS}:3"
                )
            yield Case(f"confidence {text!a}", form, _set("rows", 2, "confidence", text, to=0.5), where=f"{RECORDS}:3")
    for text in (*HOSTILE["text-direction"], "a\x1b[2Jb", "a\x07", "\x9b31m"):
        codes = ("text-direction", "text-control")
        yield Case(f"answer {text!a}", codes, _set("rows", 2, "answer", to=text), where=f"{RECORDS}:3")


def _last_id(text: str) -> Edit:
    """The hostile id comes last, so that the order of the records is not what is wrong."""

    def edit(draft: Draft) -> None:
        draft.rows[-1]["id"] = f"zzz {text}"

    return edit


def _confidences(gold: dict[str, dict[str, Any]]) -> Iterator[Case]:
    for place in (0, 59, 60, 99):
        for value in ("NaN", "Infinity", "-Infinity", "1e999", "-1e-999999999999999999999"):
            codes = ("json-number",)
            edit = _line(place, lambda line, v=value: _confidence(line, v))  # type: ignore[misc]
            yield Case(f"confidence {value} in record {place}", codes, edit, where=f"{RECORDS}:{place + 1}")
        for number in (-0.01, -1, 1.000001, 2, 100):
            edit = _set("rows", place, "confidence", "joint", to=number)
            yield Case(f"confidence {number} in record {place}", ("field-range",), edit, where="confidence.joint")
    for other in ("0.5", True, [0.5], {"p": 0.5}):
        edit = _set("rows", 7, "confidence", "joint", to=other)
        yield Case(f"confidence {other!r}", ("field-type",), edit, where="confidence.joint")
    yield Case("confidence null", ("confidence-missing",), _set("rows", 7, "confidence", "joint", to=None), where=ADVQA)
    yield Case("confidence left out", ("confidence-missing",), _drop("rows", 7, "confidence", "joint"), where=ADVQA)
    yield Case("no confidence", ("confidence-missing",), _set("rows", 70, "confidence", to={}), where=NOISE)
    yield Case("confidence of another name", ("confidence-name",), _set("rows", 7, "confidence", "mine", to=0.5))

    def a_name_for_each_row(draft: Draft) -> None:
        for number, row in enumerate(draft.of_task(ADVQA)):
            row["confidence"][f"selector_{number}"] = 0.5

    yield Case("a Selector of another name in each record", ("confidence-name",), a_name_for_each_row, where=ADVQA)

    def constant(task: str, name: str, value: float) -> Edit:
        def edit(draft: Draft) -> None:
            for row in draft.of_task(task):
                row["confidence"][name] = value

        return edit

    for task in (ADVQA, NOISE):
        for name, value in (("joint", 1.0), ("joint", 0.0), ("joint", 0.7), ("geometric_mean", 0.5), ("selector", 0.1)):
            yield Case(
                f"{name} {value} for all of {task}", ("confidence-constant",), constant(task, name, value), where=task
            )

    def oracle(low: float, high: float, name: str = "joint") -> Edit:
        def edit(draft: Draft) -> None:
            numbers = random.Random(1)
            for row in draft.of_task(ADVQA):
                right = gold[ADVQA][row["id"]].target.count(row["answer"]) >= 3
                row["confidence"][name] = (high if right else low) + 0.001 * numbers.random()

        return edit

    for low, high, name in (
        (0.1, 0.9, "joint"),
        (0.5, 0.502, "joint"),
        (0.0, 0.99, "selector"),
        (0.1, 0.9, "geometric_mean"),
    ):
        codes = ("confidence-oracle",)
        yield Case(f"{name} knows the answer ({low}, {high})", codes, oracle(low, high, name), where=ADVQA)
    contradiction = "row-contradiction"
    yield Case("failed with an answer", (contradiction,), _set("rows", 3, "failure", to="model"))
    yield Case("no answer, no failure", (contradiction,), _set("rows", 3, "answer", to=None))
    yield Case("parse failure with an answer", (contradiction,), _set("rows", 3, "parse_failure", to=True))


def _confidence(line: str, value: str) -> str:
    row = json.loads(line)
    row["confidence"]["joint"] = "@"
    return json.dumps(row).replace('"@"', value)


def _samples() -> Iterator[Case]:
    def rows(change: Callable[[list[Any]], list[Any]]) -> Edit:
        def edit(draft: Draft) -> None:
            draft.rows = change(draft.rows)

        return edit

    def swap(i: int, j: int) -> Edit:
        def edit(draft: Draft) -> None:
            draft.rows[i]["id"], draft.rows[j]["id"] = draft.rows[j]["id"], draft.rows[i]["id"]
            draft.rows.sort(key=lambda row: (row["task"], row["id"]))

        return edit

    def rotate(task: str) -> Edit:
        def edit(draft: Draft) -> None:
            found = draft.of_task(task)
            ids = [row["id"] for row in found]
            for row, sample in zip(found, ids[1:] + ids[:1], strict=True):
                row["id"] = sample
            draft.rows.sort(key=lambda row: (row["task"], row["id"]))

        return edit

    for i, j in ((0, 1), (5, 40), (60, 99), (61, 62)):
        yield Case(f"ids of {i} and {j} swapped", ("ids-swapped",), swap(i, j))
    for task in (ADVQA, NOISE):
        yield Case(f"ids of {task} rotated", ("ids-swapped",), rotate(task), where=task)
    for place in (0, 30, 59, 60, 99):
        yield Case(f"record {place} twice", ("row-duplicate",), rows(lambda r, p=place: [*r[: p + 1], *r[p:]]))  # type: ignore[misc]
        yield Case(f"record {place} left out", ("rows-missing",), rows(lambda r, p=place: [*r[:p], *r[p + 1 :]]))  # type: ignore[misc]
    yield Case("the wrong half left out", ("rows-missing",), rows(lambda r: r[::2]))
    yield Case("records backwards", ("row-order",), rows(lambda r: r[::-1]))
    yield Case("records twice over", ("row-order",), rows(lambda r: [*r, *r]))
    yield Case("severity left out", ("task-missing",), rows(lambda r: [row for row in r if row["task"] != NOISE]))
    yield Case("clean task left out", ("task-missing",), rows(lambda r: [row for row in r if row["task"] != ADVQA]))
    more = {"task": "zzz_task", "id": "x", "answer": "y", "confidence": {"joint": 0.5}}
    seen = {"pixels": "", "question": "", "prompt": ""}
    yield Case("foreign task", ("task-foreign",), rows(lambda r: [*r, more | seen]))
    yield Case("foreign sample more", ("rows-too-many",), rows(lambda r: [*r, r[-1] | {"id": "zzz"}]))
    for name in ("zzz", "../../x", "test-0", "0"):
        yield Case(f"foreign sample {name}", ("ids-foreign",), _sorted(_set("rows", -1, "id", to=name)))
    for place, task in ((0, ADVQA), (59, ADVQA), (60, NOISE), (99, NOISE)):
        for field_name, codes in (
            ("pixels", "pixels-differ"),
            ("question", "question-differs"),
            ("prompt", "twin-differs"),
        ):
            edit = _set("rows", place, field_name, to="0123abcd")
            yield Case(f"{field_name} of {place} edited", (codes,), edit, where=task)
    yield Case("pixels left out", ("pixels-differ",), _set("rows", 80, "pixels", to=""), where=NOISE)
    yield Case("question left out", ("question-differs",), _set("rows", 80, "question", to=""), where=NOISE)
    facts: tuple[tuple[str, Any], ...] = (
        ("n", 41), ("n", 39), ("world", "real"), ("variant", "gaussian_noise_1"), ("variant", "clean"),
        ("protocol", "choice"), ("dataset", "other"), ("dataset_revision", "blake2b:00"), ("split", "train"),
        ("part", "the easy half"), ("subset", "00"), ("shift_from", "block_advqa_clean"), ("noise", None),
        ("noise", {"name": "gaussian_noise", "severity": 1, "seed": 0, "version": 1, "mode": "scaled"}),
        ("noise", {"name": "gaussian_noise", "severity": 5, "seed": 1, "version": 1, "mode": "scaled"}),
        ("family", "block_advqa"),
    )  # fmt: skip
    for name, value in facts:
        edit = _set("manifest", "tasks", NOISE, name, to=value)
        yield Case(f"task's {name} {value!r:.40}", ("task-facts",), edit, where=f"{NOISE}.")
    yield Case("task left out of the manifest", ("task-foreign",), _drop("manifest", "tasks", NOISE))
    for board in ("nothing", "__init__", "block_", "tiny"):
        codes = ("board-unknown", "task-foreign", "task-missing", "field-form", "rows-missing")
        yield Case(f"board {board}", codes, _set("manifest", "board", to=board))


def _sorted(edit: Edit) -> Edit:
    def both(draft: Draft) -> None:
        edit(draft)
        draft.rows.sort(key=lambda row: (row["task"], row["id"]))

    return both


def _edited_hashes() -> Iterator[Case]:
    for file in (CARD, RECORDS):
        for name, value in (("sha256", "0" * 64), ("bytes", 1), ("bytes", 19_999_999)):
            edit = _unsigned(_set("manifest", "files", file, name, to=value))
            yield Case(f"{file}.{name} = {value!r:.8}", ("file-hash",), edit, where=file)
        yield Case(
            f"{file} upper case hash",
            ("field-form",),
            _unsigned(_set("manifest", "files", file, "sha256", to="A" * 64)),
        )
    yield Case("card hash edited", ("card-hash",), _forged("card_hash"), where="card_hash")
    yield Case("model hash edited", ("model-hash",), _forged("model_hash"), where="model_hash")
    for name, value in (("effective_bpw", 2.0), ("device", "cuda"), ("weights_hash", "0" * 32), ("spec_name", "x")):
        edit = _keeping_hashes(_set("card", name, to=value))
        yield Case(f"card's {name} edited, hash kept", ("card-hash", "model-hash"), edit)
    yield Case("answer edited, not signed", ("file-hash",), _unsigned_rows, where=RECORDS)


def _unsigned_rows(draft: Draft) -> None:
    draft.content()
    draft.sign = False
    draft.rows[0]["answer"] = "7"


def _forged(name: str) -> Edit:
    def edit(draft: Draft) -> None:
        draft.content()
        draft.card_hash = False
        draft.manifest[name] = "0" * 32

    return edit


def _keeping_hashes(change: Edit) -> Edit:
    def edit(draft: Draft) -> None:
        draft.content()
        draft.card_hash = False
        change(draft)

    return edit


def _cards(base: Draft) -> Iterator[Case]:
    def packed(draft: Draft) -> None:
        draft.card["execution"] = "packed"

    yield Case("packed with full-precision bytes", ("card-packed",), packed, where="execution")

    def unsaid(draft: Draft) -> None:
        draft.card["execution"] = "full-precision"

    yield Case("quantized called full precision", ("card-execution",), unsaid, where="execution")
    yield Case("method none with modules", ("card-execution",), _set("card", "method", to="none"))
    yield Case("no module", ("card-components", "card-execution"), _set("card", "modules", to=[]))
    yield Case("self-declared", ("card-declared",), _declared)
    yield Case("card of another version", ("card-version",), _set("card", "version", to=1))
    for name in ("effective_bpw", "nominal_bpw"):
        for value in (0.5, 4.0, -1.0, base.card[name] * 1.001):
            yield Case(f"{name} {value:.3f}", ("card-bits",), _set("card", name, to=value), where=name)
    module = ("card", "modules", 0)
    for name, value, codes in (
        ("bits", 2, ("card-bits",)), ("bits", 0, ("card-module",)), ("bits", 16, ("card-module",)),
        ("n_weights", 1, ("card-module",)), ("n_weights", -5, ("card-module",)), ("shape", [1, 1], ("card-module",)),
        ("packed_bytes", 10, ("card-bytes",)), ("packed_bytes", -10, ("card-bytes",)),
        ("packed_bytes", 10**9, ("card-bytes",)), ("group_size", 0, ("card-module",)),
        ("hash_after", "", ("card-module",)),
        ("n_bytes", 5, ("card-bytes",)), ("component", "nowhere", ("card-components",)),
        ("name", base.card["modules"][1]["name"], ("card-modules",)),
        ("name", next(iter(base.card["kept"])), ("card-modules",)),
    ):  # fmt: skip
        yield Case(f"module's {name} {value!r:.30}", codes, _set(*module, name, to=value), where=CARD)
    for name in ("n_parameters", "n_quantized", "n_bytes", "packed_bytes"):
        for value in (0, -1, 7, 10**12):
            edit = _set("card", "components", "language", name, to=value)
            yield Case(f"component's {name} {value}", ("card-components", "card-bytes", "card-bits"), edit, where=CARD)
    yield Case("component left out", ("card-components",), _drop("card", "components", "language"))
    for name in ("modules", "components", "libraries", "spec", "dtype", "effective_bpw"):
        for value in (7, "x", None, [1]):
            if not (name == "dtype" and value == "x") and not (name == "effective_bpw" and value == 7):
                yield Case(f"card's {name} = {value!r}", ("field-type",), _set("card", name, to=value), where=name)
    for name in ("pretrained", "architecture", "method", "weights_hash", "components"):
        yield Case(f"card without {name}", ("field-missing",), _drop("card", name), where=name)


def _declared(draft: Draft) -> None:
    draft.card["self_declared"] = True


def _twins(twin: Draft) -> Iterator[Case]:
    yield Case("no twin", ("twin-missing",), _set("manifest", "twin", to=""), where="twin")
    yield Case("twin not there", ("twin-missing",), _set("manifest", "twin", to="acme__other__bf16"), where="twin")
    own = "acme__block-idefics3__rtn-int4-g64"
    yield Case("its own twin", ("twin-missing",), _set("manifest", "twin", to=own), where="twin")
    for name, value in (
        ("dtype", "float32"),
        ("architecture", "Other"),
        ("device", "2 x cuda X"),
        ("image_processor", "B"),
    ):
        yield Case(f"other {name} than the twin", ("twin-differs",), _set("card", name, to=value))
    yield Case("another model than the twin", ("twin-differs",), _set("card", "pretrained", to="someone/other"))
    yield Case("another revision than the twin", ("twin-differs",), _set("card", "revision", to="abc"))
    for name in ("torch", "transformers", "lmms-eval"):
        yield Case(f"another {name} than the twin", ("twin-differs",), _set("card", "libraries", name, to="0.0.1"))
    for name, value in (("batch size", '"1"'), ("few-shot examples", "5"), ("model wrapper", '"vllm"')):
        edit = _set("manifest", "tasks", ADVQA, "settings", name, to=value)
        yield Case(f"another {name} than the twin", ("twin-differs",), edit, where=ADVQA)
    yield Case(
        "a setting more than the twin", ("twin-differs",), _set("manifest", "tasks", NOISE, "settings", "x", to="1")
    )

    def copied(draft: Draft) -> None:
        draft.rows = copy.deepcopy(twin.rows)

    yield Case("the twin's answers", ("records-copied",), copied)

    def nearly(draft: Draft) -> None:
        draft.rows = copy.deepcopy(twin.rows)
        draft.rows[0]["truncated"] = True

    yield Case("the twin's answers, other bytes", ("records-copied",), nearly)
    yield Case("other primary confidence", ("twin-differs",), _other_primary)


def _other_primary(draft: Draft) -> None:
    draft.manifest["tasks"][ADVQA]["primary_confidence"] = "geometric_mean"
    for row in draft.of_task(ADVQA):
        del row["confidence"]["joint"]
