from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from tests.actors.conftest import THREE_ROLES
from triptych.actors import AddressBook, Component, Topology, TopologyError, load_topology
from triptych.actors.command.preflight import has_accelerator, preflight
from triptych.actors.errors import UnknownNameError
from triptych.actors.runtime.address_book import supervisor_of
from triptych.actors.topology import HeadSection, largest_payload, parse_size, pool_zones
from triptych.actors.topology.paths import MAX_SOCKET_PATH, private_dir, private_run_dir

Write = Callable[..., Path]

MODEL = '[model]\npath = "."\n'
WHOLE = '[[models]]\nname = "{0}"\npath = "{0}"\n[[models.roles]]\nkind = "monolithic"\n'
TWO = WHOLE.format("a") + WHOLE.format("B.1")
LORA = '[[model.lora]]\nname = "ink"\npath = "ink.safetensors"\n'
TWICE = THREE_ROLES + '[[roles]]\nkind = "denoiser"\n'
BROKEN = {
    "not TOML": (MODEL + "[api\n", "is not TOML", "line 3"),
    "no model": (THREE_ROLES, "has no [model] section", 'path = "the folder of a model"'),
    "unknown section": (
        MODEL + "[supervison]\n" + THREE_ROLES,
        "[supervison] is not a section",
        "did you mean supervision?",
    ),
    "both ways": (MODEL + THREE_ROLES + TWO, "[model] stands beside [[models]]", "with [[models.roles]] below it"),
    "roles of none": (THREE_ROLES + TWO, "[[roles]] stands beside [[models]]", "with [[models.roles]] below it"),
    "no models": ("models = []\n", "has no [model] section", 'path = "the folder of a model"'),
    "a model without a name": (
        TWO.replace('name = "B.1"\n', ""),
        "[[models]] no. 2 lacks the key name",
        "what requests are to give as model",
    ),
    "two models of a name": (TWO.replace("B.1", "a"), '[[models]] use the name "a" 2 times', "a name of its own"),
    "two models of a role name": (TWO.replace("B.1", "A"), "use the name a-monolithic 2 times", "with name"),
    "a model of a long name": (
        TWO.replace("B.1", "m" * 22),
        f"would be called {'m' * 22}-monolithic, which is not a name",
        "give it a name of its own with name",
    ),
    "unknown key of a role of a model": (
        TWO + 'devise = "cpu"\n',
        "[[models.roles]] no. 1 of [[models]] no. 2 has no key called devise",
        "device",
    ),
    "a model without roles": (
        WHOLE.format("a") + '[[models]]\nname = "b"\npath = "b"\n',
        '[[models.roles]] of "b" are missing',
        "add one for each",
    ),
    "caches of more than half of the pool together": (
        TWO.replace('path = "a"', 'path = "a"\nprompt_cache = "100MiB"'),
        '[[models]] "B.1" prompt_cache = "" is with those before it more than half of',
        "make it smaller",
    ),
    "unknown key": (MODEL + "[api]\nprot = 1\n" + THREE_ROLES, "[api] has no key called prot", "did you mean port?"),
    "unknown key of a role": (
        MODEL + THREE_ROLES + 'devise = "cpu"\n',
        "[[roles]] no. 3 has no key called devise",
        "device",
    ),
    "mooncake for all": (
        MODEL + '[transfer]\nengine = "mooncake"\n' + THREE_ROLES,
        '[transfer] engine = "mooncake" would let everybody who reaches this host read and write',
        "trusted_network = true",
    ),
    "a word for a switch": (
        MODEL + '[transfer]\ntrusted_network = "yes"\n' + THREE_ROLES,
        '[transfer] trusted_network = "yes" does not fit',
        "give it true or false",
    ),
    "strange key": (MODEL + "[bus]\nzzz = 1\n" + THREE_ROLES, "[bus] has no key called zzz", "use one of transport"),
    "wrong type": (
        MODEL + '[api]\nport = "80"\n' + THREE_ROLES,
        '[api] port = "80" does not fit',
        "a port from 1 to 65535",
    ),
    "bool for a number": (
        MODEL + "[head]\nmax_pending = true\n" + THREE_ROLES,
        "= true does not fit",
        "a whole number",
    ),
    "missing key": ("[model]\ndtype = 'float32'\n" + THREE_ROLES, "[model] lacks the key path", "add path = a text"),
    "section is no table": ("model = 3\n" + THREE_ROLES, "[model] is not a table", "write the line [model]"),
    "roles is one table": (MODEL + '[roles]\nkind = "encoder"\n', "[roles] is written as one table", "write [[roles]]"),
    "bad size": (
        MODEL + '[transfer]\npool_size = "4 parsecs"\n' + THREE_ROLES,
        '"4 parsecs" is not a size',
        '"256MiB"',
    ),
    "no size at all": (MODEL + '[transfer]\npool_size = "0MiB"\n' + THREE_ROLES, '"0MiB" is not a size', '"256MiB"'),
    "a store in a relative folder": (
        MODEL + '[store]\nurl = "shared"\n' + THREE_ROLES,
        '[store] url = "shared" is no place for files',
        '"/mnt/shared/triptych"',
    ),
    "no name of a bucket": (
        MODEL + '[store]\nurl = "s3://My_Bucket/x"\n' + THREE_ROLES,
        '[store] url = "s3://My_Bucket/x" is no place for files',
        '"s3://bucket/prefix"',
    ),
    "a store above its folder": (
        MODEL + '[store]\nurl = "file:///mnt/../etc"\n' + THREE_ROLES,
        '[store] url = "file:///mnt/../etc" is no place for files',
        '"/mnt/shared/triptych"',
    ),
    "no size of a store": (
        MODEL + '[state]\nmax_artifacts_size = "much"\n' + THREE_ROLES,
        '[state] max_artifacts_size = "much" is not a',
        '"32GiB"',
    ),
    "no size of the memory": (
        MODEL + '[memory]\ncard = "much"\n' + THREE_ROLES,
        '[memory] card = "much" is not a',
        '"24GiB"',
    ),
    "too small a pool": (
        MODEL + '[transfer]\npool_size = "8191B"\n' + THREE_ROLES,
        '"8191B" is less than 8192',
        "larger",
    ),
    "bad cache": (
        MODEL + 'prompt_cache = "some"\n' + THREE_ROLES,
        'prompt_cache = "some" is not a size',
        '"0" for none',
    ),
    "too much cache": (
        MODEL + 'prompt_cache = "9MiB"\n[transfer]\npool_size = "16MiB"\n' + THREE_ROLES,
        'prompt_cache = "9MiB" is more than half of [transfer] pool_size = "16MiB"',
        "make it smaller",
    ),
    "unknown dispatch": (
        MODEL + '[head]\ndispatch = "round_robbin"\n' + THREE_ROLES,
        "is not known",
        "mean round_robin",
    ),
    "unknown kind": (MODEL + THREE_ROLES + '[[roles]]\nkind = "denoisr"\n', '"denoisr" is not known', "mean denoiser"),
    "count 0": (MODEL + THREE_ROLES + "count = 0\n", "[[roles]] no. 3 count = 0 does not fit", "at least 1"),
    "bad device": (
        MODEL + THREE_ROLES + 'device = "gpu"\n',
        'device = "gpu" does not fit',
        '"cpu", "cuda" or "cuda:N"',
    ),
    "bad name": (MODEL + THREE_ROLES + 'name = "A b"\n', 'name = "A b" does not fit', "lower-case letters"),
    "negative seconds": (
        MODEL + "[supervision]\nperiod_s = -1\n" + THREE_ROLES,
        "period_s = -1 does not fit",
        "above zero",
    ),
    "no roles": (MODEL, "[[roles]] are missing", "add one for each of encoder, denoiser and decoder"),
    "no denoiser": (
        MODEL + '[[roles]]\nkind = "encoder"\n[[roles]]\nkind = "decoder"\n',
        "[[roles]] have no denoiser",
        'add a [[roles]] with kind = "denoiser"',
    ),
    "only one stage": (MODEL + '[[roles]]\nkind = "encoder"\n', "have no denoiser and no decoder", "add a [[roles]]"),
    "mixed": (
        MODEL + '[[roles]]\nkind = "monolithic"\n[[roles]]\nkind = "decoder"\n',
        "mix monolithic with decoder",
        "keep either",
    ),
    "same kind twice": (MODEL + TWICE, "use the name denoiser 2 times", "give each a name of its own"),
    "same name twice": (
        MODEL + TWICE.replace('"denoiser"', '"denoiser"\nname = "fast"'),
        "use the name fast 2 times",
        "give each a name of its own",
    ),
    "two roles on one port": (
        MODEL
        + THREE_ROLES.replace('"encoder"', '"encoder"\nport = 7000').replace('"decoder"', '"decoder"\nport = 7000'),
        "port 7000 is used twice, by encoder-0 and by decoder-0",
        "give one of them another port",
    ),
    "a role on the port of HTTP": (
        MODEL + "[api]\nport = 5558\n" + THREE_ROLES,
        "port 5558 is used twice, by [api] port and by denoiser-0",
        "another port",
    ),
    "ports run out": (MODEL + "[head]\nport = 65533\n" + THREE_ROLES, "leads to port 65536", "choose a lower one"),
    "a scheduler that is no table": (
        MODEL + 'scheduler = "euler"\n' + THREE_ROLES,
        '[model] scheduler = "euler" does not fit',
        "a table whose values are",
    ),
    "an adapter without a file": (
        MODEL + LORA.replace("path", "pat"),
        "[[model.lora]] no. 1 has no key called pat",
        "path",
    ),
    "a nameless adapter": (
        MODEL + '[[model.lora]]\npath = "a"\n',
        "[[model.lora]] no. 1 lacks the key name",
        "1 to 64",
    ),
    "a strange adapter": (MODEL + LORA.replace("ink", "i k"), 'name = "i k" does not fit', "1 to 64 letters"),
    "a strong adapter": (MODEL + LORA + "scale = 4.5\n", "scale = 4.5 does not fit", "a number from -4 to 4"),
    "adapters in one table": (
        MODEL + LORA.replace("[[", "[").replace("]]", "]"),
        "[model.lora] is written as",
        "[[model.lora]], once",
    ),
    "two adapters of one name": (
        MODEL + LORA + LORA + THREE_ROLES,
        '[[model.lora]] use the name "ink" 2 times',
        "give each a name",
    ),
    "four bits": (
        MODEL + THREE_ROLES + 'quantization = "int4"\n',
        '"int4" is not known',
        "use one of none, int8, float8.",
    ),
    "half the bits": (MODEL + 'dtype = "bf16"\n' + THREE_ROLES, '"bf16" is not known', "did you mean bfloat16?"),
    "twice the bits": (
        MODEL + 'dtype = "float64"\n' + THREE_ROLES,
        '"float64" is not known',
        "use one of float32, float16, bfloat16.",
    ),
    "a batch larger than its slots": (
        MODEL + THREE_ROLES.replace('"denoiser"', '"denoiser"\nmax_batch = 4'),
        'kind = "denoiser" max_batch = 4 is more than the 2 requests',
        "write slots = 4 as well",
    ),
    "a batch of a decoder": (
        MODEL + THREE_ROLES + "max_batch = 2\n",
        'kind = "decoder" max_batch = 2, but only a denoiser',
        "give it to the denoiser",
    ),
    "a step cache of nobody": (
        MODEL + THREE_ROLES.replace('"denoiser"', '"denoiser"\ncache = "teacache"'),
        '[[roles]] cache = "teacache" is not a step cache: the kinds are first_block, magcache, taylorseer, pab',
        'write it as in "first_block:0.1"',
    ),
    "a step cache of a decoder": (
        MODEL + THREE_ROLES + 'cache = "pab"\n',
        '[[roles]] kind = "decoder" cache = "pab", but only a denoiser',
        "give it to the denoiser",
    ),
    "two step caches of one model": (
        MODEL + THREE_ROLES + '[[roles]]\nkind = "denoiser"\nname = "fast"\ncache = "pab"\n',
        '[[roles]] cache has the values "" and "pab", so that one request could have either image',
        "give all denoisers of a model the same",
    ),
    "a policy of nobody": (MODEL + THREE_ROLES + 'policy = "lifo"\n', '"lifo" is not known', "did you mean fifo?"),
    "a word that is two": (
        MODEL + '[[model.embeddings]]\ntoken = "a b"\npath = "a"\n' + THREE_ROLES,
        'token = "a b" does not fit',
        "a word of at most 64 characters",
    ),
    "a word that is taught twice": (
        MODEL + '[[model.embeddings]]\ntoken = "ink"\npath = "a"\n' * 2 + THREE_ROLES,
        '[[model.embeddings]] use the token "ink" 2 times',
        "a token of its own",
    ),
    "open host": (
        MODEL + '[api]\nhost = "0.0.0.0"\n' + THREE_ROLES,
        "there are no keys to keep others out",
        '"127.0.0.1"',
    ),
    "open name": (MODEL + '[api]\nhost = "example.org"\n' + THREE_ROLES, "open to the network", "[api] keys_file"),
    "no site": (
        MODEL + '[api]\npublic_url = "http://["\n' + THREE_ROLES,
        'public_url = "http://[" is not the URL',
        "https://",
    ),
    "no host": (
        MODEL + '[api]\nallowed_hosts = ["http://a"]\n' + THREE_ROLES,
        'allowed_hosts have "http://a"',
        "write a name alone",
    ),
    "no list of hosts": (MODEL + '[api]\nallowed_hosts = "a"\n' + THREE_ROLES, "does not fit", "a list of host names"),
    "no rate": (MODEL + '[api]\nrate_limit = "many"\n' + THREE_ROLES, 'rate_limit = "many" is not a rate', '"60/min"'),
}

