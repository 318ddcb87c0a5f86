"""PNG images from arrays of bytes: the small ones that stand in a page. Needs numpy only."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of the pixels: uint8 [height, width] in grey, or [height, width, 3] in colour."""
    assert pixels.dtype == np.uint8 and pixels.ndim in (2, 3), (pixels.dtype, pixels.shape)
    height, width = pixels.shape[:2]
    colour_type = 0 if pixels.ndim == 2 else 2  # as the PNG standard numbers them: grey, RGB
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    # Each row begins with the number of its filter; 0 is none.
    rows = pixels.reshape(height, -1)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()
    chunks = [_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(filtered, 9)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def data_uri(pixels: np.ndarray) -> str:
    """The pixels as an address that holds the whole image, for the `src` of an `img`."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def as_pixels(image: np.ndarray) -> np.ndarray:
    """An image [channels, height, width] of numbers 0..1 as uint8 pixels; of one or three channels."""
    pixels = np.round(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8)
    return pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
