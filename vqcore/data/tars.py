"""Members of tar files that end where they should: `tarfile` takes whatever is no header for the end."""

import tarfile


class Member(tarfile.TarInfo):
    """A member for `tarfile.open(..., tarinfo=Member)`: a file that goes on with no header raises `ReadError`."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Member":
        """The member of a header. Raises `tarfile.EOFHeaderError` for zeros, which end a file."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            if len(buf) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it has no end: it was cut off, or is still being written") from error
            raise tarfile.ReadError(f"what follows is no member ({error})") from error
