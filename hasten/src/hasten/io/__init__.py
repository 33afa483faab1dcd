"""Files: written atomically, read with bounds, one container for everything that is shared.

`atomic` writes; `documents` reads JSON; `schema` declares what a file has to hold; `container` keeps tensors (a
safetensors file) or plain values (JSON) under a header with a digest of the whole content; `folder` keeps digests of
what other libraries wrote.
"""

from hasten.io.atomic import add_line, alone, check_target, write_atomically
from hasten.io.container import Kind, digest_of, read_record, read_tensors, write_record, write_tensors
from hasten.io.documents import Limits, describe, open_regular, parse_json, read_bytes, read_json, read_lines
from hasten.io.folder import check_files, check_sealed, write_files, write_sealed
from hasten.io.schema import (
    Array,
    as_path,
    check_arrays,
    conform,
    decreasing,
    increasing,
    orthonormal,
    shown,
    step_list,
    symmetric,
)

__all__ = [
    "Array",
    "Kind",
    "Limits",
    "add_line",
    "alone",
    "as_path",
    "check_arrays",
    "check_files",
    "check_sealed",
    "check_target",
    "conform",
    "decreasing",
    "describe",
    "digest_of",
    "increasing",
    "open_regular",
    "orthonormal",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_lines",
    "read_record",
    "read_tensors",
    "shown",
    "step_list",
    "symmetric",
    "write_atomically",
    "write_files",
    "write_record",
    "write_sealed",
    "write_tensors",
]
