"""The command line. Each verb imports what it needs when it runs, so that --help is instant."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from ptuning.system import environment

DONE, FAILED, USAGE, SOME_FAILED = 0, 1, 2, 3

_STORE = click.option(
    "--store",
    default="./ptuning-store",
    show_default=True,
    help="Directory or object-store prefix with partitions, prefixes and runs.",
)
_SETTINGS = (
    _STORE,
    click.option("--model", help="Backbone: `smollm2`, a directory, a hub id or a .gguf file."),
    click.option("--config", "config_file", help="YAML file with configuration sections."),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="One configuration value, such as train.epochs=5; may be repeated.",
    ),
)


def _with_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_SETTINGS):
        function = option(function)
    return function


def _load(model: str | None, file: str | None, settings: Sequence[str]) -> Any:
    from pipelines.config import load_config

    more = [f"backbone.name={model}"] if model else []
    return load_config(file, [*settings, *more])


class _Keys(click.Command):
    """A command whose help ends with a list of all configuration keys."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        from pipelines.config import known_keys
        from ptuning.methods import DEFAULT
        from ptuning.methods.base import Tuning
        from ptuning.methods.catalogue import METHODS

        shared = {f"method.{name}" for name in Tuning.model_fields}
        by_method = {name: [*known_keys(method, "method.")] for name, method in METHODS.items()}
        types = "; ".join(
            str(method.model_fields["type"].description) for method in METHODS.values()
        )
        rows = [("method.type", f"tuning method: {types} [default: {DEFAULT}]")]
        rows += [
            _describe(key, field)
            for key, field in known_keys()
            if key in shared or not key.startswith("method.")
        ]
        with formatter.section("Configuration keys (--set, --config, PTUNING_SECTION__KEY)"):
            formatter.write_dl(rows)
        for name, keys in by_method.items():
            with formatter.section(f"Keys of method.type={name}"):
                formatter.write_dl(
                    [
                        _describe(key, field)
                        for key, field in keys
                        if key not in shared and key != "method.type"
                    ]
                )


def _describe(key: str, field: Any) -> tuple[str, str]:
    default = field.get_default(call_default_factory=True)
    shown = "none" if default is None else default
    return key, f"{field.description or ''} [default: {shown}]"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ptuning")
def verbs() -> None:
    """One frozen language model, one small trained prefix per user.

    \b
    Train and register a prefix for every user in a file, and promote those that help:
        ptuning run --data messages.parquet
    Ask as one of the users, here or over HTTP:
        ptuning generate --user alice "What should I cook tonight?"
        ptuning serve
    See past and current runs:
        ptuning status
    """


@verbs.command(cls=_Keys)
@click.option(
    "--data",
    "sources",
    multiple=True,
    required=True,
    metavar="PATH",
    help="Parquet, JSONL, JSON, CSV or TSV, compressed or not: a file, folder, glob or URI; "
    "may be repeated.",
)
@_with_settings
def run(
    sources: tuple[str, ...],
    store: str,
    model: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
) -> int:
    """Train, gate, register and promote one prefix per user.

    Rows have `user_id`, and `prompt` and `completion` (or `messages`); `timestamp`, `split` and
    `init_words` are optional. To resume a stopped run, repeat the command. Users whose rows and
    settings are unchanged are not trained again.

    \b
    Examples:
        ptuning run --data rows.jsonl
        ptuning run --data 'logs/*.parquet' --set data.max_rows=40 --set train.epochs=5
        ptuning run --data rows.csv --config run.yaml --store s3://bucket/ptuning

    Exit codes: 0 done, 1 failed, 2 usage, 3 done but some users failed.
    """
    config = _load(model, config_file, settings)
    from rich.console import Console

    from pipelines.opening import check_places
    from pipelines.report.progress import RunProgress
    from pipelines.report.summary import print_report
    from pipelines.run import execute
    from ptuning.store import Store

    check_places(store, sources)
    console = Console()
    with RunProgress(console) as progress:
        facts = execute(sources, Store(store), config, progress)
    print_report(console, facts)
    failed = any(report.status == "failed" for _, report in facts.users)
    return SOME_FAILED if failed else DONE


