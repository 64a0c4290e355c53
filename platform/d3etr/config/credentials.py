"""No configuration holds a credential: one rule for every key, and for places that users name."""

from pathlib import Path

from d3etr.text import bare_url, credential_in

WHERE = (
    "Credentials belong where the storage's own tools look for them, on every machine: "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile for S3, fsspec's configuration "
    "files for HTTP, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or all of the address "
    "as MLFLOW_TRACKING_URI) for MLflow"
)


def refuse_credentials(value: object) -> None:
    """Check that no text in ``value``, alone or in lists and mappings, holds a credential.

    Raises:
        ValueError: one does; it is not in the error's text.
    """
    if isinstance(value, list | tuple):
        for part in value:
            refuse_credentials(part)
    if isinstance(value, dict):
        refuse_credentials([*value.values()])
    found = credential_in(str(value)) if isinstance(value, str | Path) else None
    if found is not None:
        place = bare_url(str(value)) if "://" in str(value) else "the address"
        raise ValueError(
            f"{place} is given with {found}: a run's folder and MLflow would keep it. {WHERE}"
        )
