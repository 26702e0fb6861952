"""The LTX file format, version 3: bytes to values and back. Pure: no I/O, no clock, no logging."""