HOST_A = '[[hosts]]\nname = "a"\naddress = "10.0.0.1"\n'
HOST_B = '[[hosts]]\nname = "b"\naddress = "10.0.0.2"\n'
ON_HOSTS = """
[[roles]]
kind = "encoder"
host = "a"
[[roles]]
kind = "denoiser"
hosts = ["b", "a"]
count = 2
[[roles]]
kind = "decoder"
host = "b"
"""
HOSTS = MODEL + HOST_A + HOST_B + '[head]\nhost = "a"\n'
TRUSTED = "[transfer]\ntrusted_network = true\n"
BROKEN |= {
    "a host without an address": (
        MODEL + '[[hosts]]\nname = "a"\n' + THREE_ROLES,
        '"a" has no address',
        "--ray",
    ),
    "a host of a strange name": (
        HOSTS.replace('"b"', '"B.1"') + ON_HOSTS,
        '[[hosts]] no. 2 name = "B.1"',
        "lower-case",
    ),
    "two hosts of a name": (HOSTS.replace('"b"', '"a"') + ON_HOSTS, 'use the name "a" 2 times', "a name of its own"),
    "two hosts of an address": (
        HOSTS.replace(".2", ".1") + ON_HOSTS,
        'use the address "10.0.0.1" 2 times',
        "of its own",
    ),
    "two hosts of a key": (
        HOSTS.replace("address", 'public_key = "k"\naddress') + ON_HOSTS,
        'use the public key "k" 2 times',
        "a public key of its own",
    ),
    "no address": (
        HOSTS.replace("10.0.0.2", "tcp://b") + ON_HOSTS,
        '"b" address = "tcp://b" is not an address',
        "alone",
    ),
    "a loopback address among others": (
        HOSTS.replace("10.0.0.2", "127.0.0.1") + ON_HOSTS,
        '[[hosts]] "b" address = "127.0.0.1" is an address that a cannot reach',
        "the other hosts",
    ),
    "a loopback transfer address": (
        HOSTS.replace('"10.0.0.2"', '"10.0.0.2"\ntransfer_address = "localhost"') + ON_HOSTS,
        '"b" transfer_address = "localhost" is an address that a cannot reach',
        "leave it out",
    ),
    "an unknown host": (
        HOSTS + TRUSTED + ON_HOSTS.replace('"a"', '"aa"'),
        '[[roles]] kind = "encoder" host = "aa" is not a host',
        "did you mean a?",
    ),
    "an unknown host of the head": (HOSTS.replace('host = "a"', 'host = "z"') + ON_HOSTS, '[head] host = "z"', "a, b"),
    "a host without hosts": (MODEL + ON_HOSTS, 'host = "a", but there are no [[hosts]]', "add a [[hosts]]"),
    "no host of the head": (
        HOSTS.replace('[head]\nhost = "a"\n', "") + ON_HOSTS,
        "[head] lacks the key host, with 2 [[hosts]]",
        'write host = "a" there',
    ),
    "a role without a host": (
        HOSTS + THREE_ROLES,
        '[[roles]] kind = "encoder" lacks the key host, with 2 [[hosts]]',
        'write host = "a" there',
    ),
    "host and hosts": (HOSTS + ON_HOSTS + 'hosts = ["a"]\n', 'kind = "decoder" has both host and hosts', "all of them"),
    "a host twice": (HOSTS + ON_HOSTS.replace('["b", "a"]', '["b", "b"]'), 'hosts have "b" twice', "raise count"),
    "shared memory between hosts": (
        HOSTS + '[transfer]\nengine = "shm"\n' + ON_HOSTS,
        '[transfer] engine = "shm" shares memory, which the roles on a and b cannot',
        'write engine = "mooncake"',
    ),
    "mooncake between hosts": (
        HOSTS + ON_HOSTS,
        '[transfer] engine = "mooncake" would let everybody who reaches this host read and write',
        "trusted_network = true",
    ),
    "one address for several hosts": (
        HOSTS + TRUSTED + 'hostname = "10.0.0.1"\n' + ON_HOSTS,
        '[transfer] hostname = "10.0.0.1" is one address for several hosts',
        "transfer_address",
    ),
    "a port twice on a host": (
        HOSTS + TRUSTED + ON_HOSTS + "port = 5557\n",
        "port 5557 is used twice on b, by pool-b and by decoder-0",
        "another port",
    ),
    "no range of ports": (
        HOSTS.replace('"10.0.0.2"', '"10.0.0.2"\ntransfer_ports = "22-9"') + ON_HOSTS,
        '[[hosts]] "b" transfer_ports = "22-9" is not a range',
        '"21000-21015"',
    ),
    "a narrow range of ports": (
        HOSTS.replace('"10.0.0.2"', '"10.0.0.2"\ntransfer_ports = "2100-2101"') + ON_HOSTS,
        'transfer_ports = "2100-2101" is too narrow',
        "give it 16",
    ),
    "a range of ports in use": (
        HOSTS.replace('"10.0.0.2"', '"10.0.0.2"\ntransfer_ports = "5550-5570"') + TRUSTED + ON_HOSTS,
        '[[hosts]] "b" transfer_ports = "5550-5570" has port',
        "nothing else uses",
    ),
    "a pool without room for its zones": (
        HOSTS.replace('"10.0.0.2"', '"10.0.0.2"\npool_size = "8KiB"') + TRUSTED + ON_HOSTS,
        '[[hosts]] "b" pool_size = "8KiB" is less than 12288 bytes',
        "make it larger",
    ),
    "no size of a host's pool": (
        HOSTS.replace('"10.0.0.2"', '"10.0.0.2"\npool_size = "big"') + TRUSTED + ON_HOSTS,
        '[[hosts]] "b" pool_size = "big" is not a size',
        '"256MiB"',
    ),
    "a host with the name of a component": (
        HOSTS.replace('"b"', '"api"') + TRUSTED + ON_HOSTS.replace('"b"', '"api"'),
        '[[hosts]] has the name of the component "api"',
        "another name",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_topology_is_one_sentence_with_file_key_and_fix(case: str, folder: Path) -> None:
    text, problem, fix = BROKEN[case]
    file = folder / "broken.toml"
    file.write_text(text)
    with pytest.raises(TopologyError) as caught:
        load_topology(file)
    sentence = str(caught.value)
    assert sentence.startswith(f"{file}")
    assert problem in sentence
    assert fix in sentence
    assert sentence.endswith((".", "?"))
    assert "\n" not in sentence


def test_a_file_that_is_not_there_or_is_a_folder(folder: Path) -> None:
    with pytest.raises(TopologyError, match="does not exist"):
        load_topology(folder / "none.toml")
    with pytest.raises(TopologyError, match="cannot be read"):
        load_topology(folder)


def test_components_in_start_order_with_ports_by_rule(write: Write) -> None:
    topology = load_topology(
        write('[bus]\ntransport = "tcp"\n', THREE_ROLES.replace('"denoiser"', '"denoiser"\ncount = 2'))
    )
    assert [(c.name, c.kind, c.port, c.index, c.pool) for c in topology.components] == [
        ("pool", "pool", 5556, 0, ""),
        ("encoder-0", "encoder", 5557, 0, "pool"),
        ("denoiser-0", "denoiser", 5558, 0, "pool"),
        ("denoiser-1", "denoiser", 5559, 1, "pool"),
        ("decoder-0", "decoder", 5560, 0, "pool"),
        ("head", "head", 5555, 0, ""),
        ("api", "api", 5561, 0, ""),
    ]
    assert topology.component("denoiser-1").address == "tcp://127.0.0.1:5559"


def test_each_host_has_its_components_its_pool_and_its_supervisor(write: Write) -> None:
    hosts = f'{HOST_A}pool_size = "1GiB"\n{HOST_B}bind = "*"\n[[hosts]]\nname = "c"\naddress = "fd00::3"\n'
    text = f'{hosts}[head]\nhost = "c"\n{TRUSTED}'
    topology = load_topology(write(text, ON_HOSTS.replace("count = 2", "count = 2\nport = 7000")))
    assert [(c.name, c.host, c.pool, c.index, c.address, c.bind) for c in topology.components] == [
        ("pool-a", "a", "", 0, "tcp://10.0.0.1:5556", ""),
        ("pool-b", "b", "", 0, "tcp://10.0.0.2:5557", "tcp://*:5557"),
        ("encoder-0", "a", "pool-a", 0, "tcp://10.0.0.1:5558", ""),
        ("denoiser-0", "b", "pool-b", 0, "tcp://10.0.0.2:7000", "tcp://*:7000"),
        ("denoiser-1", "b", "pool-b", 1, "tcp://10.0.0.2:7001", "tcp://*:7001"),
        ("denoiser-2", "a", "pool-a", 0, "tcp://10.0.0.1:7000", ""),
        ("denoiser-3", "a", "pool-a", 1, "tcp://10.0.0.1:7001", ""),
        ("decoder-0", "b", "pool-b", 0, "tcp://10.0.0.2:5563", "tcp://*:5563"),
        ("head", "c", "", 0, "tcp://[fd00::3]:5555", ""),
        ("api", "c", "", 0, "tcp://[fd00::3]:5564", ""),
    ]
    assert (topology.engine, topology.bus.transport, topology.head_host) == ("mooncake", "tcp", "c")
    assert [c.name for c in topology.on_host("c")] == ["head", "api"]
    assert topology.host_of(topology.component("pool-b")) == topology.hosts[1]
    assert topology.pool_bytes(topology.component("pool-a")) == 1 << 30
    assert [topology.zones(topology.component(f"pool-{name}")) for name in "ab"] == [
        ("encoder", "denoiser"),
        ("denoiser", "incoming"),
    ]
    assert topology.largest_payload == 128 << 20, "half of the smallest pool"
    assert [topology.transfer_ports(name) for name in "ab"] == [(21000, 21015), (21016, 21031)]
    with pytest.raises(UnknownNameError, match=r"no host is called 'd' in .*; there are a, b, c"):
        topology.on_host("d")
    book = AddressBook(topology)
    assert book.address("supervisor-b") == "tcp://10.0.0.2:5566"
    assert book.bind_address("supervisor-b") == "tcp://*:5566"
    assert book.bind_address("head") == book.address("head") == "tcp://[fd00::3]:5555"
    assert book.address("supervisor-b.children") == f"ipc://{topology.run_dir}/supervisor-b"
    assert book.component_of("supervisor-b.children") == "supervisor-b"
    assert book.supervisors() == ("supervisor-a", "supervisor-b", "supervisor-c")


def test_a_single_host_is_as_none_but_for_the_name_of_its_pool(write: Write) -> None:
    topology = load_topology(write(HOST_A))
    assert topology.component("head").address == f"ipc://{topology.run_dir}/head"
    assert {component.host for component in topology.components} == {"a"}
    assert topology.component("encoder-0").pool == "pool-a"
    assert topology.engine == "shm"
    assert AddressBook(topology).supervisors() == ()


def test_roles_on_one_of_several_hosts_share_memory(write: Write) -> None:
    roles = ON_HOSTS.replace('hosts = ["b", "a"]', 'host = "b"').replace('host = "a"', 'host = "b"')
    topology = load_topology(write(f'{HOST_A}{HOST_B}[head]\nhost = "a"\n', roles))
    assert (topology.engine, topology.bus.transport) == ("shm", "tcp")
    assert [c.name for c in topology.components if c.kind == "pool"] == ["pool-b"]


def test_an_explicit_port_counts_up_over_the_instances(write: Write) -> None:
    topology = load_topology(write(roles=THREE_ROLES.replace('"denoiser"', '"denoiser"\ncount = 3\nport = 7000')))
    assert [c.port for c in topology.components if c.kind == "denoiser"] == [7000, 7001, 7002]
    assert topology.component("decoder-0").port == 5561


MOONCAKE = '[transfer]\nengine = "mooncake"\ntrusted_network = true\n'


def test_mooncake_has_a_pool_for_each_kind_and_monolithic_none(write: Write) -> None:
    mooncake = load_topology(write(MOONCAKE))
    assert [c.name for c in mooncake.components if c.kind == "pool"] == [
        "pool-encoder",
        "pool-denoiser",
        "pool-decoder",
    ]
    assert mooncake.component("decoder-0").pool == "pool-decoder"
    alone = load_topology(write(roles='[[roles]]\nkind = "monolithic"\nname = "whole"\n'))
    assert [c.name for c in alone.components] == ["whole-0", "head", "api"]
    assert alone.component("whole-0").pool == ""


def test_several_models_have_roles_of_their_own(write: Write, folder: Path) -> None:
    named = '[[models]]\nname = "b"\npath = "b"\ndtype = "float32"\n[[models.roles]]\nkind = "monolithic"\nname = "b"\n'
    roles = THREE_ROLES.replace("[[roles]]", "[[models.roles]]")
    topology = load_topology(write(model=f'[[models]]\nname = "SD.1"\npath = "a"\n{roles}{named}', roles=""))
    assert [(c.name, c.model, c.pool, c.dtype) for c in topology.components] == [
        ("pool", "", "", ""),
        *((f"sd-1-{kind}-0", "SD.1", "pool", "bfloat16") for kind in ("encoder", "denoiser", "decoder")),
        ("b-0", "b", "", "float32"),
        ("head", "", "", ""),
        ("api", "", "", ""),
    ]
    first, second = topology.models
    assert (first.path, second.path) == (folder.resolve() / "a", folder.resolve() / "b")
    assert topology.model_of(topology.component("b-0")) == second
    assert first.prompt_cache_bytes == topology.transfer.pool_bytes // 8, "half of the quarter"
    assert second.prompt_cache_bytes == 0, "nothing is encoded apart"
    with pytest.raises(TopologyError, match=r'\[\[models\]\] "SD.1" path = "a" does not exist'):
        preflight(topology, topology.components)
    alone = load_topology(write(model=WHOLE.format("a"), roles=""))
    assert [c.name for c in alone.components] == ["monolithic-0", "head", "api"], "as with [model]"


def test_paths_are_relative_to_the_file_and_ipc_paths_fit(write: Write, folder: Path) -> None:
    topology = load_topology(write('[state]\npath = "kept"\n', model='[model]\npath = "models/x"\n'))
    assert topology.models[0].path == folder.resolve() / "models" / "x"
    assert topology.state_dir == folder.resolve() / "kept"
    assert topology.component("head").address == f"ipc://{topology.run_dir}/head"


def test_paths_follow_the_environment(write: Write, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write()
    by_default = load_topology(file)
    assert by_default.state_dir.parent == folder / "home" / "triptych"
    assert by_default.run_dir.parent == folder / "triptych"
    monkeypatch.setenv("TRIPTYCH_STATE_DIR", str(folder / "elsewhere"))
    assert load_topology(file).state_dir == folder / "elsewhere"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / ("long" * 20)))
    long_name = "x" * 32
    moved = load_topology(write(roles=THREE_ROLES.replace('"encoder"', f'"encoder"\nname = "{long_name}"\ncount = 99')))
    supervisor = AddressBook(moved).address(supervisor_of(f"{long_name}-98"))
    assert len(f"{supervisor.removeprefix('ipc://')}.1234567.") <= MAX_SOCKET_PATH


def test_two_topologies_share_neither_sockets_nor_state(write: Write, folder: Path) -> None:
    first = load_topology(write())
    copy = folder / "copy.toml"
    copy.write_text(first.path.read_text())
    second = load_topology(copy)
    assert first.run_dir != second.run_dir
    assert first.state_dir != second.state_dir


@pytest.mark.parametrize(
    ("text", "size"), [("256MiB", 256 << 20), ("1.5 GiB", 3 << 29), ("4096", 4096), ("7B", 7), ("2TiB", 2 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(("cache", "expected"), [("", 64 << 20), ("0", 0), ("128MiB", 128 << 20), ("64KiB", 64 << 10)])
def test_the_prompt_cache_is_a_quarter_of_the_pool_or_what_is_said(write: Write, cache: str, expected: int) -> None:
    model = f'[model]\npath = "."\nprompt_cache = "{cache}"\n'
    assert load_topology(write(model=model)).models[0].prompt_cache_bytes == expected
    whole = '[[roles]]\nkind = "monolithic"\n'
    assert load_topology(write(model=model, roles=whole)).models[0].prompt_cache_bytes == 0, "nothing is encoded apart"


@pytest.fixture
def topology(write: Write) -> Topology:
    return load_topology(write())


def test_the_address_book_knows_components_their_actors_and_supervisors(topology: Topology) -> None:
    address_book = AddressBook(topology, {"extra": "inproc://extra"})
    assert address_book.address("head") == topology.component("head").address
    assert address_book.address("encoder-0.transfer") == "inproc://encoder-0.transfer"
    assert address_book.address("supervisor") == f"ipc://{topology.run_dir}/supervisor"
    assert address_book.address("supervisor-head") == f"ipc://{topology.run_dir}/supervisor-head"
    assert address_book.address("extra") == "inproc://extra"
    for sender in ("head", "encoder-0.transfer", "supervisor", "supervisor-head", "extra"):
        assert address_book.component_of(sender) == sender.partition(".")[0]
    for sender in ("", "heads", "encoder-1", "supervisor-x", "head-supervisor", ".head", "test"):
        assert address_book.component_of(sender) == ""
    with pytest.raises(UnknownNameError, match="no actor is called 'heads'; known are api"):
        address_book.address("heads")
    with pytest.raises(UnknownNameError, match="no component is called 'x'"):
        topology.component("x")


def test_preflight_wants_the_model_folder(write: Write, folder: Path) -> None:
    topology = load_topology(write(model='[model]\npath = "nowhere"\n'))
    with pytest.raises(TopologyError, match=r'\[model\] path = "nowhere" does not exist'):
        preflight(topology, topology.components)
    preflight(topology, [topology.component("api")])
    (folder / "nowhere").write_text("")
    with pytest.raises(TopologyError, match="is a file"):
        preflight(topology, topology.components)


def test_preflight_wants_the_mooncake_wheel(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    topology = load_topology(write(MOONCAKE))
    with pytest.raises(TopologyError, match=r"needs the mooncake engine.*pip install"):
        preflight(topology, topology.components)
    preflight(load_topology(write()), topology.components[3:4])


def test_preflight_wants_what_the_store_needs_where_it_is_used(
    write: Write, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = load_topology(write(f'[store]\nurl = "{folder / "shared"}"\n'))
    api = [topology.component("api")]
    with pytest.raises(TopologyError, match="is not a folder that this user can write to: mount the file system"):
        preflight(topology, api)
    (folder / "shared").mkdir()
    preflight(topology, api)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    topology = load_topology(write('[store]\nurl = "s3://bucket/x"\n'))
    with pytest.raises(
        TopologyError, match=r"needs s3fs, which is missing: install it with pip install .triptych\[s3\]"
    ):
        preflight(topology, api)


def test_the_scheduler_of_a_model_is_a_table_of_options(write: Write) -> None:
    table = '[model.scheduler]\nclass = "euler"\nuse_karras_sigmas = true\nsigmas = [1, 0.5]\n'
    topology = load_topology(write(model=MODEL + "vae_tiling = true\n" + table))
    assert topology.models[0].section.scheduler == {"class": "euler", "use_karras_sigmas": True, "sigmas": (1, 0.5)}
    assert (topology.models[0].section.vae_tiling, topology.models[0].section.guider) == (True, {})


def test_weights_are_held_as_the_role_says_or_the_model(write: Write) -> None:
    roles = THREE_ROLES + 'dtype = "float32"\nquantization = "int8"\noffload = "group"\n'
    topology = load_topology(write(model=MODEL + 'dtype = "float16"\n', roles=roles))
    held = {c.name: (c.dtype, c.quantization, c.offload) for c in topology.components if c.slots}
    last = held.pop("decoder-0")
    assert last == ("float32", "int8", "group")
    assert set(held.values()) == {("float16", "none", "none")}


def test_steps_are_scheduled_and_batched_as_the_role_says(write: Write) -> None:
    denoiser = '"denoiser"\nslots = 8\nmax_batch = 8\npolicy = "fair"'
    topology = load_topology(write(roles=THREE_ROLES.replace('"denoiser"', denoiser)))
    stepping = {c.name: (c.policy, c.max_batch) for c in topology.components if c.slots}
    assert stepping == {"encoder-0": ("fifo", 1), "denoiser-0": ("fair", 8), "decoder-0": ("fifo", 1)}


def test_a_step_cache_is_part_of_what_a_model_is_known_by(write: Write, folder: Path) -> None:
    (folder / "model").mkdir(exist_ok=True)
    plain = load_topology(write()).models[0]
    cached = load_topology(write(roles=THREE_ROLES.replace('"denoiser"', '"denoiser"\ncache = "first_block:0.1"')))
    model = cached.models[0]
    assert (plain.step_cache, model.step_cache) == ("", "first_block:0.1")
    assert plain.identity is not None
    assert model.identity is not None
    assert (plain.identity.cache, model.identity.cache) == ("", "first_block:0.1")
    assert model.identity.is_same(plain.identity)


def test_preflight_wants_the_files_of_adapters(write: Write, folder: Path) -> None:
    topology = load_topology(write(model=MODEL + LORA + 'path_2 = "low"\n'))
    assert topology.models[0].section.lora[0].scale == 1.0
    with pytest.raises(TopologyError, match=r'\[\[model.lora\]\] path = "ink.safetensors" does not exist'):
        preflight(topology, topology.components)
    (folder / "ink.safetensors").touch()
    with pytest.raises(TopologyError, match=r'path_2 = "low" does not exist'):
        preflight(topology, topology.components)
    (folder / "low").mkdir()
    preflight(topology, topology.components)
    (folder / "ink.bin").touch()
    pickled = load_topology(write(model=MODEL + LORA.replace("ink.safetensors", "ink.bin")))
    with pytest.raises(TopologyError, match=r"is not a \.safetensors file.*since those can run code"):
        preflight(pickled, pickled.components)


def test_preflight_wants_torchao(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = load_topology(write(roles=THREE_ROLES + 'quantization = "float8"\n'))
    preflight(topology, topology.components)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r'needs torchao.*pip install "triptych\[quantization\]"'):
        preflight(topology, topology.components)
    preflight(topology, [topology.component("encoder-0")])


@pytest.mark.skipif(has_accelerator(), reason="this machine has one")
def test_preflight_wants_the_device(write: Write) -> None:
    topology = load_topology(write(roles=THREE_ROLES.replace('"denoiser"', '"denoiser"\ndevice = "cuda:1"')))
    with pytest.raises(TopologyError, match=r'device = "cuda:1" for denoiser-0.*use device = "cpu"'):
        preflight(topology, topology.components)


def test_an_accelerator_is_seen_by_its_device_file(folder: Path) -> None:
    assert not has_accelerator(folder)
    (folder / "nvidia0").touch()
    assert has_accelerator(folder)


def test_run_folders_are_private_all_the_way(folder: Path) -> None:
    (folder / "shared").mkdir(mode=0o777)
    run_dir = private_run_dir(folder / "shared" / "run")
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(run_dir.parent.stat().st_mode) == 0o700


def test_a_link_in_place_of_a_run_folder_is_refused(folder: Path) -> None:
    (folder / "theirs").mkdir()
    (folder / "run").symlink_to(folder / "theirs")
    with pytest.raises(PermissionError, match="does not belong to user"):
        private_dir(folder / "run")


@pytest.mark.parametrize(
    ("pool_size", "largest"),
    [("8KiB", 4 << 10), ("12287B", 4 << 10), ("16KiB", 8 << 10), ("256MiB", 128 << 20), ("1000MiB", 256 << 20)],
)
def test_a_payload_is_at_most_a_block_of_half_a_pool(pool_size: str, largest: int) -> None:
    assert largest_payload(parse_size(pool_size)) == largest


@pytest.mark.parametrize(
    ("hosts", "zones"),
    [
        ({"e": "a", "d": "a", "c": "a"}, {"a": ("encoder", "denoiser")}),
        ({"e": "a", "d": "b", "c": "c"}, {"a": ("encoder",), "b": ("denoiser", "incoming"), "c": ("incoming",)}),
        ({"e": "a", "d": "b", "c": "a"}, {"a": ("encoder", "incoming"), "b": ("denoiser", "incoming")}),
        ({"e": "ab", "d": "ab", "c": "a"}, dict.fromkeys("ab", ("encoder", "denoiser", "incoming"))),
        ({"e": "a", "d": "ab", "c": "b"}, {"a": ("encoder", "denoiser"), "b": ("denoiser", "incoming")}),
    ],
)
def test_what_may_wait_for_another_in_a_pool_has_a_zone_of_its_own(
    hosts: dict[str, str], zones: dict[str, tuple[str, ...]]
) -> None:
    kinds = {"e": "encoder", "d": "denoiser", "c": "decoder"}
    components = [
        Component(name=f"{kind}-{host}", kind=kinds[kind], address="", port=0, pool=f"pool-{host}")  # type: ignore[arg-type]
        for kind, names in hosts.items()
        for host in names
    ]
    assert {host: pool_zones(components, f"pool-{host}") for host in zones} == zones


def test_a_payload_fits_into_a_third_where_a_pool_has_three_zones() -> None:
    assert largest_payload(256 << 20, 3) == 64 << 20
    assert largest_payload(256 << 20, 1) == 128 << 20, "it may go on into a pool with two"


def test_an_earlier_name_of_a_key_is_read_with_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "t.toml"
    file.write_text(f'[model]\npath = "m"\n[head]\nqueue = 7\n{THREE_ROLES}')
    with pytest.raises(TopologyError, match="has no key called queue"):
        load_topology(file)
    monkeypatch.setattr(HeadSection, "earlier_names", {"queue": "max_pending"})
    with structlog.testing.capture_logs() as logs:
        assert load_topology(file).head.max_pending == 7
    assert [(line["key"], line["write"], line["log_level"]) for line in logs] == [("queue", "max_pending", "warning")]
    file.write_text(f'[model]\npath = "m"\n[head]\nqueue = 7\nmax_pending = 8\n{THREE_ROLES}')
    with pytest.raises(TopologyError, match="has both max_pending and queue, its earlier name: remove queue"):
        load_topology(file)
