"""A module that makes its importer unfit to be forked."""

import threading

_forever = threading.Event()
threading.Thread(target=_forever.wait, name="left running", daemon=True).start()
