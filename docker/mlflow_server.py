"""Start the MLflow server of compose.yaml: ``python docker/mlflow_server.py [MLFLOW OPTIONS]``.

What `mlflow server` takes from the environment alone - passwords - comes from files here, and the
bucket is made where it is missing. Then this process becomes the server.
"""

import os
import sys
from pathlib import Path

import boto3
from botocore.exceptions import ClientError
from sqlalchemy import URL


def secret(variable: str) -> str:
    """Content of the file that an environment variable names."""
    return Path(os.environ[variable]).read_text(encoding="utf-8").strip()


def database() -> str:
    """PostgreSQL's address with the password in it."""
    address = URL.create(
        "postgresql+psycopg2",
        username=os.environ["POSTGRES_USER"],
        password=secret("POSTGRES_PASSWORD_FILE"),
        host=os.environ["POSTGRES_HOST"],
        port=int(os.environ["POSTGRES_PORT"]),
        database=os.environ["POSTGRES_DB"],
    )
    return address.render_as_string(hide_password=False)


def make_bucket(name: str) -> None:
    """Make the bucket unless it is there."""
    store = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    try:
        store.head_bucket(Bucket=name)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
        store.create_bucket(Bucket=name)


def main() -> None:
    """Prepare the environment and become `mlflow server`."""
    bucket = os.environ["S3_BUCKET"]
    # In the environment, not among the arguments, which every user of the machine can list.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = database()
    os.environ["MLFLOW_ARTIFACTS_DESTINATION"] = f"s3://{bucket}"
    os.environ["AWS_ACCESS_KEY_ID"] = secret("S3_ACCESS_KEY_FILE")
    os.environ["AWS_SECRET_ACCESS_KEY"] = secret("S3_SECRET_KEY_FILE")
    make_bucket(bucket)
    os.execvp("mlflow", ["mlflow", "server", *sys.argv[1:]])


if __name__ == "__main__":
    main()
