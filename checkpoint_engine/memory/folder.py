"""Which files and tensors a checkpoint consists of, how ranks share them, and who may open them.

Imports no torch, so that the command line starts quickly.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import IO, Any

INDEX = ".safetensors.index.json"
"""How the name of an index ends. An index says which file of its folder holds which tensor."""
_USUAL_INDEX = f"model{INDEX}"
_MAX_INDEX = 100_000_000
"""Bytes; as many as a safetensors header may have."""

Path = str | os.PathLike[str]
Folders = Sequence[str] | None
"""Where files must lie, as real paths; ``None``: anywhere."""
Inode = tuple[int, int]
"""What a path led to: device and inode number."""


class MissingFileError(FileNotFoundError, ValueError):
    """A folder or a file of a checkpoint does not exist."""


@dataclass(frozen=True)
class Assigned:
    """The tensors that an index assigns to one file."""

    index: str
    names: frozenset[str]


# Choosing files


def checkpoint_of(folder: Path, allowed: Folders = None) -> list[str]:
    """The files of the checkpoint in a folder, sorted.

    With an index: the index, then the files that it names. ``open_files`` takes from these only the
    tensors that the index assigns to them. Without an index: all safetensors files, or all ``.npy``
    files if there is no safetensors file.

    Raises:
        AccessError: the folder lies outside ``allowed``.
        ValueError: there is no such folder (also a ``FileNotFoundError``), it holds no checkpoint
            or several indexes, a file that the index names is missing, or the index is malformed.
    """
    path = os.fspath(folder)
    names = _list_folder(path, allowed)
    index = _choose_index(path, [name for name in names if name.endswith(INDEX)])
    if index is not None:
        files = sorted(read_index(index, allowed))
        missing = [file for file in files if not os.path.exists(file)]
        if missing:
            raise MissingFileError(f"{index} names {missing[0]}, which does not exist")
        return [index, *files]
    for suffix in (".safetensors", ".npy"):
        if found := [os.path.join(path, name) for name in names if name.endswith(suffix)]:
            return found
    raise ValueError(f"{path} holds no *.safetensors files")


def expand_folders(paths: Iterable[Path], allowed: Folders = None) -> list[str]:
    """``paths``, in which ``checkpoint_of`` replaces each folder. Files are not looked at.

    Raises:
        AccessError, ValueError: as ``checkpoint_of``.
    """
    files: list[str] = []
    for given in paths:
        path = os.fspath(given)
        is_file = path.endswith((".safetensors", ".npy", INDEX))
        files += [path] if is_file else checkpoint_of(path, allowed)
    return files


def split_over_ranks(files: Sequence[str], world_size: int) -> list[list[str]]:
    """The files that each rank owns, about as many as the others, with the indexes about them.

    All ``.npy`` files go to one rank: one tensor may be spread over several of them.

    Raises:
        ValueError: as ``assigned_tensors``.
    """
    assigned = assigned_tensors(files)
    units = [[file] for file in files if not file.endswith((".npy", INDEX))]
    if arrays := [file for file in files if file.endswith(".npy")]:
        units.append(arrays)
    bounds = [rank * len(units) // world_size for rank in range(world_size + 1)]
    shares = [list(chain(*units[begin:end])) for begin, end in pairwise(bounds)]
    return [with_indexes(share, assigned) for share in shares]


def with_indexes(files: Sequence[str], assigned: Mapping[str, Assigned]) -> list[str]:
    """``files``, behind the indexes that are about them."""
    indexes = dict.fromkeys(assigned[file].index for file in files if file in assigned)
    return [*indexes, *files]


def _list_folder(path: str, allowed: Folders) -> list[str]:
    known = "known are .safetensors and .npy"
    try:
        fd = _open_below(path, os.O_DIRECTORY, allowed)
    except FileNotFoundError:
        raise MissingFileError(
            f"{path}: not a checkpoint file ({known}), and there is no such folder"
        ) from None
    except NotADirectoryError:
        raise ValueError(f"{path}: not a checkpoint file; {known}") from None
    except OSError as error:
        raise ValueError(f"folder {path} cannot be opened: {error.strerror}") from error
    try:
        return sorted(os.listdir(fd))
    finally:
        os.close(fd)


def _choose_index(folder: str, names: list[str]) -> str | None:
    chosen = [_USUAL_INDEX] if _USUAL_INDEX in names else names
    if len(chosen) > 1:
        raise ValueError(
            f"{folder} has {len(names)} indexes ({', '.join(names)}) and none is {_USUAL_INDEX}: "
            f"keep one, or name the files"
        )
    return os.path.join(folder, chosen[0]) if chosen else None


# Indexes


def read_index(index: str, allowed: Folders = None) -> dict[str, frozenset[str]]:
    """The names of the tensors that an index assigns to each file of its folder.

    Raises:
        AccessError: the index lies outside ``allowed``.
        ValueError: it is malformed, assigns nothing, or names a file outside its folder.
    """
    data = read_whole(index, allowed, _MAX_INDEX)
    try:
        weight_map = json.loads(data, object_pairs_hook=unique_keys)["weight_map"]
        entries = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from error
    if not entries:
        raise ValueError(f"{index} assigns no tensor to any file")
    names: defaultdict[str, set[str]] = defaultdict(set)
    for name, entry in entries:
        names[_shard(index, name, entry)].add(name)
    return {file: frozenset(assigned) for file, assigned in names.items()}


def _shard(index: str, name: str, entry: Any) -> str:
    """The path of the file that an index names for a tensor."""
    if not isinstance(entry, str) or not entry.endswith(".safetensors") or "\0" in entry:
        raise ValueError(f"{index}: tensor {name!r} is in {short(entry)}: no safetensors file")
    place = os.path.normpath(entry)
    if os.path.isabs(place) or place.split(os.sep)[0] == os.pardir:
        raise ValueError(
            f"{index}: tensor {name!r} is in {short(entry)}, which is outside the index's folder"
        )
    return os.path.join(os.path.dirname(index), place)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ``ValueError`` if a key is in it twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} is in it twice")
    return result


def assigned_tensors(files: Sequence[str], allowed: Folders = None) -> dict[str, Assigned]:
    """What the indexes among ``files`` assign to other files among them. All tensors of the files
    that are missing in the result count.

    Raises:
        AccessError, ValueError: as ``read_index``; two indexes are about one file, or an index
            comes without any of its files.
    """
    found: dict[str, Assigned] = {}
    for index in dict.fromkeys(file for file in files if file.endswith(INDEX)):
        named = {_same_form(f): Assigned(index, n) for f, n in read_index(index, allowed).items()}
        mine = {file: named[form] for file in files if (form := _same_form(file)) in named}
        if not mine:
            raise ValueError(f"{index} comes without the files that it names: name its folder")
        for file in mine.keys() & found.keys():
            raise ValueError(f"{file} is in both {found[file].index} and {index}")
        found |= mine
    return found


def _same_form(file: str) -> str:
    """Paths that differ only in how their folder is written become equal. The file itself may be a
    link: Hugging Face's cache links all files of a folder to other folders."""
    folder, name = os.path.split(file)
    return os.path.join(os.path.realpath(folder), name)


