"""The image registry's client against Debian's docker-registry: logins, tokens, and what goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from airloom.errors import AuthError, NotFoundError, ServiceError, UnavailableError
from airloom.hooks import registry as registry_module
from airloom.hooks.registry import HiddenError, Registry, find_image
from airloom.settings import Settings
from tests.fixtures.image_registry import USER, ImageRegistry, TokenIssuer, basic
from tests.fixtures.services import free_port

ABSENT = "sha256:" + "0" * 64


@pytest.fixture
def headers(login_settings: Settings) -> dict[str, str]:
    return basic(USER, login_settings.secret("registry_password"))


def test_digest_and_tags(login_registry: ImageRegistry, login_settings: Settings, headers: dict[str, str]) -> None:
    pushed = {tag: login_registry.push("airloom/one", tag, headers, tag.encode()) for tag in ("a" * 40, "1.0.0")}
    login_registry.push("airloom/two", "x", headers)
    client = Registry(login_settings, login_registry.host)
    for tag, digest in pushed.items():
        assert client.digest_of("airloom/one", tag) == digest
        assert client.digest_of("airloom/one", digest) == digest
    assert client.exists("airloom/one", "1.0.0")
    assert sorted(client.tags("airloom/one")) == sorted(pushed)
    assert client.repositories() == ["airloom/one", "airloom/two"]


def test_what_is_not_there(login_registry: ImageRegistry, login_settings: Settings, headers: dict[str, str]) -> None:
    client = Registry(login_settings, login_registry.host)
    assert client.digest_of("airloom/none", "x") is None
    assert client.tags("airloom/none") == []
    login_registry.push("airloom/one", "x", headers)
    assert client.digest_of("airloom/one", "y") is None
    assert client.digest_of("airloom/one", ABSENT) is None
    assert not client.exists("airloom/one", "y")


def test_a_long_list_comes_whole(
    login_registry: ImageRegistry, login_settings: Settings, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "_PAGE", 2)
    names = [f"many/repo{number}" for number in range(5)]
    for name in names:
        login_registry.push(name, "x", headers)
    assert Registry(login_settings, login_registry.host).repositories() == names


def test_a_wrong_password_is_named(login_registry: ImageRegistry, settings: Settings) -> None:
    (settings.secrets_dir / "registry_password").write_text("wrong-one")
    client = Registry(settings.model_copy(update={"registry_user": USER}), login_registry.host)
    with pytest.raises(AuthError, match=f"{login_registry.host} refuses the user 'airloom'") as caught:
        client.digest_of("airloom/one", "x")
    assert "registry_password" in str(caught.value.hint)
    assert settings.secret("registry_password") not in str(caught.value)
    with pytest.raises(AuthError, match="wants a login"):
        Registry(settings, login_registry.host).tags("airloom/one")


def test_a_registry_that_is_down(
    login_registry: ImageRegistry, login_settings: Settings, headers: dict[str, str]
) -> None:
    digest = login_registry.push("airloom/one", "x", headers)
    client = Registry(login_settings, login_registry.host)
    login_registry.kill()
    with pytest.raises(UnavailableError, match=f"{login_registry.host} does not answer"):
        client.digest_of("airloom/one", "x")
    login_registry.start()
    assert client.digest_of("airloom/one", "x") == digest


def test_it_is_waited_for_a_moment(
    login_registry: ImageRegistry, login_settings: Settings, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry that restarts is asked again."""
    digest = login_registry.push("airloom/one", "x", headers)
    login_registry.kill()
    client = Registry(login_settings, login_registry.host)
    send, asked = client._send, []

    def sending(*args: object, **options: object) -> object:
        asked.append(args)
        if len(asked) == 2:
            login_registry.start()
        return send(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "_send", sending)
    assert client.digest_of("airloom/one", "x") == digest


def test_tokens_as_docker_hub_has_them(
    token_registry: ImageRegistry, token_issuer: TokenIssuer, login_settings: Settings
) -> None:
    scope = "repository:team/model:pull,push"
    token = {"Authorization": f"Bearer {token_issuer.token(scope, ['pull', 'push'])}"}
    digest = token_registry.push("team/model", "x", token)
    token_issuer.asked.clear()
    client = Registry(login_settings, token_registry.host)
    assert client.digest_of("team/model", "x") == digest
    assert client.digest_of("team/model", "y") is None
    assert client.tags("team/model") == ["x"]
    login = basic(USER, login_settings.secret("registry_password"))["Authorization"]
    # One token does for all three: an issuer counts too.
    assert token_issuer.asked == [("repository:team/model:pull", login)]


