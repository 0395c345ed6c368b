"""A topology that cannot work is refused in one sentence that names the file, the key and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.actors.conftest import THREE_ROLES
from tests.actors.topology.topology_texts import HOST_A, HOST_B, LORA, MODEL, ON_HOSTS, TRUSTED, WHOLE
from triptych.actors import TopologyError, load_topology

Write = Callable[..., Path]


TWO = WHOLE.format("a") + WHOLE.format("B.1")


TWICE = THREE_ROLES + '[[roles]]\nkind = "denoiser"\n'


BROKEN = {
    "not TOML": (MODEL + "[api\n", "is not TOML", "line 3"),
    "no model": (THREE_ROLES, "has no [model] section", 'path = "the folder of a model"'),
    "unknown section": (
        MODEL + "[supervison]\n" + THREE_ROLES,
        "[supervison] is not a section",
        "did you mean supervision?",
    ),
    "a log of no size": (
        MODEL + '[state]\nlog_size = "much"\n' + THREE_ROLES,
        '[state] log_size = "much" is not a size',
        'write it as in "4MiB", or "0" for none',
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
    "no receiver of traces": (
        MODEL + '[otel]\nendpoint = "127.0.0.1:4318"\n' + THREE_ROLES,
        '[otel] endpoint = "127.0.0.1:4318" is not a URL',
        "http://127.0.0.1:4318",
    ),
    "more than all": (MODEL + "[otel]\nsample = 1.5\n" + THREE_ROLES, "[otel] sample", "a number from 0 to 1"),
    "no host": (
        MODEL + '[api]\nallowed_hosts = ["http://a"]\n' + THREE_ROLES,
        'allowed_hosts have "http://a"',
        "write a name alone",
    ),
    "no list of hosts": (MODEL + '[api]\nallowed_hosts = "a"\n' + THREE_ROLES, "does not fit", "a list of host names"),
    "no host of a webhook": (
        MODEL + '[webhooks]\nhosts = ["https://a"]\n' + THREE_ROLES,
        '[webhooks] hosts have "https://a", which is not a host name, an address or a network',
        '"10.0.0.0/8"',
    ),
    "webhooks without a secret": (
        MODEL + '[webhooks]\nhosts = ["a", "*.b.c", "10.0.0.0/8", "::1"]\n' + THREE_ROLES,
        "has hosts, and no secret to sign with",
        "add keys_file",
    ),
    "webhooks for longer than requests": (
        MODEL + '[webhooks]\nhosts = ["a"]\nkeys_file = "k"\ngive_up_s = 1e9\n' + THREE_ROLES,
        "give_up_s = 1e+09 is longer than ended requests are kept",
        "at most [state] keep_requests_s = 86400",
    ),
    "no rate": (MODEL + '[api]\nrate_limit = "many"\n' + THREE_ROLES, 'rate_limit = "many" is not a rate', '"60/min"'),
}


HOSTS = MODEL + HOST_A + HOST_B + '[head]\nhost = "a"\n'


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
