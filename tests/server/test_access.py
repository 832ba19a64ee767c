"""Who is let in: keys, addresses, and what a server is told."""

from __future__ import annotations

import openai
import pytest

from ecmfq_export.errors import UserError
from ecmfq_export.server.settings import Limits, Settings, listen, read_keys
from tests.server.conftest import running
from tests.server.raw_http import body, post


@pytest.fixture(scope="module")
def locked(generator):
    with running(generator, keys=("first-key", "second-key")) as server:
        yield server


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "Bearer first-ke", "Bearer first-keyy", "Bearer FIRST-KEY",
                                           "Basic first-key", "first-key", "Bearer first-key second-key", "Bearer \xff"])  # fmt: skip
@pytest.mark.parametrize(("path", "method"), [("/v1/chat/completions", "POST"), ("/v1/models", "GET"), ("/v1/models/tiny", "GET"),
                                              ("/metrics", "GET")])  # fmt: skip
def test_without_the_key_nothing_is_answered(locked, authorization, path, method):
    headers = {} if authorization is None else {"Authorization": authorization}
    status, found, answer = post(locked.url, body() if method == "POST" else None, headers, path, method)
    assert status == 401 and found["www-authenticate"] == "Bearer"
    assert answer["error"]["code"] == "invalid_api_key" and "first" not in answer["error"]["message"]


def test_each_key_opens(locked):
    for key in ("first-key", "second-key"):
        with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0) as client:
            assert client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=2).choices
    # With a key the server may be reached under any name, a proxy's say.
    assert post(locked.url, body(), {"Authorization": "bearer second-key", "Host": "models.example"})[0] == 200


def test_health_is_open(locked):
    assert post(locked.url, None, path="/health", method="GET")[0] == 200


def test_the_key_is_asked_for_before_the_body_is_kept(locked):
    status, _, _ = post(locked.url, b"x" * 2_000_000)
    assert status == 401 and locked.chat.worker.occupied == 0


def test_keys_are_read_from_a_file_or_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\n\n  two \n")
    assert read_keys(file, {}) == ("one", "two")
    assert read_keys(None, {"ECMFQ_API_KEY": "three"}) == ("three",)
    assert read_keys(None, {}) == ()
    with pytest.raises(UserError, match="both"):
        read_keys(file, {"ECMFQ_API_KEY": "three"})
    for text in ("", "\n", "a b", "schlüssel"):
        file.write_text(text)
        with pytest.raises(UserError, match="API key"):
            read_keys(file, {})
    with pytest.raises(UserError, match="holds no API key"):
        read_keys(None, {"ECMFQ_API_KEY": ""})
    with pytest.raises(UserError, match="can be read from"):
        read_keys(tmp_path / "none", {})


def test_keys_are_not_shown():
    assert "hidden" not in repr(Settings("m", keys=("hidden",)))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_need_a_key(host):
    with pytest.raises(UserError, match="can be reached from other machines"):
        listen(Settings("m", host=host, port=0))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_this_machine_needs_none(host):
    with listen(Settings("m", host=host, port=0)) as sock:
        assert sock.getsockname()[1] > 0


def test_an_address_that_cannot_be_had():
    with listen(Settings("m", port=0)) as sock:
        sock.listen()
        with pytest.raises(UserError, match="cannot listen"):
            listen(Settings("m", port=sock.getsockname()[1]))
    with pytest.raises(UserError, match="no address of this machine"):
        listen(Settings("m", host="no.such.host.invalid"))


@pytest.mark.parametrize("values", [{"queue": -1}, {"max_request_bytes": 0}, {"max_image_pixels": 10**9}, {"body_seconds": float("nan")}])
def test_limits_are_checked(values):
    with pytest.raises(UserError, match="out of range"):
        Limits(**values)


@pytest.mark.parametrize("values", [{"model_name": ""}, {"model_name": "a b"}, {"port": 70000}, {"grace": -1.0}])
def test_settings_are_checked(values):
    with pytest.raises(UserError, match="empty or holds spaces|out of range"):
        Settings(**{"model_name": "m", **values})
