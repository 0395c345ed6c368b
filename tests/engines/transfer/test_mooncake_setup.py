from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.engines.transfer.peer_process import ROOT
from triptych.engines.transfer import TransferSetupError
from triptych.engines.transfer import mooncake_setup as setup


def refusal(call, *arguments) -> str:
    with pytest.raises(TransferSetupError) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(("protocol", "forced", "other"), [("tcp", "TCP", "HCA"), ("rdma", "HCA", "TCP")])
def test_the_transport_is_forced_not_guessed(protocol, forced, other):
    settings = setup.environment(protocol, {})
    assert settings[f"MC_FORCE_{forced}"] == "1"
    assert f"MC_FORCE_{other}" not in settings
    assert f"MC_FORCE_{other}" in refusal(setup.environment, protocol, {f"MC_FORCE_{other}": "1"})


def test_late_writes_end_before_the_engine_gives_up():
    settings = setup.environment("tcp", {})
    assert int(settings["MC_TCP_PROGRESS_TIMEOUT_SEC"]) < int(settings["MC_TRANSFER_TIMEOUT"])
    for progress in ("10", "0", "soon"):
        assert "MC_TCP_PROGRESS_TIMEOUT_SEC" in refusal(
            setup.environment, "tcp", {"MC_TCP_PROGRESS_TIMEOUT_SEC": progress}
        )


def test_what_the_operator_has_set_is_kept():
    settings = setup.environment("tcp", {"MC_TCP_SLICE_SIZE": "65536", "MC_TRANSFER_TIMEOUT": "60"})
    assert (settings["MC_TCP_SLICE_SIZE"], settings["MC_TRANSFER_TIMEOUT"]) == ("65536", "60")
    assert settings["MC_DISABLE_METACACHE"] == "1"


def test_both_ports_of_an_engine_are_bounded_where_the_host_says_so():
    assert "MC_MIN_RPC_PORT" not in setup.environment("tcp", {})
    settings = setup.environment("tcp", {}, (21000, 21015))
    assert (settings["MC_MIN_RPC_PORT"], settings["MC_MAX_RPC_PORT"]) == ("21000", "21015")


def test_other_protocols_are_refused():
    assert '"carrier"' in refusal(setup.environment, "carrier", {})


def test_rdma_needs_a_device():
    setup.check_devices("tcp", "", [])
    setup.check_devices("rdma", "", ["mlx5_0"])
    setup.check_devices("rdma", "mlx5_1,mlx5_0", ["mlx5_0", "mlx5_1"])
    assert "no device" in refusal(setup.check_devices, "rdma", "", [])
    assert "mlx5_7" in refusal(setup.check_devices, "rdma", "mlx5_0,mlx5_7", ["mlx5_0"])


def test_devices_and_their_counters_are_read(tmp_path):
    assert setup.infiniband_devices(tmp_path / "none") == []
    assert setup.rdma_activity(tmp_path / "none") == 0
    for port, reads in (("1", 40), ("2", 2)):
        counters = tmp_path / "mlx5_0" / "ports" / port / "hw_counters"
        counters.mkdir(parents=True)
        (counters / "rx_read_requests").write_text(f"{reads}\n")
        (counters / "rx_write_requests").write_text("100\n")
        (counters / "out_of_sequence").write_text("9999\n")
    assert setup.infiniband_devices(tmp_path) == ["mlx5_0"]
    assert setup.rdma_activity(tmp_path) == 242


def test_exactly_one_wheel_may_be_installed():
    one = {"mooncake-transfer-engine-non-cuda": "0.3.13"}
    assert setup.check_wheels(one) == "mooncake-transfer-engine-non-cuda 0.3.13"
    assert "triptych[mooncake-cu12]" in refusal(setup.check_wheels, {})
    assert "overwritten each other" in refusal(setup.check_wheels, one | {"mooncake-transfer-engine": "0.3.13"})


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("libibverbs.so.1: cannot open shared object file", "apt-get install libibverbs1"),
        ("libcuda.so.1: cannot open shared object file", "triptych[mooncake]"),
        ("libcudart.so.12: cannot open shared object file", "another version of CUDA"),
        ("No module named 'mooncake.engine'", "triptych[mooncake-cu13]"),
    ],
)
def test_an_import_that_fails_says_what_to_install(text, remedy):
    assert remedy in setup.explain(ImportError(text))


def test_settings_are_in_place_before_the_import():
    code = (
        "import os, sys, mooncake.engine; from triptych.engines.transfer import mooncake_setup as setup\n"
        "try: setup.import_engine({'MC_FORCE_TCP': '1'})\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "os.environ['MC_FORCE_TCP'] = '1'\n"
        "print(setup.import_engine({'MC_FORCE_TCP': '1'}).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = result.stdout.splitlines()
    assert first == "TransferSetupError Mooncake was imported before these were set: MC_FORCE_TCP"
    assert second == "mooncake.engine"


def test_the_ports_of_a_process_are_those_that_it_listens_on():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        found = setup.listening_ports()
        assert server.getsockname()[1] in found
        assert client.getsockname()[1] not in found


def test_an_import_without_the_wheel_is_told_in_words():
    code = (
        "import sys; from triptych.engines.transfer import mooncake_setup as setup\n"
        "sys.modules['mooncake'] = None\n"
        "try: setup.import_engine({})\n"
        "except setup.TransferSetupError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Install exactly one" in result.stdout
