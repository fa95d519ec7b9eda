"""Files as the parts of a multipart body, kept on disk from 1 MiB on until all have arrived."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from superpose_server.door.http.body import arriving, check_media_type
from superpose_server.door.http.fields import Asked
from superpose_server.errors import InvalidArgument

MEDIA_TYPE = "multipart/form-data"


@dataclass(frozen=True)
class File:
    """A part with a file name.

    Attributes:
        name: The part's name.
        about: What the file is, for people.
        required: Whether it must be there.
    """

    name: str
    about: str
    required: bool = True


@dataclass(frozen=True)
class Upload:
    """The files that a body may hold, each once.

    Attributes:
        name: What the document calls them.
        files: All that may be there.
        most_bytes: Of the whole body.
    """

    name: str
    files: tuple[File, ...]
    most_bytes: int

    @property
    def schema(self) -> Mapping[str, Any]:
        """See `Kind`."""
        return {
            "type": "object",
            "properties": {
                file.name: {
                    "type": "string",
                    "contentMediaType": "application/octet-stream",
                    "description": file.about,
                }
                for file in self.files
            },
            "required": [file.name for file in self.files if file.required],
            "additionalProperties": False,
        }


async def read_upload(request: Request, upload: Upload) -> Asked:
    """Return the bytes of each file that the body of a call holds, by name.

    Raises:
        HttpError: It is of another media type, or too large.
        InvalidArgument: It is no such body, or a part is unknown, missing or there twice.
    """
    check_media_type(request, MEDIA_TYPE)
    parser = _Parser(
        request.headers,
        arriving(request, upload.most_bytes),
        max_files=len(upload.files),
        max_fields=len(upload.files),
    )
    try:
        parts = await parser.parse()
    except (MultiPartException, UnicodeError) as error:  # Of names, in a charset of its own.
        raise InvalidArgument(
            f"the body is no {MEDIA_TYPE} of at most {len(upload.files)} parts ({error})",
            "REQUEST_UNREADABLE",
        ) from error
    try:
        return await _files(parts.multi_items(), upload)
    finally:
        await parts.close()


class _Parser(MultiPartParser):
    """A parser that also minds how a body ends; what it has opened by then it closes."""

    def __init__(self, headers: Headers, parts: AsyncGenerator[bytes], **most: int) -> None:
        super().__init__(headers, self._whole(parts), **most)
        self._ended = False

    def on_end(self) -> None:
        self._ended = True

    async def _whole(self, parts: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        async for part in parts:
            yield part
        if not self._ended:
            raise MultiPartException("it ends before its last boundary")


async def _files(parts: list[tuple[str, UploadFile | str]], upload: Upload) -> Asked:
    names = [file.name for file in upload.files]
    files: dict[str, bytes] = {}
    for name, part in parts:
        shown = name[:80]
        if name not in names or isinstance(part, str):
            what = "has no file name" if name in names else "is no part of this request"
            raise InvalidArgument(
                f"{shown!r} {what}: send {', '.join(names)} as files",
                "UNKNOWN_FIELD",
                field=shown,
            )
        if name in files:
            raise InvalidArgument(f"{name} is there twice: send it once", "FIELD_TWICE", field=name)
        files[name] = await part.read()
    for file in upload.files:
        if file.required and file.name not in files:
            raise InvalidArgument(
                f"{file.name} is missing: send it as a file", "MISSING_FIELD", field=file.name
            )
    return files
