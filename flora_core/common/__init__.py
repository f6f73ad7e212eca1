"""The ground floor: checks, seeds, segments, files, errors, formatting. Needs no other package of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import face

if TYPE_CHECKING:
    from . import extras, package_index, seeds
    from .cache import cache_folder, packaged
    from .changes import as_json, differences, dotted
    from .checks import check_choice, check_flag, check_name, check_number, listed, nearest, require
    from .data_paths import KINDS, data_files, is_path, kind_of
    from .devices import limit_threads, memory_bytes, peak_memory_bytes, pick_device, pick_dtype, usable_cores
    from .digests import json_digest, tensor_digest
    from .errors import CrowdedError, Stopped, crowded_text, is_out_of_memory
    from .extras import has_pip, install_command, missing, remedy, require_extras, version_of
    from .files import (
        SaveError,
        atomic_dir,
        atomic_write_bytes,
        atomic_write_json,
        explained,
        folder_names,
        locked,
        publish_dir,
        system_errors,
        write_safetensors,
    )
    from .formatting import Table, show_bytes, show_error, show_number, show_seconds
    from .safetensors_header import open_plain, parse_json, read_header
    from .seeds import derive, generator
    from .segments import DeviceSegments, Segments, to_device
    from .states import finite, on_device, put_in, take_out
    from .tables import print_tables
    from .tensor_checks import FLOAT_DTYPES, check_tensor

__getattr__, __dir__, __all__ = face(__name__, __file__)
