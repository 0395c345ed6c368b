#!/bin/sh
# An image with curl: generate.sh PROMPT FILE, where PROMPT is one line
set -eu
url=${TRIPTYCH_URL:-http://127.0.0.1:8000}

# In JSON and in curl's configuration a quote or a backslash has a backslash before it.
escaped() {
    printf %s "$1" | sed 's/[\"]/\\&/g'
}

# Everybody on this machine sees the arguments of curl, so the key goes over its stdin.
answer=$(if [ -n "${TRIPTYCH_API_KEY:-}" ]; then
    printf 'header = "Authorization: Bearer %s"\n' "$(escaped "$TRIPTYCH_API_KEY")"
fi | curl --config - --fail-with-body --silent --show-error "$url/v1/images/generations" \
    -H "Content-Type: application/json" \
    -d "{\"prompt\": \"$(escaped "$1")\", \"seed\": 7, \"response_format\": \"b64_json\"}") || {
    echo "$answer" >&2
    exit 1
}
printf %s "$answer" | sed 's/.*"b64_json": *"\([^"]*\)".*/\1/' | base64 -d > "$2"
