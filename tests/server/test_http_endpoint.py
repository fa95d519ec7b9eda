"""An endpoint cannot be made that a page could call, or that nothing describes."""

from __future__ import annotations

import pytest
from starlette.requests import Request
from starlette.responses import Response

from superpose_server.door.http.endpoint import Endpoint
from superpose_server.door.http.fields import Asked, Form


async def answer(request: Request, asked: Asked) -> Response:
    return Response()


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_what_a_page_could_send_as_a_form_has_a_media_type_of_its_own(method: str) -> None:
    with pytest.raises(ValueError, match=f"{method} /x has no body, so any page could send it"):
        Endpoint(method, "/x", answer, "", reply={})
    assert Endpoint(method, "/x", answer, "", Form("X", ()), reply={}).form is not None


def test_every_answer_is_described() -> None:
    with pytest.raises(ValueError, match="GET /x says of no answer what it holds"):
        Endpoint("GET", "/x", answer, "")
