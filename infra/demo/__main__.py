"""`make demo`: the whole product on characters of Shakespeare, from their speeches to answers.

Runs partition, training, registration and promotion with default settings. Then starts the service,
asks the base model and three users the same two questions in one batch, and shows losses and
answers. Run a second time, it finds nothing to train.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from infra.demo.picture import Answer, LossRow, draw
from infra.demo.shakespeare import build_rows, fetch_sdist
from ptuning.errors import PTuningError, ServeError
from ptuning.system.ports import free_port

OUT = Path("demo-out")
STORE = OUT / "store"
USERS, ROWS = 6, 40
QUESTIONS = (
    "What think you of love?",
    "The enemy is at the gate. What shall we do?",
)
MAX_TOKENS = 48


def main() -> int:
    console, begun = Console(), time.monotonic()
    OUT.mkdir(exist_ok=True)
    data = _write_rows(console)
    run_id = _tune(console, data)
    rows = _read_losses(run_id)
    _print_losses(console, rows)
    best = sorted(rows, key=lambda row: row.own - row.base)
    asked = [row.user for row in best if row.user in _read_promoted()][:3]
    with _start_service(console) as address:
        answers = _ask(address, asked)
    _print_answers(console, answers)
    picture = draw(rows, answers, OUT / "demo.png")
    console.print(f"\npicture: {picture}")
    console.print(f"full report: {STORE / 'runs' / run_id / 'report.html'}")
    console.print(f"done in {time.monotonic() - begun:.0f} s")
    return 0


def _write_rows(console: Console) -> Path:
    console.rule("1. The users: characters of Shakespeare and their speeches")
    rows = build_rows(fetch_sdist(Path(".cache")), users=USERS, rows=ROWS)
    path = OUT / "rows.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    names = sorted({row["user_id"] for row in rows})
    console.print(f"{len(rows)} speeches of {', '.join(names)} in {path}")
    example = next(row for row in rows if row["user_id"] == names[0])
    console.print(f"one row: {json.dumps(example, ensure_ascii=False)[:300]}", markup=False)
    return path


def _tune(console: Console, data: Path) -> str:
    console.rule("2. ptuning run: partition, train, gate, register, promote")
    console.print(f"ptuning run --data {data} --store {STORE}")
    command = [sys.executable, "-m", "pipelines", "run", "--data", str(data), "--store", str(STORE)]
    if subprocess.run(command, check=False).returncode != 0:
        raise PTuningError("the run failed", fix="see its messages above")
    newest = max((STORE / "runs").glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    run_id = newest.parent.name
    summary = json.loads((STORE / "runs" / run_id / "summary.json").read_text())
    if summary["users"]["trained"] == 0:
        console.print("\n[bold]Nothing changed since the last demo, so nothing was trained.[/bold]")
    return run_id


def _read_losses(run_id: str) -> list[LossRow]:
    """Each user's losses, from the newest run that trained the user."""
    found: dict[str, LossRow] = {}
    for path in sorted((STORE / "runs").glob("*/users/*.parquet"), reverse=True):
        for row in pq.read_table(path).to_pylist():
            if row["status"] == "trained" and row["user_id"] not in found:
                found[row["user_id"]] = LossRow(
                    user=row["user_id"],
                    base=row["nll_base_valid"],
                    own=row["nll_candidate_valid"],
                    other=row["nll_other_valid"],
                )
    return [found[user] for user in sorted(found)]


def _read_promoted() -> set[str]:
    """The users who were promoted in any run of this store."""
    return {
        row["user_id"]
        for path in (STORE / "runs").glob("*/users/*.parquet")
        for row in pq.read_table(path).to_pylist()
        if row["decision"] == "promoted"
    }


def _print_losses(console: Console, rows: list[LossRow]) -> None:
    console.rule("3. What was gained: loss on speeches that were not trained on")
    table = Table(caption="nats per token; lower is better")
    for column in ("user", "base model", "another user's prefix", "own prefix", "gain"):
        table.add_column(column, justify="left" if column == "user" else "right")
    for row in rows:
        other = "" if row.other is None else f"{row.other:.3f}"
        table.add_row(
            row.user, f"{row.base:.3f}", other, f"{row.own:.3f}", f"{row.base - row.own:+.3f}"
        )
    console.print(table)


@contextmanager
def _start_service(console: Console) -> Iterator[str]:
    """The address of `ptuning serve`, started in a separate process and stopped at the end."""
    console.rule("4. One endpoint for all users")
    port = free_port()
    command = [sys.executable, "-m", "pipelines", "serve", "--store", str(STORE)]
    log = OUT / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        address = f"http://127.0.0.1:{port}"
        console.print(f"ptuning serve --store {STORE} --port {port} (its log: {log})")
        _wait_healthy(process, address, log)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_healthy(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServeError("the service ended", seen=log.read_text()[-500:])
        try:
            if httpx.get(f"{address}/readyz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(0.5)
    raise ServeError("the service did not become healthy in 180 s", seen=log.read_text()[-500:])


def _make_body(question: str, user: str | None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0.7,
        "seed": 1,  # the same seed gives the same answers
    }
    return body | ({"user": user} if user else {})


def _ask(address: str, users: list[str]) -> list[Answer]:
    """Ask the base model and every user all questions at the same time: one mixed batch."""
    jobs = [(question, user) for question in QUESTIONS for user in (None, *users)]

    def ask_one(job: tuple[str, str | None]) -> Answer:
        question, user = job
        reply = httpx.post(
            f"{address}/v1/chat/completions", json=_make_body(question, user), timeout=120
        )
        reply.raise_for_status()
        answer = reply.json()
        if user is not None and answer["prefix"] is None:
            raise ServeError("a promoted user was answered by the base model", seen=user)
        text = answer["choices"][0]["message"]["content"]
        return Answer(question=question, who=user or "base", text=text)

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(ask_one, jobs))


def _print_answers(console: Console, answers: list[Answer]) -> None:
    for question in QUESTIONS:
        table = Table(title=question, title_justify="left", show_lines=True)
        table.add_column("answered by")
        table.add_column("answer")
        for answer in answers:
            if answer.question == question:
                table.add_row(answer.who, answer.text.strip())
        console.print(table)
    console.print(f"\nto ask with curl, first run: .venv/bin/ptuning serve --store {STORE}")
    for user in dict.fromkeys(answer.who for answer in answers):
        body = json.dumps(_make_body(QUESTIONS[0], None if user == "base" else user))
        print(
            "curl -s http://127.0.0.1:8000/v1/chat/completions "
            f"-H 'content-type: application/json' -d '{body}'"
        )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PTuningError as error:
        sys.exit(f"demo: {error}")
