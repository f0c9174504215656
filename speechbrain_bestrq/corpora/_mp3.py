"""MP3 files that hold more than the header at their beginning says, such as several files put one behind another."""

import os

_ID3, _APE = b"ID3", b"APETAGEX"
#: So much of the audio, and so many bytes, may be missing from the count in the header: tags at the end, a cut frame.
_TOLERANCE, _SLACK = 0.1, 4096
_BLOCK = 4096


def header_falls_short(path: str) -> bool:
    """Tell whether an MP3 has more bytes of audio than its Xing or Info header counts.

    libsndfile takes the length from that header, and gives nothing that is beyond it: of an episode with
    advertisements put before it, the advertisements alone.

    Arguments
    ---------
    path : str
        The file.

    Returns
    -------
    bool
        False also where there is no such header, or tags at the end that may be of any size.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = _size_of_tag(file.read(10))
        file.seek(start)
        block = file.read(_BLOCK)
        file.seek(max(size - _BLOCK, 0))
        if _APE in file.read():
            return False
    counted = _counted_bytes(block)
    return counted is not None and counted < (1 - _TOLERANCE) * (size - start) - _SLACK


def _size_of_tag(head: bytes) -> int:
    """Bytes of the ID3v2 tag before the audio, of which the first ten are given (id3.org, ID3v2.4.0, 3.1)."""
    if len(head) < 10 or not head.startswith(_ID3):
        return 0
    seven_bits_each = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
    return 10 + seven_bits_each + (10 if head[5] & 0x10 else 0)


def _counted_bytes(block: bytes) -> int | None:
    """Bytes of audio by the Xing or Info header of the first frame; None without, or where it gives no length."""
    for place in range(len(block) - 4):
        if _is_frame(block[place : place + 4]):
            is_mpeg_1, is_mono = block[place + 1] & 0x08, block[place + 3] >> 6 == 3
            header = place + 4 + ((17 if is_mono else 32) if is_mpeg_1 else (9 if is_mono else 17))
            flags = int.from_bytes(block[header + 4 : header + 8], "big")
            if block[header : header + 4] not in (b"Xing", b"Info") or flags & 3 != 3:
                return None
            frames, counted = (int.from_bytes(block[header + at : header + at + 4], "big") for at in (8, 12))
            return counted if frames and counted else None  # a recording that was broken off has zeros
    return None


def _is_frame(head: bytes) -> bool:
    """Whether four bytes begin a frame of layer III: sync, and no reserved version, bit rate or sample rate."""
    synchronous = head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    version, layer, bit_rate, sample_rate = head[1] >> 3 & 3, head[1] >> 1 & 3, head[2] >> 4, head[2] >> 2 & 3
    return synchronous and version != 1 and layer == 1 and bit_rate not in (0, 15) and sample_rate != 3
