"""Text files of datasets: UTF-8 or nothing, because a guess would be trained on unseen."""

from pathlib import Path


def read_text(path: Path) -> str:
    """The stripped text of a file.

    Raises:
        ValueError: if the file is missing, cannot be read, or is not UTF-8.
    """
    try:
        return decode_text(path.read_bytes(), path).strip()
    except FileNotFoundError:
        raise ValueError(f"{path}: the text is missing; write it, in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path}: the text cannot be read ({error.strerror})") from error


def decode_text(data: bytes, where: object) -> str:
    """Decode UTF-8, with or without a byte-order mark.

    Args:
        data: the bytes.
        where: the file, for the message.

    Raises:
        ValueError: if it is another encoding.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}); convert "
            "it, for example with iconv -f latin1 -t utf-8"
        ) from None
