#!/bin/sh
# Gives MinIO one user for each service, who reads and writes that service's buckets and nothing else.
# Run by the service minio-users; what is there already is brought up to date.
set -eu

secret() { cat "/run/secrets/$1"; }

export MC_CONFIG_DIR=/tmp/mc
mkdir -p "$MC_CONFIG_DIR"
# Through standard input, since arguments can be read by every process.
printf '%s\n%s\n' admin "$(secret s3_admin_secret)" | mc alias set airloom http://minio:9000 >/dev/null

policy() { # policy NAME BUCKET...
  name="$1"
  shift
  resources=""
  for bucket in "$@"; do
    resources="$resources${resources:+,}\"arn:aws:s3:::$bucket\",\"arn:aws:s3:::$bucket/*\""
  done
  printf '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["s3:GetObject*","s3:PutObject*","s3:DeleteObject*","s3:ListBucket*","s3:GetBucketLocation","s3:AbortMultipartUpload","s3:ListMultipartUploadParts"],"Resource":[%s]}]}' \
    "$resources" >"/tmp/$name.json"
  mc admin policy create airloom "$name" "/tmp/$name.json" >/dev/null
}

user() { # user NAME SECRET
  printf '%s\n%s\n' "$1" "$(secret "$2")" | mc admin user add airloom >/dev/null
  # Some versions refuse what is attached already. The image has a shell and little else.
  mc admin policy attach airloom "$1" --user "$1" >/dev/null 2>&1 || case "$(mc admin user info airloom "$1")" in
    *PolicyName:*"$1"*) ;;
    *) echo "the policy of $1 could not be attached" >&2 && return 1 ;;
  esac
}

# shellcheck disable=SC2086 # names of buckets hold no spaces, and stand apart by them
{
  policy airloom $BUCKETS_AIRLOOM
  policy mlflow $BUCKETS_MLFLOW
}
user airloom s3_airloom_secret
user mlflow s3_mlflow_secret
echo "MinIO's users airloom and mlflow are there"
