"""Rows of data files, wherever they are and however they are written, always with their place.

`base` says what a row file is; `files` finds files and chooses the reader; `json_rows`, `parquet_rows`, `tar_rows` and
`hf_rows` read; `remote` fetches files from elsewhere; `stream` reads without an index.
"""

from lensmith.data.readers.base import EXTENSIONS, MAX_ROW_BYTES, RowFile, RowRef, StreamRow
from lensmith.data.readers.files import expand, expand_braces, open_rows
from lensmith.data.readers.hf_rows import DatasetRows, is_hub, is_saved_dataset, pin_revision
from lensmith.data.readers.json_rows import JsonArray, JsonLines
from lensmith.data.readers.parquet_rows import ParquetRows
from lensmith.data.readers.remote import expand_remote, fetch, is_remote, mask
from lensmith.data.readers.stream import Shard, open_shards
from lensmith.data.readers.tar_rows import TarRows

__all__ = [
    "EXTENSIONS",
    "MAX_ROW_BYTES",
    "DatasetRows",
    "JsonArray",
    "JsonLines",
    "ParquetRows",
    "RowFile",
    "RowRef",
    "Shard",
    "StreamRow",
    "TarRows",
    "expand",
    "expand_braces",
    "expand_remote",
    "fetch",
    "is_hub",
    "is_remote",
    "is_saved_dataset",
    "mask",
    "open_rows",
    "open_shards",
    "pin_revision",
]
