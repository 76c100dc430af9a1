"""Where pip looks for packages on this machine, and how it gets there: read from its variables and configuration files.

Whoever reaches packages through a mirror, a proxy or a company's certificates has told pip so already; nobody should
have to tell it twice. The precedence is pip's: variables, then the files from the most specific to the most general.
"""

from __future__ import annotations

import configparser
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PUBLIC_INDEX = "https://pypi.org/simple"


@dataclass(frozen=True)
class PipSettings:
    """What pip would use for `pip download`."""

    indexes: tuple[str, ...] = (PUBLIC_INDEX,)  # asked in this order
    find_links: tuple[str, ...] = ()  # folders that may hold wheels
    certificate: str | None = None  # a bundle file or a folder of certificates
    proxy: str | None = None
    trusted_hosts: frozenset[str] = frozenset()  # host or host:port whose certificate pip does not check
    timeout_seconds: float = 30.0


def read_pip_settings(environment: Mapping[str, str] = os.environ) -> PipSettings:
    """The settings in force for this process."""
    configured = _configured(environment)

    def value(option: str, *variables: str) -> str:
        for variable in (f"PIP_{option.upper().replace('-', '_')}", *variables):
            if environment.get(variable, "").strip():
                return environment[variable].strip()
        return configured.get(option, "").strip()

    indexes = (value("index-url", "UV_DEFAULT_INDEX", "UV_INDEX_URL") or PUBLIC_INDEX).split()[:1]
    indexes += value("extra-index-url", "UV_EXTRA_INDEX_URL").split()
    if value("no-index").lower() in ("1", "true", "yes", "on"):
        indexes = []
    # SSL_CERT_FILE needs no line here: OpenSSL reads it by itself.
    certificate = value("cert", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    return PipSettings(
        indexes=tuple(dict.fromkeys(url.rstrip("/") for url in indexes)),
        find_links=tuple(value("find-links", "UV_FIND_LINKS").split()),
        certificate=certificate or None,
        proxy=value("proxy") or None,
        trusted_hosts=frozenset(value("trusted-host", "UV_INSECURE_HOST").split()),
        timeout_seconds=_seconds(value("timeout", "PIP_DEFAULT_TIMEOUT")),
    )


def _seconds(text: str) -> float:
    try:
        return min(max(float(text), 1.0), 600.0)
    except ValueError:
        return PipSettings.timeout_seconds


def _configured(environment: Mapping[str, str]) -> dict[str, str]:
    """Options of pip's configuration files; a later file, and the section of `pip download`, override."""
    options: dict[str, dict[str, str]] = {"global": {}, "download": {}}
    for path in _configuration_files(environment):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (OSError, configparser.Error, UnicodeError):
            continue  # pip itself says what is wrong with its file
        for section in parser.sections():
            if section in options:
                options[section].update({key.replace("_", "-"): text for key, text in parser.items(section)})
    return {**options["global"], **options["download"]}


def _configuration_files(environment: Mapping[str, str]) -> Iterator[Path]:
    """In pip's order: the machine's, the user's, the environment's (venv), the one that a variable names."""
    chosen = environment.get("PIP_CONFIG_FILE", "")
    if chosen == os.devnull:
        return
    user_home = Path(environment.get("HOME") or Path.home())
    if sys.platform == "win32":
        yield Path(environment.get("PROGRAMDATA", "C:/ProgramData")) / "pip" / "pip.ini"
        yield user_home / "pip" / "pip.ini"
        yield Path(environment.get("APPDATA", user_home / "AppData/Roaming")) / "pip" / "pip.ini"
        yield Path(sys.prefix) / "pip.ini"
    else:
        for folder in reversed(environment.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":")):
            yield Path(folder) / "pip" / "pip.conf"
        if sys.platform == "darwin":
            yield Path("/Library/Application Support/pip/pip.conf")
            yield user_home / "Library/Application Support/pip/pip.conf"
        yield Path("/etc/pip.conf")
        yield user_home / ".pip" / "pip.conf"
        yield Path(environment.get("XDG_CONFIG_HOME") or user_home / ".config") / "pip" / "pip.conf"
        yield Path(sys.prefix) / "pip.conf"
    if chosen:
        yield Path(chosen)