def test_tokens_without_a_login(token_registry: ImageRegistry, token_issuer: TokenIssuer, settings: Settings) -> None:
    scope = "repository:public/base:pull,push"
    token = {"Authorization": f"Bearer {token_issuer.token(scope, ['pull', 'push'])}"}
    digest = token_registry.push("public/base", "x", token)
    client = Registry(settings, token_registry.host)
    assert client.digest_of("public/base", "x") == digest
    with pytest.raises(AuthError, match="wants a login"):
        client.digest_of("team/private", "x")
    (settings.secrets_dir / "registry_password").write_text("wrong-one")
    wrong = Registry(settings.model_copy(update={"registry_user": USER}), token_registry.host)
    with pytest.raises(AuthError, match="refuses the user"):
        wrong.digest_of("public/base", "x")
    # A token that ends meanwhile is renewed.
    before = len(token_issuer.asked)
    client._tokens = {name: ("ended", float("inf")) for name in client._tokens}
    assert client.digest_of("public/base", "x") == digest
    assert len(token_issuer.asked) == before + 1


def test_a_private_authority(tls_registry: tuple[ImageRegistry, str], login_settings: Settings) -> None:
    registry, bundle = tls_registry
    address = f"https://{registry.host}"
    with pytest.raises(ServiceError, match="is not trusted") as caught:
        Registry(login_settings, address).tags("airloom/one")
    assert "AIRLOOM_CA_BUNDLE" in str(caught.value.hint)
    trusting = login_settings.model_copy(update={"ca_bundle": bundle})
    assert Registry(trusting, address).tags("airloom/one") == []
    assert Registry(trusting, address).digest_of("airloom/one", "x") is None


@pytest.fixture
def answering() -> Iterator[tuple[str, list[tuple[int, dict[str, str], bytes]], list[str]]]:
    """A server's host, the answers that it gives one after the other (the last for ever), and what it was asked."""
    answers: list[tuple[int, dict[str, str], bytes]] = []
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", answers, asked
    server.shutdown()
    server.server_close()


def test_a_rate_limit_says_when_and_what_to_do(
    answering: tuple[str, list[tuple[int, dict[str, str], bytes]], list[str]], settings: Settings
) -> None:
    host, answers, asked = answering
    answers.append((429, {"Retry-After": "120"}, b'{"errors":[{"code":"TOOMANYREQUESTS"}]}'))
    with pytest.raises(UnavailableError, match="too many requests") as caught:
        Registry(settings, host).digest_of("library/redis", "7")
    assert "after 120 s" in str(caught.value.hint)
    assert "log in" in str(caught.value.hint)
    assert len(asked) == 1  # asking at once again would count too
    named = Registry(settings.model_copy(update={"registry_user": USER}), host)
    with pytest.raises(UnavailableError, match="too many requests of airloom") as caught:
        named.tags("library/redis")
    assert "log in" not in str(caught.value.hint)


def test_a_failing_registry_is_asked_again(
    answering: tuple[str, list[tuple[int, dict[str, str], bytes]], list[str]], settings: Settings
) -> None:
    host, answers, asked = answering
    found = (200, {"Docker-Content-Digest": ABSENT}, b"")
    answers += [(503, {}, b""), (502, {}, b""), found]
    assert Registry(settings, host).digest_of("a/b", "x") == ABSENT
    assert asked == ["HEAD /v2/a/b/manifests/x"] * 3


def test_a_digest_is_counted_where_the_registry_is_silent(
    answering: tuple[str, list[tuple[int, dict[str, str], bytes]], list[str]], settings: Settings
) -> None:
    host, answers, _ = answering
    answers += [(200, {}, b""), (200, {}, b"{}")]
    digest = Registry(settings, host).digest_of("a/b", "x")
    assert digest == "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ((200, {"Docker-Content-Digest": "md5:1"}, b""), ServiceError, "md5:1"),
        ((400, {}, b""), ServiceError, "answered 400"),
        ((401, {"WWW-Authenticate": 'Negotiate x="y"'}, b""), AuthError, "wants a login"),
        ((401, {"WWW-Authenticate": 'Bearer realm="https://127.0.0.1:9/t"'}, b""), UnavailableError, "does not answer"),
        ((403, {}, b""), AuthError, "wants a login"),
    ],
)
def test_answers_that_are_no_use(
    answering: tuple[str, list[tuple[int, dict[str, str], bytes]], list[str]],
    settings: Settings,
    answer: tuple[int, dict[str, str], bytes],
    error: type[Exception],
    words: str,
) -> None:
    host, answers, _ = answering
    answers.append(answer)
    with pytest.raises(error, match=words):
        Registry(settings, host).digest_of("a/b", "x")


