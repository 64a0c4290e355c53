"""What can go wrong between this machine and a storage, as one clear text each."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterator

from fsspec.registry import known_implementations

from d3etr.config.location import Url
from d3etr.errors import UserError

_NO_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError"),
    *("DefaultCredentialsError", "ProfileNotFound"),
}
GOOGLE, HTTP = ("gs", "gcs"), ("http", "https")
_REFUSED, _NOT_FOUND = (401, 403), 404


class MissingFileError(UserError):
    """The storage answered, and has no such file."""


class UnreachableError(UserError):
    """The storage did not answer; trying again later may help."""


def disk_is_full(error: BaseException) -> bool:
    """Whether this machine, not the storage, is the reason."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def explained(url: Url, error: BaseException) -> UserError:
    """What an exception of fsspec's, or of the package behind it, means to the user.

    Args:
        url: what was to be read.
        error: the exception; HTTP hides the true one behind a FileNotFoundError.
    """
    chain = list(_causes(error))
    names = {type(one).__name__ for one in chain}
    status = next((found for found in map(_status, chain) if found), None)
    if isinstance(error, ImportError):
        return UserError(
            f"{url.shown}: reading {url.protocol}:// needs a package that is not installed here "
            f"({error}): pip install it on every machine that trains"
        )
    if isinstance(error, ValueError) and url.protocol not in known_implementations:
        close = difflib.get_close_matches(url.protocol, known_implementations, n=1)
        choice = (
            f"did you mean '{close[0]}://'?" if close else "for example s3://, gs:// or https://"
        )
        return UserError(f"{url.shown}: unknown kind of URL '{url.protocol}://'; {choice}")
    if names & _NO_CREDENTIALS or isinstance(error, PermissionError) or status in _REFUSED:
        return UserError(
            f"{url.shown}: access refused ({_reason(chain)}). The credentials on this machine do "
            f"not give it, or there are none: {_keys(url)}"
        )
    if "NoSuchBucket" in names:
        return MissingFileError(
            f"{url.shown}: there is no bucket '{url.path.parts[0]}' where this machine looks: "
            "check the URL, and AWS_ENDPOINT_URL if the store is not Amazon's"
        )
    # Over HTTP every failure looks like a missing file; its cause tells.
    hidden = url.protocol in HTTP and len(chain) > 1 and status != _NOT_FOUND
    if isinstance(error, FileNotFoundError) and not hidden:
        return MissingFileError(f"{url.shown} does not exist: check the URL")
    return UnreachableError(
        f"{url.shown} cannot be read ({_reason(chain)}): check the URL, this machine's network, "
        "and the endpoint and credentials in its environment"
    )


def timed_out(url: Url, seconds: float) -> UnreachableError:
    """The storage is silent."""
    return UnreachableError(
        f"{url.shown}: no answer within {seconds:g} seconds: check the URL, this machine's "
        f"network, and the endpoint and credentials in its environment ({_keys(url)})"
    )


def _keys(url: Url) -> str:
    if url.protocol in ("s3", "s3a"):
        return (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, where each machine's "
            "processes start (a public bucket: FSSPEC_S3_ANON=true; another store than Amazon's: "
            "AWS_ENDPOINT_URL)"
        )
    if url.protocol in GOOGLE:
        return "set GOOGLE_APPLICATION_CREDENTIALS where each machine's processes start"
    return "give them where fsspec looks (its configuration files, or FSSPEC_... variables)"


def _status(error: BaseException) -> int | None:
    """The number of an HTTP answer, as aiohttp and gcsfs have it."""
    if type(error) is OSError and str(error).startswith("Forbidden"):  # gcsfs's 403
        return _REFUSED[-1]
    found = str(getattr(error, "status", None) or getattr(error, "code", None))
    return int(found) if found.isdigit() else None


def _reason(chain: list[BaseException]) -> str:
    """The first line of the innermost exception that says something."""
    for error in reversed(chain):
        text = str(error).strip().splitlines()
        if text:
            return f"{type(error).__name__}: {text[0][:200]}"
    return type(chain[0]).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
