"""Under which names a page is asked, and whose scripts may send to it, as plain functions."""

from __future__ import annotations

import pytest

from qformer.demo.hosts import Address, Hosts, is_loopback, parse_host, parse_origin
from qformer.types import UsageError

OURS = Hosts(["demo.example.org", "192.0.2.7"])


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("localhost", ("localhost", None)),
        ("LocalHost.:7860", ("localhost", 7860)),
        ("localhost:", ("localhost", None)),
        ("127.0.0.1:7860", ("127.0.0.1", 7860)),
        ("[::1]:7860", ("::1", 7860)),
        ("[0:0:0:0:0:0:0:1]", ("::1", None)),
        ("[::ffff:127.0.0.1]", ("127.0.0.1", None)),
        ("gpu_7.lab", ("gpu_7.lab", None)),
        ("xn--mller-kva.example", ("xn--mller-kva.example", None)),
    ],
)
def test_hosts_are_read_in_one_spelling(text: str, address: tuple[str, int | None]) -> None:
    assert parse_host(text) == Address(*address)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":7860",
        ".",
        "localhost..",
        "user@localhost",
        "localhost@evil.example",
        "localhost/path",
        "localhost#evil.example",
        "localhost evil.example",
        "localhost,evil.example",
        "localhost:7860:7860",
        "localhost:70000",
        "localhost:-1",
        "localhost:\u0663",
        "m\xfcller.example",
        "::1",
        "[::1",
        "[::1]x",
        "[::1].",
        "[127.0.0.1]",
        "[fe80::1%25eth0]",
        "http://localhost",
    ],
)
def test_what_is_no_host(text: str) -> None:
    assert parse_host(text) is None


def test_origins_have_the_port_of_their_scheme() -> None:
    assert parse_origin("HTTP://LocalHost") == ("http", Address("localhost", 80))
    assert parse_origin("https://demo.example.org") == ("https", Address("demo.example.org", 443))
    assert parse_origin("http://[::1]:7860") == ("http", Address("::1", 7860))
    for text in ("null", "", "localhost", "file://", "chrome-extension://abc", "http://", "http://a/", "http://u@a"):
        assert parse_origin(text) is None


