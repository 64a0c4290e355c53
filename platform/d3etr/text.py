"""Text as it may leave the process: without credentials, without characters that act.

Whatever is shown, logged, stored in a run's folder or sent to MLflow goes through here.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TextIO, cast
from urllib.parse import unquote

LINES = "\n\t\r"
"""What stays as it is in texts of several lines."""
HIDDEN = "***"
"""Stands where a credential was."""
USER_NAMES = frozenset(
    """
    sftp ssh ftp ftps smb hdfs webhdfs abfs abfss az adl wasb wasbs
    postgresql postgres mysql mariadb mssql oracle
    """.split()
)
"""Protocols (before ``+driver``) whose URLs name a user or container before ``@``, no token."""
_NAME_WORDS = frozenset(
    """
    password passwd passphrase passcode pass pwd pw pin secret token jwt bearer otp
    auth authorization authentication key apikey accesskey keyid appkey rlkey sharekey
    signature sig sign credential credentials cred creds sas hmac nonce
    session sessionid sid cookie code login access private
    """.split()
)
_NAME_PARTS = ("password", "passwd", "secret", "token", "apikey", "accesskey", "signature")
_VERSIONS = frozenset(
    """
    version versionid generation revision rev ref commit branch
    checksum md5 sha1 sha256 etag snapshot viewstatesharekey searchfilter orderbykey
    """.split()
)
"""Parameters whose values look like tokens and are none."""
_TOKEN_LENGTH = 16
_TOKEN_TURNS = 3
_SECRET_VARIABLES = re.compile(
    r"(^|_)(PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN|APIKEY|KEY|CREDENTIAL)(_|$)"
)
_IDENTIFIER = re.compile(r"KEY_?ID$|PUBLIC")
_SHORTEST = {"variable": 8, "address": 4}
"""Shorter values would hide ordinary words."""
# A password may hold slashes and "@"; what looks like a port is none. models:/NAME@ALIAS is a model
# of MLflow's registry.
_USER = re.compile(
    r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)(?!(?<=\bmodels):/[^/:@\s]+@):(?P<slashes>/+)"
    r"(?P<user>[^\s/?#@:'\"<>]*:(?!\d+[/?#])[^\s'\"<>]*|[^\s/?#@'\"<>]*)@"
)
_BARE_USER = re.compile(r"[^\s/:@]+:[^\s@]+@[^\s@]+")
_PARAMETER = re.compile(r"(?P<start>[?&#;])(?P<name>[^\s=&#?;'\"]+)=(?P<value>[^\s&#;'\"<>]*)")
_ASSIGNMENT = re.compile(
    r"(?i)\b(?P<name>(?:\w+[_-])?(?:password|passwd|pwd|secret|api_?key|access_?key|token))"
    r"=(?P<value>[^\s,;&'\"<>]+|'[^']*'|\"[^\"]*\")"
)
_HEADER = re.compile(r"\b(?P<kind>[Bb]asic|[Bb]earer)\s+(?=\S*[0-9=])[A-Za-z0-9+/=._~-]{8,}")


def nearest(name: str, valid: Iterable[str]) -> str:
    """The sentence that helps with an unknown name: the nearest valid one, or all of them."""
    choices = list(valid)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"expected one of: {', '.join(choices)}"


def redacted(text: str) -> str:
    """``text`` with credentials replaced.

    Those are users and passwords in URLs, parameters of URLs and assignments whose names speak
    of secrets, authorization headers, and what the environment's secret variables hold.
    """
    for secret in _environment_secrets():
        if secret in text:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", HIDDEN, text)
    text = _USER.sub(_without_user, text)
    text = _PARAMETER.sub(_without_value, text)
    text = _ASSIGNMENT.sub(lambda found: f"{found['name']}={HIDDEN}", text)
    return _HEADER.sub(lambda found: f"{found['kind']} {HIDDEN}", text)


def bare_url(url: str) -> str:
    """``url`` without credentials, query and fragment."""
    if url.startswith("sqlite"):
        return url
    return re.split(r"[?#]", _USER.sub(_without_user, url))[0]


def credential_in(text: str) -> str | None:
    """What in ``text``, if it is a URL or a chain of them, is a credential; None if nothing is."""
    if any(not _names_a_user(found) for found in _USER.finditer(text)):
        return "a password or token before '@'"
    if "://" not in text:
        return "a password before '@'" if _BARE_USER.fullmatch(text) else None
    for found in _PARAMETER.finditer(text):
        if _is_secret(found["name"], found["value"]):
            return f"'{found['name']}'"
    parts = re.split(r"[?#&;]", text)[1:]
    return (
        "a token" if any(_looks_like_a_token(part) for part in parts if "=" not in part) else None
    )


def printable(text: object, keep: str = "") -> str:
    r"""``text`` with every character that would act and not show as ``\uXXXX``.

    Control characters (ESC, C1, newline), overrides of the writing direction, other invisible
    format characters and lone surrogates. Joiners stay: words of some scripts need them. In a
    JSON document the result means the same.

    Args:
        text: of any origin, such as a category's or a file's name.
        keep: characters that stay, for text of several lines.
    """
    plain = str(text)
    if plain.isascii() and plain.isprintable():
        return plain
    return "".join(one if one in keep or _shows(one) else _escape(one) for one in plain)


def safe(stream: TextIO) -> TextIO:
    """A stream that writes into another one what it is given, redacted and printable."""
    return cast(TextIO, _SafeStream(stream, styled=False))


def styled(stream: TextIO) -> TextIO:
    """The stream behind a safe one, redacted only: for a library that draws on a terminal.

    Texts of foreign origin must be made printable before the library gets them.
    """
    behind = stream._stream if isinstance(stream, _SafeStream) else stream
    return cast(TextIO, _SafeStream(behind, styled=True))


class _SafeStream:
    def __init__(self, stream: TextIO, *, styled: bool) -> None:
        self._stream, self._styled = stream, styled

    def write(self, text: str) -> int:
        shown = redacted(text)
        self._stream.write(shown if self._styled else printable(shown, LINES))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> object:
        if name == "_stream":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self._stream, name)


def _names_a_user(found: re.Match[str]) -> bool:
    protocol = found["protocol"].lower().partition("+")[0]
    return (
        protocol in USER_NAMES and ":" not in found["user"] and "%3a" not in found["user"].lower()
    )


def _without_user(found: re.Match[str]) -> str:
    return found[0] if _names_a_user(found) else f"{found['protocol']}:{found['slashes']}"


def _without_value(found: re.Match[str]) -> str:
    if not _is_secret(found["name"], found["value"]):
        return found[0]
    return f"{found['start']}{found['name']}={HIDDEN}"


def _is_secret(name: str, value: str) -> bool:
    plain = unquote(name)
    joined = re.sub(r"[^a-z0-9]", "", plain.lower())
    if joined in _VERSIONS:
        return False
    # AWSAccessKeyId, api_key and x-amz-signature are words; monkey is none of them.
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", plain)}
    named = bool({*words, joined} & _NAME_WORDS) or any(part in joined for part in _NAME_PARTS)
    return named or _looks_like_a_token(value)


def _looks_like_a_token(value: str) -> bool:
    """Long, with letters and digits in turns, as words and dates have them not."""
    longest = max(re.split(r"[/.,:_ -]", unquote(value)), key=len)
    turns = len(re.findall(r"[A-Za-z](?=\d)|\d(?=[A-Za-z])", longest))
    return len(longest) >= _TOKEN_LENGTH and turns >= _TOKEN_TURNS


def _environment_secrets() -> list[str]:
    """Values of secret variables, and passwords in URLs that variables hold; longest first."""
    found: set[str] = set()
    for name, value in os.environ.items():
        secret = _SECRET_VARIABLES.search(name.upper()) and not _IDENTIFIER.search(name.upper())
        if secret and len(value) >= _SHORTEST["variable"] and not value.startswith("/"):
            found.add(value)
        if "@" in value and "://" in value:
            found.update(one for one in _url_secrets(value) if len(one) >= _SHORTEST["address"])
    return sorted(found, key=len, reverse=True)


def _url_secrets(url: str) -> Iterator[str]:
    for found in _USER.finditer(url):
        user, _, password = found["user"].partition(":")
        secret = "" if _names_a_user(found) else password or user
        yield from (secret, unquote(secret))


def _shows(one: str) -> bool:
    kind = unicodedata.category(one)
    return kind not in ("Cc", "Cs", "Zl", "Zp") and (kind != "Cf" or one in "\u200c\u200d")


def _escape(one: str) -> str:
    units = one.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))
