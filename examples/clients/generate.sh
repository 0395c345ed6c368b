#!/bin/sh
# An image with curl: generate.sh PROMPT FILE
set -eu
url=${TRIPTYCH_URL:-http://127.0.0.1:8000}

# In JSON a quote or a backslash has a backslash before it.
prompt=$(printf %s "$1" | sed 's/[\"]/\\&/g')
answer=$(curl --fail-with-body --silent --show-error "$url/v1/images/generations" \
    -H "Content-Type: application/json" ${TRIPTYCH_API_KEY:+-H "Authorization: Bearer $TRIPTYCH_API_KEY"} \
    -d "{\"prompt\": \"$prompt\", \"seed\": 7, \"response_format\": \"b64_json\"}") || {
    echo "$answer" >&2
    exit 1
}
printf %s "$answer" | sed 's/.*"b64_json": *"\([^"]*\)".*/\1/' | base64 -d > "$2"
