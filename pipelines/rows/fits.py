"""Measure the rows of a chunk by a tokenizer: how many supervised tokens each has, and whether it
fits into `data.max_length`.

The results lie beside the chunk's shards, under the name of the rules, so that another tokenizer or
length measures again without reading the inputs again:

    fit-<rules>-<n>.parquet    `supervised` of each row of shard n, in its order; 0: does not fit
    unfit-<rules>.parquet      the rows that do not fit, with reasons (BAD_SCHEMA), if there are any
    fit-<rules>.json           written last: how many do not fit
"""

from __future__ import annotations

import hashlib

import pyarrow as pa

from pipelines.rows.shards import (
    BAD_SCHEMA,
    GROUP_ROWS,
    Shards,
    clean,
    examples_of,
    open_parquet,
    without_collection,
    write_parquet,
)
from ptuning.data.encode import Template
from ptuning.data.examples import Fit
from ptuning.store import Store

FORMAT = 1


def fit_name(template_digest: str, max_length: int) -> str:
    """The name of the rules by which rows are measured."""
    text = f"{FORMAT} {template_digest} {max_length}"
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


def measure(store: Store, made: Shards, template: Template, max_length: int) -> int:
    """Measure a chunk's rows, unless that has been done; returns how many do not fit."""
    fit = fit_name(template.digest, max_length)
    record = f"{made.name}/fit-{fit}.json"
    if store.exists(record):
        return int(store.read_json(record)["unfit"])
    with without_collection():
        return _measure(store, made, fit, Fit(template, max_length))


def _measure(store: Store, made: Shards, fit: str, rules: Fit) -> int:
    unfit: list[pa.Table] = []
    for number in range(made.shards):
        rows = open_parquet(store, f"{made.name}/shard-{number}.parquet").read()
        examples = examples_of(rows)
        supervised = rules.supervised(examples)
        reasons = [
            rules.reason(example, tokens)
            for example, tokens in zip(examples, supervised, strict=True)
        ]
        fitting = [
            tokens if reason is None else 0
            for tokens, reason in zip(supervised, reasons, strict=True)
        ]
        table = pa.table({"supervised": pa.array(fitting, pa.int32())})
        write_parquet(
            store, f"{made.name}/fit-{fit}-{number}.parquet", table, row_group_size=GROUP_ROWS
        )
        if any(reasons):
            unfit.append(_unfit(rows, reasons))
    bad = pa.concat_tables([BAD_SCHEMA.empty_table(), *unfit])
    if bad.num_rows:
        write_parquet(store, f"{made.name}/unfit-{fit}.parquet", bad)
    store.write_json(f"{made.name}/fit-{fit}.json", {"unfit": bad.num_rows})
    return bad.num_rows


def _unfit(rows: pa.Table, reasons: list[str | None]) -> pa.Table:
    at = [position for position, reason in enumerate(reasons) if reason is not None]
    found = rows.select(["number", "user_id", "user_key"]).take(pa.array(at, pa.int64()))
    texts = pa.array([clean(reason) for reason in reasons if reason is not None], pa.string())
    return found.append_column("reason", texts).select(BAD_SCHEMA.names)


def read_bad(store: Store, made: Shards, fit: str, unfit: int) -> pa.Table:
    """The quarantined rows of a chunk, by number (BAD_SCHEMA): refused on reading, or unfit."""
    tables = [BAD_SCHEMA.empty_table()]
    if made.bad:
        tables.append(open_parquet(store, f"{made.name}/bad.parquet").read())
    if unfit:
        tables.append(open_parquet(store, f"{made.name}/unfit-{fit}.parquet").read())
    return pa.concat_tables(tables).sort_by("number")
