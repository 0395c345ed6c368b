"""OpenStack Swift with its S3 API on loopback, all servers in one process: a real object store for tests.

`python s3_server.py FOLDER` serves until the end of its stdin, and first prints the URL of its endpoint. It runs with
an interpreter that has Swift (`make test-s3` makes one), not that of the tests: Swift replaces sockets and threads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import eventlet

eventlet.monkey_patch()

from eventlet import wsgi  # noqa: E402
from swift.common import utils  # noqa: E402
from swift.common.ring import RingBuilder  # noqa: E402
from swift.common.wsgi import loadapp  # noqa: E402

ACCESS_KEY, SECRET_KEY = "test:tester", "testing"

SERVER = """[DEFAULT]
devices = {folder}
mount_check = false
swift_dir = {folder}
[app:main]
use = egg:swift#{kind}
"""
PROXY = """[DEFAULT]
swift_dir = {folder}
[pipeline:main]
pipeline = catch_errors s3api tempauth slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
allow_no_owner = true
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""


def serve(folder: Path) -> str:
    """Start the four servers; return the URL of the endpoint."""
    # What /etc/swift/swift.conf has otherwise.
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n")
    utils.SWIFT_CONF_FILE = str(folder / "swift.conf")
    utils.HASH_PATH_SUFFIX = b"tests"
    (folder / "disk").mkdir()
    for kind, ring in (("account", "account"), ("container", "container"), ("object", "object")):
        listener = eventlet.listen(("127.0.0.1", 0))
        builder = RingBuilder(4, 1, 0)
        builder.add_dev(
            {
                "id": 0,
                "region": 1,
                "zone": 1,
                "ip": "127.0.0.1",
                "port": listener.getsockname()[1],
                "device": "disk",
                "weight": 1.0,
            }
        )
        builder.rebalance()
        builder.get_ring().save(str(folder / f"{ring}.ring.gz"))
        start(listener, folder, kind, SERVER.format(folder=folder, kind=kind))
    listener = eventlet.listen(("127.0.0.1", 0))
    start(listener, folder, "proxy", PROXY.format(folder=folder))
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def start(listener: object, folder: Path, kind: str, text: str) -> None:
    """Serve one of the applications."""
    file = folder / f"{kind}.conf"
    file.write_text(text)
    app = loadapp(str(file))
    eventlet.spawn(wsgi.server, listener, app, log_output=False)


if __name__ == "__main__":
    print(serve(Path(sys.argv[1])), flush=True)
    while eventlet.tpool.execute(sys.stdin.readline):
        pass
