"""The LTX file format, version 3: bytes to values and back. Pure: no I/O, no clock, no logging."""

from lazyreplica.ltx.checksum import CHECKSUM_FLAG, DatabaseChecksum, crc64, page_checksum
from lazyreplica.ltx.decoder import DecodedFile, StreamDecoder, decode_file
from lazyreplica.ltx.encoder import Encoder, encode_file
from lazyreplica.ltx.frame import FRAME_HEADER_SIZE, Compression, decode_frame, encode_frame, max_frame_size
from lazyreplica.ltx.header import FLAG_NO_CHECKSUM, HEADER_SIZE, TRAILER_SIZE, Header, Trailer, lock_pgno
from lazyreplica.ltx.index import PageIndex, encode_index, locate_index
from lazyreplica.ltx.name import FileName, format_txid, parse_txid

__all__ = [
    "CHECKSUM_FLAG",
    "FLAG_NO_CHECKSUM",
    "FRAME_HEADER_SIZE",
    "HEADER_SIZE",
    "TRAILER_SIZE",
    "Compression",
    "DatabaseChecksum",
    "DecodedFile",
    "Encoder",
    "FileName",
    "Header",
    "PageIndex",
    "StreamDecoder",
    "Trailer",
    "crc64",
    "decode_file",
    "decode_frame",
    "encode_file",
    "encode_frame",
    "encode_index",
    "format_txid",
    "locate_index",
    "lock_pgno",
    "max_frame_size",
    "page_checksum",
    "parse_txid",
]