def test_names_of_this_machine() -> None:
    assert all(map(is_loopback, ("localhost", "demo.localhost", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(map(is_loopback, ("localhost.example", "notlocalhost", "128.0.0.1", "0.0.0.0", "127.0.0.1.example")))


def refusal(*headers: tuple[str, str], method: str = "POST", path: str = "/gradio_api/upload") -> str | None:
    raw = [(key.lower().encode(), value.encode("latin-1")) for key, value in headers]
    return OURS.refusal(method, path, raw)


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("localhost:7860", None),
        ("demo.localhost:7860", None),
        ("127.3.2.1:7860", None),
        ("[::1]:7860", None),
        ("10.0.0.5:7860", None),  # an address, which no DNS can point here
        ("[2001:db8::5]:7860", None),
        ("DEMO.example.org.", None),
        ("demo.example.org:8443", None),
        ("evil.example:7860", "not served under the name 'evil.example'"),
        ("x.demo.example.org", "not served under the name"),
        ("demo.example.org.evil.example", "not served under the name"),
        ("localhost.evil.example", "not served under the name"),
        ("127.0.0.1.evil.example", "not served under the name"),
        ("localhost@evil.example", "not the name of a host"),
        ("2130706433", "not served under the name"),  # a browser would have written 127.0.0.1
        ("", "not the name of a host"),
    ],
)
def test_names_that_are_ours(host: str, said: str | None) -> None:
    told = refusal(("Host", host))
    assert told is None if said is None else said in str(told)
    told = refusal(("Host", "localhost:7860"), ("X-Forwarded-Host", host or "@"))
    assert told is None if said is None else "not" in str(told)


def test_a_request_names_one_host() -> None:
    assert "must name one host" in str(refusal())
    assert "must name one host" in str(refusal(("Host", "localhost"), ("Host", "localhost")))
    assert "not served" in str(refusal(("Host", "localhost"), ("Host", "evil.example")))
    # what a proxy says never excuses a foreign name: after a rebinding a site's script can say it, too
    assert "not served" in str(refusal(("Host", "evil.example"), ("X-Forwarded-Host", "localhost")))
    assert refusal(("Host", "localhost"), ("X-Forwarded-Host", "demo.example.org, inner")) is None


@pytest.mark.parametrize(
    ("host", "forwarded", "origin", "ours"),
    [
        ("localhost:7860", "", "http://localhost:7860", True),
        ("127.0.0.1:7860", "", "http://127.0.0.1:7881", True),  # a proxy on this machine that sends its own Host
        ("127.0.0.1:7860", "", "http://localhost:7860", True),
        ("10.0.0.5:7860", "", "http://10.0.0.5:7860", True),
        ("10.0.0.5:7860", "", "http://10.0.0.5:9999", False),
        ("10.0.0.5", "", "http://10.0.0.5", True),
        ("10.0.0.5", "", "https://10.0.0.5", True),  # a proxy ends TLS
        ("10.0.0.5", "", "http://10.0.0.5:3000", False),
        ("10.0.0.5:7860", "", "http://localhost:7860", False),
        ("127.0.0.1:7860", "10.0.0.5", "http://10.0.0.5", True),
        ("127.0.0.1:7860", "10.0.0.5", "http://localhost:3000", False),
        ("127.0.0.1:7860", "", "http://203.0.113.9", False),  # addresses are ours to be asked under, not to ask from
        ("127.0.0.1:7860", "", "http://192.0.2.7", True),
        ("127.0.0.1:7860", "", "https://demo.example.org:8443", True),
        ("127.0.0.1:7860", "demo.example.org", "https://demo.example.org", True),
        ("demo.example.org", "", "https://DEMO.example.org", True),
        ("demo.example.org", "", "https://evil.example", False),
        ("demo.example.org", "", "https://demo.example.org.evil.example", False),
        ("demo.example.org", "", "https://demo.example.org@evil.example", False),
        ("localhost:7860", "", "http://localhost.evil.example:7860", False),
        ("localhost:7860", "", "null", False),
        ("localhost:7860", "", "", False),
        ("localhost:7860", "", "chrome-extension://abcdef", False),
    ],
)
def test_sites_that_are_ours(host: str, forwarded: str, origin: str, ours: bool) -> None:
    headers = (("Host", host), ("X-Forwarded-Host", forwarded), ("Origin", origin))
    for method, path in (("POST", "/gradio_api/upload"), ("GET", "/config")):  # nor is anything read
        told = refusal(*headers, method=method, path=path)
        assert told is None if ours else "pages of other sites" in str(told)


def test_a_link_opens_the_page_and_nothing_else() -> None:
    headers = (("Host", "localhost:7860"), ("Sec-Fetch-Site", "cross-site"))
    assert refusal(*headers, method="GET", path="/") is None
    assert "other sites" in str(refusal(*headers, method="GET", path="/logout"))
    assert "other sites" in str(refusal(*headers, method="POST", path="/"))
    assert refusal(("Host", "localhost:7860"), ("Sec-Fetch-Site", "same-origin")) is None
    twice = (("Origin", "http://localhost:7860"), ("Origin", "http://evil.example"))
    assert refusal(("Host", "localhost:7860"), *twice) is not None


@pytest.mark.parametrize(
    ("root_path", "path", "within"),
    [
        ("", "/config", "/config"),
        ("/demo", "/demo/config", "/config"),  # a proxy that leaves the path as it is
        ("/demo/", "/config", "/config"),  # and one that strips it
        ("/demo", "/demo", ""),
        ("/demo", "/demo/", "/"),
        ("/demo", "/demonstration", "/demonstration"),
        ("https://demo.example.org/a/b/", "/a/b/config", "/config"),
        ("https://demo.example.org", "/config", "/config"),
        ("/", "/config", "/config"),
    ],
)
def test_root_paths(root_path: str, path: str, within: str) -> None:
    hosts = Hosts(root_path=root_path)
    assert hosts.path(path) == within
    scope = {"path": path, "headers": [(b"x-gradio-server", b"http://evil.example")]}
    seen = hosts.rewritten(scope, within)
    assert (seen["path"], seen["root_path"], seen["headers"]) == (hosts.prefix + within, hosts.prefix, [])
    assert hosts.is_own("demo.example.org") == ("demo.example.org" in root_path)


def test_gradio_is_told_the_address_that_the_browser_shows() -> None:
    headers = [(b"host", b"127.0.0.1:7860"), (b"origin", b"https://[2001:db8::5]:8443"), (b"x-forwarded-proto", b"ftp")]
    seen = Hosts().rewritten({"path": "/", "headers": headers}, "/")["headers"]
    assert dict(seen)[b"x-forwarded-host"] == b"[2001:db8::5]:8443"
    assert [value for key, value in seen if key == b"x-forwarded-proto"] == [b"https"]
    headers = [(b"host", b"127.0.0.1:7860"), (b"x-forwarded-host", b"demo.example.org")]
    assert Hosts().rewritten({"path": "/", "headers": headers}, "/")["headers"] == headers


def test_options() -> None:
    assert Hosts(["M\xfcller.example", "[2001:DB8::5]", "::1"]).names == {"xn--mller-kva.example", "2001:db8::5", "::1"}
    assert Hosts(bind="gpu7").is_own("gpu7")
    assert Hosts(bind="[::]").bind == "::"
    shared = Hosts()
    assert not shared.is_own("0123abc.gradio.live")
    shared.add_address("https://0123abc.gradio.live")
    assert shared.is_own("0123abc.gradio.live")
    for name in ("*", "", "http://a", "a:80", "a/b", "a..b", "u@a", "x" * 70):
        with pytest.raises(UsageError, match=r"--allow-host takes a name such as .* but got"):
            Hosts([name])
    for root_path in ("demo", "//a", "/a b", "/a?b", "ftp://a/b", "https://", "https://u@a/b", "/a//b", "/%2e"):
        with pytest.raises(UsageError, match=r"--root-path takes a path such as /demo"):
            Hosts(root_path=root_path)
    with pytest.raises(UsageError, match="--host takes a name"):
        Hosts(bind="http://0.0.0.0")