def test_a_list_that_is_none(
    answering: tuple[str, list[tuple[int, dict[str, str], bytes]], list[str]], settings: Settings
) -> None:
    host, answers, _ = answering
    for body in (b"<html>", b'{"name": "a/b"}', b"[]"):
        answers[:] = [(200, {}, body)]
        with pytest.raises(ServiceError, match="lists the tags of a/b as"):
            Registry(settings, host).tags("a/b")
    answers[:] = [(200, {"Link": '<http://elsewhere.test/v2/>; rel="next"'}, b'{"tags": null}')]
    with pytest.raises(ServiceError, match="another host"):
        Registry(settings, host).tags("a/b")
    answers[:] = [(404, {}, b"")]
    with pytest.raises(NotFoundError):
        Registry(settings, host).repositories()


@pytest.mark.parametrize(
    ("host", "address", "path"),
    [
        ("docker.io", "https://registry-1.docker.io", "library/redis"),
        ("", "https://registry-1.docker.io", "library/redis"),
        ("localhost:5050", "http://localhost:5050", "redis"),
        ("127.0.0.1:5050", "http://127.0.0.1:5050", "redis"),
        ("[::1]:5050", "http://[::1]:5050", "redis"),
        ("[fd00::1]:5050", "https://[fd00::1]:5050", "redis"),
        ("registry:5000", "http://registry:5000", "redis"),
        ("registry.example.org", "https://registry.example.org", "redis"),
        ("http://registry.example.org:5000/", "http://registry.example.org:5000", "redis"),
    ],
)
def test_addresses(host: str, address: str, path: str, settings: Settings) -> None:
    client = Registry(settings, host)
    assert (client._base_url, client._name("redis")) == (address, path)


def test_nobody_listens(settings: Settings) -> None:
    with pytest.raises(UnavailableError, match="does not answer"):
        Registry(settings, f"localhost:{free_port()}").tags("a/b")


def test_the_installations_registry_is_asked_by_its_own_address(
    login_registry: ImageRegistry, login_settings: Settings, headers: dict[str, str]
) -> None:
    """The engine's name for it leads nowhere from here, as 127.0.0.1 does in a container."""
    digest = login_registry.push("airloom/one", "x", headers)
    settings = login_settings.model_copy(update={"registry": "engine.test:5050", "registry_url": login_registry.host})
    assert find_image(settings, "engine.test:5050/airloom/one", "x") == digest
    assert find_image(settings, "engine.test:5050/airloom/one", digest) == digest
    assert find_image(settings, "engine.test:5050/airloom/one", "y") is None
    assert find_image(settings, "other.test/airloom/one", "x") is None, "an image of another registry"
    assert find_image(settings.model_copy(update={"registry": ""}), "airloom/one", "x") is None
    elsewhere = settings.model_copy(update={"registry_url": f"localhost:{free_port()}"})
    with pytest.raises(UnavailableError, match="does not answer") as caught:
        find_image(elsewhere, "engine.test:5050/airloom/one", "x")
    assert "AIRLOOM_REGISTRY_URL" in str(caught.value.hint)


def test_what_is_hidden_from_a_user_is_as_good_as_not_there(
    token_registry: ImageRegistry, token_issuer: TokenIssuer, login_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Docker Hub answers a user for a repository that does not exist yet; a wrong password is another matter."""
    settings = login_settings.model_copy(update={"registry": token_registry.host})
    name = f"{token_registry.host}/private/new"
    assert find_image(settings, name, "x") is None  # this user may read it, and it is not there
    monkeypatch.setattr(token_issuer, "_answer", lambda path, login: (200, {"token": token_issuer.token("a:b:c", [])}))
    with pytest.raises(HiddenError):
        Registry(settings, token_registry.host).digest_of("private/new", "x")
    assert find_image(settings, name, "x") is None
    monkeypatch.setattr(token_issuer, "_answer", lambda path, login: (401, {"details": "incorrect password"}))
    with pytest.raises(AuthError, match="refuses the user"):
        find_image(settings, name, "x")
    with pytest.raises(AuthError, match="wants a login"):
        find_image(settings.model_copy(update={"registry_user": ""}), name, "x")
