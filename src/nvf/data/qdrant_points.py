"""Guard of Qdrant's local storages: their points are pickles, programs, which may name two classes and call nothing."""

import json
import pickle
import pickletools
import re
import sqlite3
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nvf.errors import InputError, one_line

CLASSES = {("qdrant_client.http.models.models", name) for name in ("PointStruct", "SparseVector")}
OPCODES = """
    PROTO FRAME STOP MEMOIZE BINGET LONG_BINGET STACK_GLOBAL NEWOBJ BUILD MARK NONE NEWTRUE NEWFALSE BININT BININT1
    BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET
    ADDITEMS EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE
"""
ALLOWED = set(OPCODES.split())
FLOATS = re.compile(rb"(?:G.{8})*", re.DOTALL)  # most of a point; visiting each number would take long
SCHEMA = {
    ("table", "points", "CREATE TABLE points (id TEXT PRIMARY KEY, point BLOB)"),
    ("index", "sqlite_autoindex_points_1", None),
}


def check_storage(folder: Path) -> None:
    """Raise unless the collections of a local storage hold nothing but points; nothing in it is run."""
    for name in json.loads((folder / "meta.json").read_text())["collections"]:
        path, remedy = folder / "collection" / name / "storage.sqlite", "write the collection anew with qdrant-client"
        if not path.is_file():  # as in older versions, too
            raise InputError(f"{path} is missing; {remedy}")
        with closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True)) as database:
            # A view or another kind of table might answer the client otherwise than it answers here.
            if set(database.execute("SELECT type, name, sql FROM sqlite_master")) != SCHEMA:
                raise InputError(f"{path} holds other tables than a collection's; {remedy}")
            for row, _, point in database.execute("SELECT rowid, id, point FROM points ORDER BY rowid DESC"):
                try:
                    _check_opcodes(point)
                    _Points(BytesIO(point)).load()
                except Exception as fault:  # a damaged pickle raises anything
                    raise InputError(f"{path}: row {row} is no point ({one_line(fault)}); {remedy}") from None


class _Points(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _check_opcodes(point: bytes) -> None:
    """Raise unless all instructions are those of points, because others could take any amount of memory."""
    stream = BytesIO(point)
    for opcode, _, _ in pickletools.genops(stream):
        if opcode.name not in ALLOWED:
            raise pickle.UnpicklingError(f"it has the instruction {opcode.name}")
        if floats := FLOATS.match(point, stream.tell()):
            stream.seek(floats.end())