# Opening files


def open_file(path: str, allowed: Folders) -> IO[bytes]:
    """Opens a regular file."""
    try:
        # Without O_NONBLOCK, a FIFO would wait for somebody to write to it.
        fd = _open_below(path, os.O_NONBLOCK, allowed)
    except FileNotFoundError:
        raise MissingFileError(f"checkpoint file {path} does not exist") from None
    except OSError as error:
        raise ValueError(f"checkpoint file {path} cannot be opened: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"checkpoint file {path} cannot be opened: it is no regular file")
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_whole(path: str, allowed: Folders, most: int) -> bytes:
    """All bytes of a file. Raises ``ValueError`` if there are more than ``most``."""
    with open_file(path, allowed) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path}: has more than {most} bytes")
    return data


def _open_below(path: str, flags: int, allowed: Folders) -> int:
    """A descriptor to read from what lies in ``allowed``, or is one of these folders.

    The second check is of what was opened: a link that changes after the first changes nothing.
    """
    _check_below(path, os.path.realpath(path), allowed)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        _check_below(path, os.readlink(f"/proc/self/fd/{fd}"), allowed)
        _check_links(path, os.fstat(fd), allowed)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_below(path: str, real_path: str, allowed: Folders) -> None:
    if allowed is None:
        return
    if not any(f"{real_path}/".startswith(f"{folder.rstrip('/')}/") for folder in allowed):
        raise _refusal(f"{path} does not lie in a folder that may be registered from")


def _check_links(path: str, found: os.stat_result, allowed: Folders) -> None:
    """Nothing tells where the other names of a file lie."""
    if allowed is not None and stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        raise _refusal(
            f"{path} is a hard link: the file has {found.st_nlink} names, and others of them may "
            "lie outside of the folders that may be registered from; copy it"
        )


def _refusal(text: str) -> Exception:
    from checkpoint_engine.errors import AccessError  # imports torch

    return AccessError(text)


def inode_of(fd: int) -> Inode:
    """What ``fd`` is open on."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def reopen(path: str, inode: Inode | None, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a file whose header was read as ``inode``.

    Raises:
        ValueError: ``path`` leads to another file by now.
        OSError: it cannot be opened.
    """
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    if inode is not None and inode != inode_of(fd):
        os.close(fd)
        raise ValueError(f"{path} was replaced by another file while it was being registered")
    return fd


short = reprlib.repr
"""Of what came out of a file: not even its printed form may be large."""
