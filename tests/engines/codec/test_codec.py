from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
from collections import OrderedDict
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from triptych.engines.codec import codec
from triptych.engines.codec import manifest as m
from triptych.engines.codec.codec import ALIGNMENT, CodecError, pack, register_dataclass, unpack

CPU = torch.device("cpu")
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def block_of(values: dict[str, object]) -> tuple[bytes, torch.Tensor]:
    packed = pack(values)
    block = torch.full((packed.nbytes,), 0xA5, dtype=torch.uint8)
    packed.copy_to(block)
    return packed.manifest, block


def round_trip(value: object) -> Any:
    manifest, block = block_of({"value": value})
    return unpack(manifest, block, CPU)["value"]


def alike(left: Any, right: Any) -> bool:
    """Same types all the way down, and same bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return bool(left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right))
    if isinstance(left, (np.ndarray, np.generic)):
        return bool(left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes())
    if isinstance(left, Image.Image):
        return (left.mode, left.size, left.tobytes()) == (right.mode, right.size, right.tobytes())
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(alike, left, right))
    if isinstance(left, dict):
        return alike(list(left), list(right)) and alike(list(left.values()), list(right.values()))
    if isinstance(left, float) and math.isnan(left):
        return math.isnan(right)
    return bool(left == right)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(sorted(codec.DTYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    size = codec.DTYPES[dtype].itemsize * math.prod(shape)
    high = 1 if dtype == "bool" else 255
    data = draw(st.lists(st.integers(0, high), min_size=size, max_size=size))
    tensor = torch.tensor(data, dtype=torch.uint8).view(codec.DTYPES[dtype]).reshape(shape)
    if tensor.dim() > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, -1)
    return tensor


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    dtype = np.dtype(draw(st.sampled_from(sorted(codec.ARRAY_DTYPES))))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = dtype.itemsize * math.prod(shape)
    high = 1 if dtype == np.bool_ else 255
    data = bytearray(draw(st.lists(st.integers(0, high), min_size=size, max_size=size)))
    array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, data)
    return array.T if draw(st.booleans()) else array


@st.composite
def images(draw: st.DrawFn) -> Image.Image:
    mode = draw(st.sampled_from(sorted(codec.BITS_PER_PIXEL)))
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 5)))
    length = codec.image_bytes(mode, *size)
    data = draw(st.binary(min_size=length, max_size=length))
    return Image.frombytes(mode, size, data)


keys = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
bounds = st.none() | st.integers(-(2**62), 2**62)
slices = st.builds(slice, bounds, bounds, bounds)
values = st.recursive(
    scalars | slices | tensors() | arrays() | images() | dtypes,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=8,
)


@quick
@given(values)
def test_what_goes_in_comes_out(value: object) -> None:
    assert alike(round_trip(value), value)


@pytest.mark.parametrize("name", sorted(codec.DTYPES))
def test_every_dtype_crosses_in_every_form(name: str) -> None:
    dtype = codec.DTYPES[name]
    dense = (torch.arange(6 * dtype.itemsize) % 2).to(torch.uint8).view(dtype).reshape(2, 3)
    for tensor in (dense, dense.t(), dense[:, 1:], dense[0, 0], dense[:0], dense.expand(4, 2, 3)):
        assert alike(round_trip(tensor), tensor)


def test_views_with_a_lazy_conjugate_or_minus_sign_arrive_as_what_they_mean() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    assert round_trip(tensor.conj()).tolist() == [1 - 2j, 3 + 4j]
    assert round_trip(tensor.conj().imag).tolist() == [-2, 4]


def test_a_generator_goes_on_where_it_was() -> None:
    generator = torch.Generator().manual_seed(5)
    torch.randn(1000, generator=generator)
    arrived = round_trip(generator)
    assert arrived.device == CPU
    assert torch.equal(torch.randn(100, generator=arrived), torch.randn(100, generator=generator))


def test_numpy_scalars_stay_scalars() -> None:
    for value in (np.float32(0.1), np.int64(-3), np.bool_(True), np.complex64(1j)):
        arrived = round_trip(value)
        assert type(arrived) is type(value)
        assert arrived == value


@register_dataclass
@dataclasses.dataclass
class Reference:
    pixels: torch.Tensor
    weight: float = 1.0
    area: int = dataclasses.field(init=False, default=0)


@dataclasses.dataclass
class Stranger:
    secret: str = ""


def test_dataclasses_cross_if_they_are_on_the_list() -> None:
    (arrived,) = round_trip([Reference(torch.arange(3), 0.5)])
    assert type(arrived) is Reference
    assert (arrived.pixels.tolist(), arrived.weight) == ([0, 1, 2], 0.5)
    with pytest.raises(CodecError, match=r"payload\['value'\]\[0\] is a .*Stranger"):
        round_trip([Stranger()])
    with pytest.raises(TypeError, match="not a dataclass"):
        register_dataclass(int)


def test_the_references_of_diffusers_are_on_the_list() -> None:
    from diffusers.modular_pipelines.minimax_h3.references import MiniMaxH3AudioReference
    from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
    from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

    action = CosmosActionCondition("policy", 4, "pusht", image=np.zeros((2, 2, 3), np.uint8))
    for value in (LTX2VideoCondition([Image.new("RGB", (2, 2))], index=1), LTX2ReferenceCondition([]), action):
        same = round_trip(value)
        assert type(same) is type(value)
        assert vars(same).keys() == vars(value).keys()
    arrived = round_trip(MiniMaxH3AudioReference(audio=torch.zeros(2, 8), sample_rate=16))
    assert type(arrived) is MiniMaxH3AudioReference
    assert (arrived.audio.shape, arrived.sample_rate) == ((2, 8), 16)


class Pair(NamedTuple):
    left: int
    right: int


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({1, 2}, "set"),
        (object(), "object"),
        (print, "builtin_function_or_method"),
        (Pair(1, 2), "Pair"),
        (Colour.RED, "Colour"),
        (OrderedDict(a=1), "OrderedDict"),
        (torch.nn.Parameter(torch.zeros(2)), "Parameter"),
        (torch.zeros(2, 2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.zeros(1).to(torch.int8).view(torch.int8), None),
        (np.array([object()]), "object"),
        (np.array(["text"]), "<U4"),
        (np.ma.masked_array([1]), "MaskedArray"),
        (Image.new("P", (2, 2)), 'mode "P"'),
        (Image.new("RGB", (0, 2)), "without pixels"),
        (torch.device("cpu"), "device"),
        (1j, "complex"),
        (range(3), "range"),
        (slice("a", None), "only a slice of integers"),
        (slice(0, 2**63), "only a slice of integers"),
        ("\ud800", "Unicode"),
        (1 << 100_000, "100001 bits"),
    ],
    ids=lambda value: "",
)
def test_what_cannot_cross_is_refused_by_path_and_type(value: object, kind: str | None) -> None:
    if kind is None:
        assert alike(round_trip(value), value)
        return
    with pytest.raises(CodecError) as refusal:
        pack({"deep": [0, {"x": value}]})
    assert "payload['deep'][1]['x']" in str(refusal.value)
    assert kind in str(refusal.value)


def test_keys_that_are_no_scalars_are_refused() -> None:
    with pytest.raises(CodecError, match=r"payload\['a'\] has the key \(1,\) of type tuple"):
        pack({"a": {(1,): 2}})


def test_a_payload_that_holds_itself_or_is_too_big_for_a_message_is_refused() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(CodecError, match="deeper than 32"):
        pack({"loop": loop})
    with pytest.raises(CodecError, match="put long lists of numbers into a tensor"):
        pack({"long": [0.5] * 100_000})


def test_the_layout_is_aligned_in_order_and_without_older_bytes() -> None:
    packed = pack({"a": torch.ones(3, dtype=torch.uint8), "b": b"xy", "c": torch.ones(2), "e": torch.empty(0)})
    assert packed.offsets == (0, ALIGNMENT, 2 * ALIGNMENT, 3 * ALIGNMENT)
    assert packed.nbytes == 3 * ALIGNMENT
    block = torch.full((packed.nbytes + 5,), 0xA5, dtype=torch.uint8)
    packed.copy_to(block)
    assert not block[3:ALIGNMENT].any()
    assert block[packed.nbytes :].tolist() == [0xA5] * 5
    with pytest.raises(CodecError, match="the block has 100"):
        packed.copy_to(block[:100])
    with pytest.raises(CodecError, match="dense uint8"):
        packed.copy_to(torch.zeros(1000))


def test_a_dense_tensor_is_not_copied_when_it_is_packed() -> None:
    tensor = torch.arange(100.0)
    assert pack({"a": tensor}).tensors[0].data_ptr() == tensor.data_ptr()


def test_what_was_unpacked_survives_the_block() -> None:
    state: dict[str, object] = {
        "tensor": torch.arange(9.0),
        "array": np.arange(5),
        "image": Image.new("RGB", (3, 3), (1, 2, 3)),
        "bytes": b"abc",
        "generator": torch.Generator().manual_seed(1),
    }
    manifest, block = block_of(state)
    arrived = unpack(manifest, block, CPU)
    block.zero_()
    generator = arrived.pop("generator")
    assert isinstance(generator, torch.Generator)
    assert torch.equal(torch.randn(3, generator=generator), torch.randn(3, generator=torch.Generator().manual_seed(1)))
    state.pop("generator")
    assert alike(arrived, state)
    array = arrived["array"]
    assert isinstance(array, np.ndarray)
    array[0] = 7  # It may be written, as the one that was sent.


def test_a_generator_of_another_kind_of_device_is_refused() -> None:
    state = torch.zeros(16, dtype=torch.uint8)
    manifest = m.encode(m.Manifest(m.VERSION, 16, m.Dict((("g", m.Generator("cuda", m.Span(0, 16))),))))
    with pytest.raises(CodecError, match='a "cuda" device'):
        unpack(manifest, state, CPU)


# Hostile bytes ----------------------------------------------------------------------------------------------------

BLOCK = torch.zeros(8192, dtype=torch.uint8)


def hostile(data: bytes) -> None:
    """Whatever the bytes are, they are read or refused."""
    with contextlib.suppress(CodecError):
        assert isinstance(unpack(data, BLOCK, CPU), dict)


@quick
@given(st.binary(max_size=200))
@example(b"")
@example(b"\x93\x01\x00\x92\xa4dict\xdd\xff\xff\xff\xff")
@example(b"\x93\x01\x00" + b"\x92\xa4list\x91" * 100_000)
def test_garbage_is_refused(data: bytes) -> None:
    hostile(data)


@settings(parent=quick, max_examples=400)
@given(values, st.data())
def test_a_manifest_with_flipped_bytes_is_read_or_refused(value: object, data: st.DataObject) -> None:
    manifest = bytearray(pack({"value": value}).manifest)
    for _ in range(data.draw(st.integers(1, 4))):
        manifest[data.draw(st.integers(0, len(manifest) - 1))] = data.draw(st.integers(0, 255))
    hostile(bytes(manifest))
    hostile(bytes(manifest[: data.draw(st.integers(0, len(manifest)))]))


sizes = st.integers(0, 300) | st.sampled_from([2**31, 2**32, 2**47, 2**48, 2**62])
spans = st.builds(m.Span, st.integers(0, 8192) | sizes, sizes)
shapes = st.lists(sizes, max_size=5).map(tuple)
names = st.sampled_from([*codec.ALL_DTYPES, *codec.ARRAY_DTYPES, *codec.BITS_PER_PIXEL, "os", "|O", ""])
nodes = st.one_of(
    st.builds(m.Tensor, names, shapes, spans),
    st.builds(m.Array, names, shapes, st.booleans(), spans),
    st.builds(m.ImageRecord, names, sizes, sizes, spans),
    st.builds(m.Bytes, spans),
    st.builds(m.Text, spans),
    st.builds(m.Generator, st.sampled_from(["cpu", "cuda", "cuda:7", "meta", "", "x"]), spans),
    st.builds(m.BigInteger, st.text(max_size=9)),
    st.builds(m.DType, names),
    st.builds(m.Slice, sizes, sizes, sizes),
    st.builds(
        m.Dataclass, st.sampled_from(["os.system", Reference.__module__ + ".Reference", "builtins.eval"]), st.just(())
    ),
)


@settings(parent=quick, max_examples=400)
@given(st.lists(nodes, max_size=4))
def test_well_formed_but_false_manifests_are_read_or_refused(lies: list[m.Node]) -> None:
    content = m.Manifest(m.VERSION, BLOCK.numel(), m.Dict((("value", m.List(tuple(lies))),)))
    hostile(msgspec.msgpack.encode(content))


def lie(*items: m.Node, nbytes: int = 8192) -> bytes:
    return m.encode(m.Manifest(m.VERSION, nbytes, m.Dict(tuple((str(i), item) for i, item in enumerate(items)))))


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        (lie(nbytes=8193), "the block has 8192"),
        (lie(m.Bytes(m.Span(0, 100)), m.Bytes(m.Span(64, 8))), "not a free, aligned part"),
        (lie(m.Bytes(m.Span(8, 8))), "not a free, aligned part"),
        (lie(m.Bytes(m.Span(8128, 65))), "not a free, aligned part"),
        (lie(m.Tensor("float32", (2,), m.Span(0, 12))), "does not take 12 bytes"),
        (lie(m.Tensor("float32", (2**40, 2**40, 0), m.Span(0, 0))), "does not take 0 bytes"),
        (lie(m.Tensor("qint8", (2,), m.Span(0, 2))), "'qint8' is not a dtype"),
        (lie(m.Tensor("uint8", (2, 1), m.Span(0, 2), (0, 0))), "is not an order of 2 dimensions"),
        (lie(m.Tensor("uint8", (2, 1), m.Span(0, 2), (0, 1, 2))), "is not an order of 2 dimensions"),
        (lie(m.Tensor("nn", (2,), m.Span(0, 2))), "'nn' is not a dtype"),
        (lie(m.Array("|O", (1,), False, m.Span(0, 8))), "cannot be unpacked"),
        (lie(m.ImageRecord("RGB", 2**20, 2**20, m.Span(0, 8))), "does not take 8 bytes"),
        (lie(m.ImageRecord("P", 2, 4, m.Span(0, 8))), 'mode "P"'),
        (lie(m.Generator("cpu", m.Span(0, 5056))), "not valid"),
        (lie(m.Generator("cpu", m.Span(0, 3))), "not valid"),
        (lie(m.BigInteger("os")), "not a hexadecimal number"),
        (lie(m.DType("Tensor")), "not a dtype"),
        (lie(m.Dataclass("os.system", (("command", "true"),))), "may be sent"),
        (lie(m.Dataclass("diffusers.modular_pipelines.minimax_h3.references.MiniMaxH3ImageReference", ())), "made of"),
        (m.encode(m.Manifest(1, 0, m.Dict(()))), "version 1"),
        (m.encode(m.Manifest(m.VERSION, 0, m.Dict(((1, 2),)))), "must be strings"),
        (b"\xc0" * (m.MAX_MANIFEST_BYTES + 1), "over the limit"),
    ],
)
def test_each_false_manifest_is_refused_for_its_reason(manifest: bytes, reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        unpack(manifest, BLOCK, CPU)


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(CodecError, match="not UTF-8"):
        unpack(lie(m.Text(m.Span(0, 4))), torch.full((8192,), 0xFF, dtype=torch.uint8), CPU)
