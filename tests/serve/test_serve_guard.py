"""A service that trusts all callers on its machine refuses foreign web pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from worlds import CHAT, COMPLETIONS, MODEL, Play, World, check_error

from ptuning.errors import ConfigError
from serve.config import ServeConfig
from serve.http.auth import Keys, check_exposure
from serve.http.guard import find_foreign

PAGE = "http://localhost:3000"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "x-a"}


@pytest.mark.parametrize(
    "host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:8000"]
)
def test_the_services_own_names_are_let_in(host: str) -> None:
    assert find_foreign([host], [], ServeConfig()) is None
    assert find_foreign([host], [f"http://{host}"], ServeConfig()) is None


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        [""],
        ["evil.example"],
        ["evil.example:8000"],
        ["localhost"],
        ["localhost:80"],
        ["localhost:8001"],
        ["localhost:8000:8000"],
        ["localhost.evil.example:8000"],
        ["127.0.0.1.nip.io:8000"],
        ["::1:8000"],
        ["localhost:8000", "evil.example"],
        ["192.168.1.7:8000"],
    ],
)
def test_any_other_host_is_foreign(hosts: list[str]) -> None:
    found = find_foreign(hosts, [], ServeConfig())
    assert found == ("host", "localhost:8000, 127.0.0.1:8000 or [::1]:8000")


def test_the_configured_address_and_port_80_count_too() -> None:
    assert find_foreign(["127.0.0.2:8000"], [], ServeConfig(host="127.0.0.2")) is None
    assert find_foreign(["localhost"], [], ServeConfig(port=80)) is None
    assert find_foreign(["[::1]"], [], ServeConfig(port=80)) is None


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", PAGE, "http://localhost:8000.evil.example", ""]
)
def test_a_simple_post_of_a_foreign_page_is_known_by_its_origin(origin: str) -> None:
    assert find_foreign(["localhost:8000"], [origin], ServeConfig())
    allowed = ServeConfig(cors_origins=(PAGE,))
    assert (find_foreign(["localhost:8000"], [origin], allowed) is None) == (origin == PAGE)


@pytest.mark.parametrize(
    "path", [CHAT, COMPLETIONS, "/v1/models", "/healthz", "/readyz", "/metrics", "/nothing"]
)
def test_a_foreign_page_gets_a_403_from_every_route(play: Play, path: str) -> None:
    async def story(world: World) -> None:
        body = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
        for headers in (
            {"host": "evil.example", "origin": "http://evil.example"},
            {"origin": "http://evil.example"},
            {"host": "evil.example"},
        ):
            method = "POST" if path in (CHAT, COMPLETIONS) else "GET"
            response = await world.client.request(
                method,
                path,
                content=json.dumps(body).encode(),
                headers={**headers, "content-type": "text/plain"},
            )
            check_error(response, 403, "foreign_page", None)
        assert world.service.engine.metrics.snapshot({}, []).values == {}

    play(story)


def test_a_request_without_a_host_gets_a_403(play: Play) -> None:
    async def story(world: World) -> None:
        request = world.client.build_request("GET", "/v1/models")
        del request.headers["host"]
        check_error(await world.client.send(request), 403, "foreign_page", None)

    play(story)


def test_with_keys_any_host_is_accepted(play: Play, tmp_path: Path) -> None:
    async def story(world: World) -> None:
        headers = {"host": "llm.example.org", "authorization": "Bearer k"}
        response = await world.client.get("/v1/models", headers=headers)
        assert response.status_code == 200

    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"k": "*"}))
    play(story, keys=Keys.read(str(file)))


def test_a_page_of_an_origin_that_is_configured_may_ask(play: Play) -> None:
    async def preflight(world: World, origin: str) -> httpx.Response:
        headers = {"origin": origin, **PREFLIGHT}
        return await world.client.options(CHAT, headers=headers)

    async def story(world: World) -> None:
        answer = await preflight(world, PAGE)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "x-a" in answer.headers["access-control-allow-headers"]
        check_error(await preflight(world, "http://evil.example"), 403, "foreign_page", None)
        messages = [{"role": "user", "content": "hi"}]
        body: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": 1}
        for more, status in (({}, 200), ({"n": 2}, 400)):
            said = await world.client.post(CHAT, json={**body, **more}, headers={"origin": PAGE})
            assert said.status_code == status
            assert said.headers["access-control-allow-origin"] == PAGE
            assert "x-prefix-digest" in said.headers["access-control-expose-headers"]

    async def none(world: World) -> None:
        check_error(await preflight(world, PAGE), 403, "foreign_page", None)

    play(story, cors_origins=(PAGE,))
    play(none)


def test_every_page_may_not_ask_as_any_user() -> None:
    with pytest.raises(ConfigError, match="any web page"):
        check_exposure(ServeConfig(cors_origins=("*",)))
    check_exposure(ServeConfig(cors_origins=("*",), api_keys_file="keys.json"))
    check_exposure(ServeConfig(cors_origins=(PAGE,)))
