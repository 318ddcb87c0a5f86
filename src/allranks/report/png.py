"""Makes PNG files from arrays of pixels, for the small images within a page. Needs numpy only."""

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
    # In a PNG file a byte before each row of pixels names the filter of the row; 0 means no filter.
    rows = pixels.reshape(height, -1)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()
    chunks = [_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(filtered, 9)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def data_uri(pixels: np.ndarray) -> str:
    """The pixels as a `data:` URI, which contains the whole image; for the `src` of an `img` element."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file: length, kind, content and checksum."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def as_pixels(image: np.ndarray) -> np.ndarray:
    """An image [channels, height, width] with values from 0 to 1 as uint8 pixels from 0 to 255.

    One channel gives [height, width], three channels give [height, width, 3]. NaN becomes 0.
    """
    in_range = np.clip(np.nan_to_num(image), 0, 1)
    pixels = np.round(in_range * 255).astype(np.uint8)
    return pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
