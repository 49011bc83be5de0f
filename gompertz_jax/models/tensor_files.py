"""Named tensors on disk: PyTorch's `.pth` and `.pt`, both of its formats, and `.safetensors`. PyTorch is not needed.

A `.pth` file is a pickle, and to load a pickle is to run what it says. This reader knows a dozen names (how PyTorch
rebuilds a tensor, its storages, plain containers) and refuses every other by name, so nothing in the file is executed.

PyTorch's formats: https://github.com/pytorch/pytorch/blob/main/torch/serialization.py. The other:
https://github.com/huggingface/safetensors#format.
"""

import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_SAFETENSORS = {
    "F32": "float32",
    "F64": "float64",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_NESTED = ("state_dict", "model", "net", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel's, torch.compile's


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The state dict of a file, found under the keys by which training programs wrap it.

    Args:
      path: `.pth` or `.pt` of any PyTorch since 0.4, or `.safetensors`; the content shows which one.

    Returns:
      Arrays by name, in the file's dtypes (bfloat16 too), without the prefixes of DataParallel and `torch.compile`.

    Raises:
      ValueError: the file is none of these, is damaged, names anything but tensors and plain containers, or holds no
        state dict.
      OSError: it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
            file.seek(0)
            if start.startswith(b"PK\x03\x04"):
                tensors = _read_zip(file)
            elif start[8:] == b"{":
                tensors = _read_safetensors(file)
            else:
                tensors = _read_legacy(file)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{path} cannot be read as tensors: {error}") from error
    for prefix in _PREFIXES * 2:  # either may be inside the other
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


# --- PyTorch ----------------------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    key: str
    dtype: str
    offset: int = 0


class _Tensor(NamedTuple):
    """What a tensor is in the pickle: a view of a storage that is not read yet; in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Inert:
    """What a name in a pickle stands for: a class, never a function.

    A pickle can write into the object that it has named (BUILD): into a function's attributes, for the whole process.
    Of these classes and of their instances it finds this method first, which changes nothing.
    """

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict(_Inert, dict):
    """An OrderedDict without the attributes that PyTorch gives it."""


class _Ignored(_Inert):
    """What training programs keep beside the weights (settings, scores): taken in, and left unread."""

    def __new__(cls, *_: Any) -> "_Ignored":
        return super().__new__(cls)


class _Rebuilt(_Inert):
    def __new__(cls, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
        numbers = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("a tensor in it is not described by a storage and sizes")
        return _Tensor(storage, offset + storage.offset, tuple(size), tuple(stride))


class _Parameter(_Inert):
    def __new__(cls, tensor: Any, *_: Any) -> Any:
        return tensor


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _Rebuilt,
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuilt,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("argparse", "Namespace"): _Ignored,
    ("numpy", "dtype"): _Ignored,
    ("numpy.core.multiarray", "scalar"): _Ignored,
    ("numpy._core.multiarray", "scalar"): _Ignored,
    ("_codecs", "encode"): _Ignored,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedIOBase):
        super().__init__(file, encoding="utf-8")
        self.dtypes: dict[str, str] = {}  # of every storage, also of those that are not read

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise ValueError(
                f"it names {module}.{name}, which is neither a tensor nor a plain container, so it was not read "
                "further; save the state dict alone: torch.save(model.state_dict(), FILE)"
            )
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, _, *view = pid
        if kind != "storage" or dtype not in _STORAGES.values():
            raise ValueError(f"it refers to something other than a storage of numbers ({kind!r})")
        self.dtypes[str(key)] = dtype
        return _Storage(str(key), dtype, view[0][1] if view and view[0] else 0)


def _state_dict(content: Any) -> dict[str, _Tensor]:
    for _ in range(4):
        if not isinstance(content, dict):
            raise ValueError("it holds no state dict")
        inner = [content[key] for key in _NESTED if isinstance(content.get(key), dict)]
        if not inner:
            break
        content = inner[0]
    tensors = {str(name): item for name, item in content.items() if isinstance(item, _Tensor)}
    if not tensors:
        keys = ", ".join(map(repr, content)) or "nothing"
        raise ValueError(f"it holds no state dict at its top or under {', '.join(_NESTED)}, but {keys}")
    return tensors


def _view(tensor: _Tensor, data: bytes, order: Literal["<", ">"]) -> np.ndarray:
    storage = np.frombuffer(data, _dtype(tensor.storage.dtype).newbyteorder(order))
    size, stride = tensor.size, tensor.stride
    reach = tensor.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if math.prod(size) > storage.size or (math.prod(size) and reach > storage.size):
        raise ValueError(
            f"a tensor of shape {size} reaches beyond its storage of {storage.size} elements: it is cut off"
        )
    strides = [step * storage.itemsize for step in stride]
    view = np.lib.stride_tricks.as_strided(storage[tensor.offset :], size, strides, writeable=False)
    return np.ascontiguousarray(view).reshape(size).astype(_dtype(tensor.storage.dtype), copy=False)


def _dtype(name: str) -> np.dtype:
    return jnp.dtype(name)


def _read_zip(file: io.BufferedIOBase) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "data.pkl" not in entries:
            raise ValueError("it is a zip archive without a data.pkl, so no file that torch.save wrote")
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
            raise ValueError("it is compressed, as no file is that torch.save wrote")
        tensors = _state_dict(_Unpickler(io.BytesIO(archive.read(entries["data.pkl"]))).load())
        big = "byteorder" in entries and archive.read(entries["byteorder"]) == b"big"
        return {
            name: _view(tensor, archive.read(entries[f"data/{tensor.storage.key}"]), ">" if big else "<")
            for name, tensor in tensors.items()
        }


def _read_legacy(file: io.BufferedIOBase) -> dict[str, np.ndarray]:
    """PyTorch before 1.6: five pickles in a row, then every storage as its element count and its bytes."""
    if not file.read(1) == b"\x80":
        raise ValueError("it is neither a file of torch.save nor of safetensors")
    file.seek(0)
    if _Unpickler(file).load() != _LEGACY_MAGIC:
        raise ValueError("it is a pickle, but none that torch.save wrote")
    _version, system = _Unpickler(file).load(), _Unpickler(file).load()
    order = "<" if system.get("little_endian", True) else ">"
    unpickler = _Unpickler(file)
    tensors = _state_dict(unpickler.load())
    keys, storages = _Unpickler(file).load(), {}
    rest = memoryview(file.read())
    for key in keys:
        (count,) = struct.unpack(order + "q", rest[:8])
        end = 8 + count * _dtype(unpickler.dtypes[key]).itemsize
        if not 8 <= end <= len(rest):
            raise ValueError(f"storage {key} is cut off")
        storages[key], rest = bytes(rest[8:end]), rest[end:]
    return {name: _view(tensor, storages[tensor.storage.key], order) for name, tensor in tensors.items()}


def write_torch(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write float32 arrays as the state dict that `torch.load(path, weights_only=True)` reads."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    # Protocol 2, a dict: name -> _rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())
    items = []
    for index, (name, array) in enumerate(tensors.items()):
        stride = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(index)) + text("cpu")
        storage += b"J" + struct.pack("<i", array.size) + b"tQ"
        arguments = storage + b"K\x00" + numbers(array.shape) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)R"
        items.append(text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}(" + b"".join(items) + b"u.")
        archive.writestr("archive/byteorder", "little")
        for index, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{index}", np.ascontiguousarray(array, "<f4").tobytes())
        archive.writestr("archive/version", "3\n")


# --- safetensors ------------------------------------------------------------------------------------------------------


def _read_safetensors(file: io.BufferedIOBase) -> dict[str, np.ndarray]:
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(length))
    data, tensors = file.read(), {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        (start, end), shape = entry["data_offsets"], tuple(entry["shape"])
        if entry["dtype"] not in _SAFETENSORS:
            raise ValueError(f"{name} is of dtype {entry['dtype']}; known are {', '.join(_SAFETENSORS)}")
        dtype = _dtype(_SAFETENSORS[entry["dtype"]])
        if not 0 <= start <= end <= len(data) or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} does not lie where the header says: it is cut off")
        array = np.frombuffer(data[start:end], dtype.newbyteorder("<")).reshape(shape)
        tensors[name] = array.astype(dtype, copy=False)
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write float32 arrays as a safetensors file, with metadata of strings."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": (offset, offset + 4 * array.size)}
        offset += 4 * array.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array, "<f4").tobytes())