@verbs.command()
@click.option("--user", "user_id", required=True, help="The user's id, as in the data.")
@click.option(
    "--max-new-tokens",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Longest answer, in tokens.",
)
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0.0),
    help="0 takes the likeliest token; higher values vary more.",
)
@click.option("--seed", default=0, show_default=True, help="For sampling, if temperature > 0.")
@_with_settings
@click.argument("prompts", nargs=-1, required=True)
def generate(
    user_id: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    store: str,
    model: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    prompts: tuple[str, ...],
) -> int:
    """Answer prompts with a user's champion, without a service.

    \b
    Examples:
        ptuning generate --user alice "What should I cook tonight?"
        ptuning generate --user alice --temperature 0.8 --seed 1 "Hello" "Good morning"
    """
    config = _load(model, config_file, settings)
    from pipelines.answer import answer_prompts
    from ptuning.store import Store

    answers, served_by = answer_prompts(
        config, Store(store), user_id, list(prompts), max_new_tokens, temperature, seed
    )
    click.echo(served_by, err=True)
    for text in answers:
        click.echo(text)
    return DONE


@verbs.command(cls=_Keys)
@click.option("--host", help="Address to bind to; loopback by default.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on.")
@_with_settings
def serve(
    host: str | None,
    port: int | None,
    store: str,
    model: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
) -> int:
    """Serve every user from one OpenAI-style endpoint, in mixed batches.

    \b
    Example:
        ptuning serve --port 8000
        curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
          -d '{"model": "smollm2", "user": "alice",
               "messages": [{"role": "user", "content": "Hi"}]}'
    """
    more = [f"serve.host={host}"] if host else []
    more += [f"serve.port={port}"] if port is not None else []
    config = _load(model, config_file, [*settings, *more])
    from pipelines.service import serve_forever
    from ptuning.store import Store
    from ptuning.store_identity import read_identity

    read_identity(Store(store))  # a mistyped path must not serve everyone the base model
    serve_forever(config.serve, Store(store), config.backbone, config.data.template)
    return DONE


@verbs.command()
@_STORE
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, for programs.")
def status(store: str, as_json: bool) -> int:
    """List the store's runs with their progress and results.

    A run is finished, running, stopped (its driver is gone; the same `ptuning run` resumes it)
    or, if that cannot be determined from this host, unfinished.
    """
    from rich.console import Console

    from pipelines.report.status import print_status, run_states
    from ptuning.store import Store

    states = run_states(Store(store))
    if as_json:
        import json

        click.echo(json.dumps(states, indent=1))
    else:
        print_status(Console(), store, states)
    return DONE


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: prints an error as one readable line and exits with the right code."""
    environment.silence_libraries(terminal=sys.stderr.isatty())
    # If the registry is down, the command ends with that error; the log line would repeat it.
    logging.getLogger("ptuning.registry").setLevel(logging.ERROR)
    from ptuning.errors import ConfigError, PTuningError

    try:
        code = verbs.main(
            args=list(arguments) if arguments is not None else None, standalone_mode=False
        )
    except click.ClickException as error:
        error.show()
        code = USAGE
    except click.exceptions.Abort:
        click.echo("stopped; repeat the command to resume", err=True)
        code = FAILED
    except ConfigError as error:
        click.echo(f"ptuning: {error}", err=True)
        code = USAGE
    except ModuleNotFoundError as error:
        click.echo(
            f"ptuning: this verb needs {error.name}, which is not installed; "
            "to fix: pip install 'ptuning[cluster]'",
            err=True,
        )
        code = FAILED
    except PTuningError as error:
        click.echo(f"ptuning: {error}", err=True)
        code = FAILED
    sys.exit(code if isinstance(code, int) else DONE)
