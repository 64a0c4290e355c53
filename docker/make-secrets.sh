#!/bin/sh
# Makes the secrets that compose.yaml mounts: sh docker/make-secrets.sh [FOLDER]
# Those that are there already stay as they are.
set -eu
folder=${1:-$(dirname "$0")/secrets}
mkdir -p "$folder"
# The folder keeps other users out. The files must be readable to the containers' own users,
# who are others: Compose mounts them with the rights that they have here.
chmod 700 "$folder"
echo '*' >"$folder/.gitignore"
for name in ray_token postgres_password s3_access_key s3_secret_key; do
  if [ ! -s "$folder/$name" ]; then
    head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$folder/$name"
    chmod 444 "$folder/$name"
    echo "made $folder/$name"
  fi
done
