"""Bytes over HTTP: one client with pip's proxy and certificates, retries with growing pauses, downloads that resume.

Only the standard library's client is used: it understands proxies, certificate bundles and `file:` mirrors, and costs
nothing at start-up.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import netrc
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from fewer import __version__
from fewer.checkpoint.pip_settings import PipSettings
from fewer.checkpoint.store import Progress
from fewer.errors import DownloadError

T = TypeVar("T")
CHUNK = 1 << 18  # bytes read at a time: small enough for a bar that moves
PASSING = frozenset({408, 416, 425, 429, 500, 502, 503, 504})  # answers worth asking again for
BROKEN = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError)


@dataclass(frozen=True)
class Retry:
    """How often a request that got nowhere is repeated; the pause doubles each time."""

    attempts: int = 5
    first_pause_seconds: float = 0.5


class Client:
    """Opens URLs the way pip would. Raises `DownloadError` with the host and the reason, never a password."""

    def __init__(self, settings: PipSettings, retry: Retry | None = None) -> None:
        self.settings = settings
        self.retry = retry or Retry()

    def open(self, url: str, headers: Mapping[str, str]) -> IO[bytes]:
        """One request, no retry. Credentials in the URL, or in a netrc file, become a header for that host alone."""
        address = urllib.parse.urlsplit(url)
        request = urllib.request.Request(_without_credentials(url), headers={"User-Agent": f"fewer/{__version__}"})
        for name, text in headers.items():
            request.add_header(name, text)
        credentials = _credentials(address)
        if credentials:
            token = base64.b64encode(credentials.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")  # a redirect must not carry it away
        handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=self._tls(address))]
        if self.settings.proxy:
            proxies = {"http": self.settings.proxy, "https": self.settings.proxy}
            handlers.append(urllib.request.ProxyHandler(proxies))
        opener = urllib.request.build_opener(*handlers)
        response: IO[bytes] = opener.open(request, timeout=self.settings.timeout_seconds)
        return response

    def attempt(self, url: str, action: Callable[[], T]) -> T:
        """Runs `action` until it succeeds, fails for good, or has failed `retry.attempts` times in a row."""
        pause = self.retry.first_pause_seconds
        for attempt in range(1, self.retry.attempts + 1):
            try:
                return action()
            except BROKEN as error:
                if attempt == self.retry.attempts or not _may_pass(error):
                    raise DownloadError(_sentence(url, error)) from error
            time.sleep(pause)
            pause *= 2
        raise AssertionError("the last attempt either returned or raised")

    def _tls(self, address: urllib.parse.SplitResult) -> ssl.SSLContext:
        certificate = self.settings.certificate
        try:
            if certificate is None:
                context = ssl.create_default_context()
                _add_certifi(context)
            elif Path(certificate).is_dir():
                context = ssl.create_default_context(capath=certificate)
            else:
                context = ssl.create_default_context(cafile=certificate)
        except (OSError, ssl.SSLError) as error:
            raise DownloadError(
                f"the certificate bundle {certificate} cannot be read ({error}): correct PIP_CERT or pip's `cert`"
            ) from error
        trusted = {address.hostname, f"{address.hostname}:{address.port}"}
        if trusted & self.settings.trusted_hosts:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def fetch(client: Client, url: str, part: Path, size: int, sha256: str, progress: Progress) -> None:
    """Downloads `url` into `part`, going on from the bytes that are already there, and checks size and SHA-256.

    A break leaves `part` for the next call; contents that fail the check are deleted, so nothing resumes from them.
    """
    while (have := _size(part)) != size:
        if have > size:
            part.unlink()
            progress.advance(-have)
            continue
        client.attempt(url, lambda: _receive(client, url, part, size, progress))
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        part.unlink()
        progress.advance(-size)
        raise DownloadError(
            f"{_name(url)} from {_host(url)} has SHA-256 {found[:12]}…, expected {sha256[:12]}…: nothing was "
            "installed; try again, or use another index (PIP_INDEX_URL)"
        )


def _receive(client: Client, url: str, part: Path, size: int, progress: Progress) -> None:
    """One request: appends what arrives. A break after some bytes is progress, one before the first is raised."""
    have = _size(part)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = client.open(url, headers)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # what we hold is not the beginning of what is served
            part.unlink()
            progress.advance(-have)
        raise
    with response:
        resumed = bool(have) and _resumes_at(response, have, size)
        if have and not resumed:
            progress.advance(-have)
            have = 0
        gained = 0
        with part.open("ab" if resumed else "wb") as file:
            try:
                while chunk := response.read(CHUNK):
                    gained += len(chunk)
                    if have + gained > size:
                        raise DownloadError(
                            f"{_host(url)} serves more than {size:,} bytes as {_name(url)}: not that file"
                        )
                    file.write(chunk)
                    progress.advance(len(chunk))
            except BROKEN:
                if not gained:
                    raise
        if not gained:
            raise ConnectionError("the connection closed early")


def _resumes_at(response: IO[bytes], have: int, size: int) -> bool:
    """Whether the answer is the rest of the same file; any other answer starts from the first byte."""
    if getattr(response, "status", None) != 206:
        return False
    served = getattr(response, "headers", {}).get("Content-Range", "")
    if served != f"bytes {have}-{size - 1}/{size}":
        raise ConnectionError(f"asked for bytes from {have} of {size}, got {served or 'no range'}")
    return True


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _may_pass(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in PASSING
    return not isinstance(getattr(error, "reason", error), (ssl.SSLCertVerificationError, FileNotFoundError))


def _sentence(url: str, error: Exception) -> str:
    host = _host(url)
    if isinstance(error, urllib.error.HTTPError):
        advice = "check the credentials of the index" if error.code in (401, 403, 407) else "try again later"
        if error.code == 404:
            advice = "use an index that carries it (PIP_INDEX_URL)"
        return f"{host} answered {error.code} ({error.reason}) for {_name(url)}: {advice}"
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"the certificate of {host} is not trusted ({reason.verify_message}): set PIP_CERT to your bundle"
    return (
        f"could not reach {host} ({reason}): check the network and pip's index and proxy settings, then run the same "
        "command again, it goes on where it stopped"
    )


def _host(url: str) -> str:
    address = urllib.parse.urlsplit(url)
    return address.hostname or address.path


def _name(url: str) -> str:
    path = urllib.parse.urlsplit(url).path.rstrip("/")
    return urllib.parse.unquote(path.rsplit("/", 1)[-1])


def _without_credentials(url: str) -> str:
    address = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(address._replace(netloc=address.netloc.rsplit("@", 1)[-1], fragment=""))


def _credentials(address: urllib.parse.SplitResult) -> str | None:
    """`user:password` for a host: from the URL, else from the user's netrc file."""
    if address.username:
        return f"{urllib.parse.unquote(address.username)}:{urllib.parse.unquote(address.password or '')}"
    try:
        entry = netrc.netrc().authenticators(address.hostname or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return f"{entry[0]}:{entry[2]}" if entry else None


def _add_certifi(context: ssl.SSLContext) -> None:
    """The public certificates that other packages bring, for Pythons that know none of the system's."""
    try:
        import certifi
    except ImportError:
        return
    context.load_verify_locations(certifi.where())
